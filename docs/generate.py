"""Reference pages that are generated from the code: the command line, the configuration, and the public API.

MkDocs loads this file as a hook (see mkdocs.yml); tests/docs/ imports it to check that nothing is missing.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pais_ray
from pais_ray.cli import main
from pais_ray.config.describe import FieldDescription, all_settings, section_descriptions

ROOT = Path(__file__).resolve().parents[1]

# Modules on the API page, beside the public names of the package.
MODULES = (
    "pais_ray.train.step",
    "pais_ray.modeling.protocols",
    "pais_ray.modeling.methods.pais",
    "pais_ray.modeling.methods.supervised",
    "pais_ray.modeling.losses",
    "pais_ray.structures.batch",
    "pais_ray.structures.masks",
    "pais_ray.structures.geometry",
    "pais_ray.evaluation.scoring",
    "pais_ray.inference.export.onnx_runner",
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages."""
    root = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+CONTRIBUTING\.md", f"]({root}contributing.md", markdown)
    return re.sub(r"\]\((?:\.\./)+CHANGELOG\.md", f"]({root}reference/changelog.md", markdown)


# The command line ----------------------------------------------------------------------------------------------------


def commands(group: click.Group = main, prefix: str = "pais-ray") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, groups before their subcommands."""
    for name, command in sorted(group.commands.items()):
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


def cli_page() -> str:
    """One section per command: usage, help text, options."""
    parts = [
        "# Command line",
        "Every command prints its help with `--help`. Exit codes: 0 success, 1 failure during the work, 2 wrong usage "
        "or wrong input. This page is generated from the commands themselves.",
    ]
    for name, command in commands():
        context = click.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"## `{name}`\n\n```text\n{name} {usage}\n```")
        parts.append(_paragraphs(command.help or ""))
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        rows = [_option_row(option, context) for option in options]
        if rows:
            parts.append("\n".join(["| option | description |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _option_row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        value = ""
    elif isinstance(option.type, click.Choice):
        value = " " + " or ".join(f"`{choice}`" for choice in option.type.choices)
    else:
        value = f" `{option.make_metavar(context)}`"
    notes = ["repeatable"] * option.multiple + ["required"] * option.required
    if option.show_default and option.default is not None:
        notes.append(f"default: `{option.default}`")
    text = (option.help or "") + (f" ({', '.join(notes)})" if notes else "")
    return f"| {names}{_cell(value, keep=True)} | {_cell(text)} |"


# The configuration ---------------------------------------------------------------------------------------------------


def config_page() -> str:
    """The config names, then one table per section."""
    parts = [
        "# Configuration",
        "A run is described by typed settings in sections. `pais-ray train` takes *config names*, which are files of "
        "`configs/`, from left to right, and then *overrides* of the form `section.setting=value`. "
        "`pais-ray show coco mask_rcnn pais` prints the resolved settings, and `pais-ray show --describe train.steps` "
        "explains a setting. `pais-ray show --schema` prints a JSON schema of config files for editors.",
        "A config file may begin with `base: NAME`. The config `NAME` is then merged directly before it, so the file "
        "lists only what differs. A base has no base itself.",
        "A description ends with the default or its source: `paper 4.2` is section 4.2 of the PAIS paper, the "
        "*released code* is what the authors of the paper published, and a value *chosen by this project* has no "
        "published source.",
        "*Free* settings may change when a run is resumed. A change of any other setting is refused, unless `--force` "
        "is given. This page is generated from the types of the settings.",
        "## Config names",
        _files_table(),
    ]
    for section, text in section_descriptions().items():
        parts += [f"## `{section}`", text]
        found = [s for s in all_settings() if s.section == section]
        for plugin in dict.fromkeys(s.plugin for s in found):
            if plugin is not None:
                parts.append(f"### `{section}.name={plugin}`")
            rows = [_setting_row(s) for s in _without_repeats([s for s in found if s.plugin == plugin])]
            parts.append("\n".join(["| setting | values | default | description |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _without_repeats(settings: list[FieldDescription]) -> list[FieldDescription]:
    """The four views have the same settings: one row for all, with the default of each."""
    found: dict[str, list[FieldDescription]] = {}
    for setting in settings:
        found.setdefault(re.sub(r"^views\.(labeled|weak|strong|test)\.", "views.VIEW.", setting.name), []).append(
            setting
        )
    return [
        group[0] if len(group) == 1 else replace(group[0], name=name, default=_defaults(group))
        for name, group in found.items()
    ]


def _defaults(group: list[FieldDescription]) -> str:
    values = {s.name.split(".")[1]: s.default for s in group}
    if len(set(values.values())) == 1:
        return group[0].default
    return "; ".join(f"{view}: {value}" for view, value in values.items())


def _setting_row(setting: FieldDescription) -> str:
    presets = "".join(f"; {name}: `{value}`" for name, value in setting.default_by_preset.items())
    default = f"`{setting.default}`" + ("" if "VIEW" in setting.name else presets)
    text = setting.description + (" *Free.*" if setting.may_change else "")
    return f"| `{setting.name}` | {_cell(setting.type)} | {_cell(default)} | {_cell(text)} |"


def _files_table() -> str:
    rows = ["| name | content |", "|---|---|"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
        text = takewhile(lambda line: not line.startswith(("pais-ray ", "Source:", "Expected")), comment)
        rows.append(f"| `{path.stem}` | {_cell(' '.join(text))} |")
    return "\n".join(rows)


# The API -------------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """The public names of the package, then the modules that extensions build on."""
    parts = [
        "# API",
        "`import pais_ray` gives the names of the first part. The modules of the second part are those that a notebook "
        "or an extension needs. Everything else is internal and may change in any version.",
        "## `pais_ray`",
    ]
    homes = vars(pais_ray)["_HOMES"]
    for name in sorted(homes):
        # The settings have a page of their own, and the layers of the networks are internal.
        fields = "false" if name in ("Config", "KNet", "KNetConfig", "MaskRCNN", "MaskRCNNConfig") else "true"
        parts.append(
            f"::: {homes[name]}.{name}\n    options:\n      heading_level: 3\n      show_if_no_docstring: {fields}"
        )
    parts.append("## Modules")
    parts += [f"::: {module}\n    options:\n      heading_level: 3" for module in MODULES]
    return "\n\n".join(parts) + "\n"


def _cell(text: str, *, keep: bool = False) -> str:
    """Text for a cell of a table; ``keep`` leaves spaces at its ends."""
    lines = " ".join(text.split()).replace("|", "\\|")
    return f" {lines}" if keep and lines else lines


def _paragraphs(text: str) -> str:
    return "\n\n".join(_cell(p) for p in re.split(r"\n\s*\n", text.replace("\b", "")) if p.strip())


# Files of the repository as pages -------------------------------------------------------------------------------------


def changelog_page() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/reference/", "](")


def contributing_page() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/configuration.md": config_page,
    "reference/api.md": api_page,
    "reference/changelog.md": changelog_page,
    "contributing.md": contributing_page,
}
