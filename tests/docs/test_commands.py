"""Commands of the documentation parse: verbs, options, values, config names and settings exist. Nothing is run."""

import re

import click
import pytest
import torch

from pais_ray.cli import main
from pais_ray.cli.cluster import JOB_VERBS
from pais_ray.config.describe import all_settings
from pais_ray.config.overlays import resolve
from pais_ray.config.tree import build
from pais_ray.modeling import registry
from pais_ray.structures import Masks, Predictions
from tests.docs.pages import blocks, commands, pages

COMPOSED = {"train", "tune", "show"}  # commands whose words are a complete configuration
SOME_DATA = ("data.train=t.json", "data.val=v.json", "data.images=i", "data.unlabeled=u")  # in place of data=FOLDER
PLACEHOLDER = re.compile(r"[A-Z_]+(\.\.\.)?")


def parse(words, *, complete=True):
    """(command, its values) of a command line. Raises click.UsageError, if ``complete`` also for missing arguments."""
    name, *rest = words
    command = main.commands.get(name)
    if command is None and PLACEHOLDER.fullmatch(name) and not complete:
        return main, {}
    if command is None:
        raise click.UsageError(f"no such command: {name}")
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    if name == "split":
        rest = [f"--{word}" if word.startswith("data=") else word for word in rest]
    context = click.Context(
        command, ignore_unknown_options=command.context_settings.get("ignore_unknown_options", False)
    )
    values, _, _ = command.make_parser(context).parse_args(list(rest))
    values = {key: value for key, value in values.items() if isinstance(value, str | list | tuple | bool)}
    for parameter in command.params:
        given = values.get(parameter.name, ())
        if complete and parameter.required and not given:
            raise click.UsageError(f"{' '.join(words)}: {parameter.name} is missing")
        if isinstance(parameter, click.Option) and not parameter.is_flag and not isinstance(parameter.type, click.Path):
            for value in given if isinstance(given, list) else [given] if given else []:
                if not PLACEHOLDER.fullmatch(value):
                    parameter.type.convert(value, parameter, None)
    if name == "submit" and "job" in values and not PLACEHOLDER.fullmatch(values["job"]):
        if values["job"] not in JOB_VERBS:
            raise click.UsageError(f"no such verb: {values['job']}")
        return parse([JOB_VERBS[values["job"]], *values.get("words", ())], complete=complete)
    if name == "search":  # the words and options of tune
        return parse(["tune", *values.get("words", ())], complete=complete)
    return command, values


def compose(words):
    """Build the configuration of ``words``, without the folders and files that they name. Raises ConfigError."""
    known = [w for w in words if not (PLACEHOLDER.fullmatch(w) or w.startswith("data=") or w.endswith(".yaml"))]
    if any(word.startswith("data=") for word in words):
        known = ["mask_rcnn", "pais", *SOME_DATA, *known]
    tree = resolve(known)
    tree.pop("search", None)
    return build(tree)


@pytest.fixture(scope="module", autouse=True)
def my_package(tmp_path_factory):
    """The method of docs/architecture.md, where the command beside it finds it."""
    folder = tmp_path_factory.mktemp("package") / "my_package"
    folder.mkdir()
    example = next(b for b in blocks("python") if b.page == "docs/architecture.md")
    (folder / "hard_labels.py").write_text(example.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        yield


def test_the_method_of_the_architecture_page_makes_targets():
    method = registry.method("my_package.hard_labels")()
    masks = Masks.full(torch.ones(2, 8, 8))
    found = Predictions(
        boxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.1]),
        ious=torch.tensor([0.8, 0.8]),
        masks=masks,
    )
    targets = method.pseudo_labels(found)
    assert targets.labels.tolist() == [0]
    assert targets.class_weight.tolist() == [1.0]


@pytest.mark.parametrize(("place", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)[:60]}") for p, w in commands()])
def test_a_command_parses(place, words):
    command, values = parse(words, complete=":" in place)
    settings = [word for word in values.get("words", ()) if not PLACEHOLDER.fullmatch(word)]
    if command.name in COMPOSED and settings:
        compose(settings)
    for over in values.get("over", ()):
        assert over.partition("=")[0] in NAMES, over


NAMES = {setting.name for setting in all_settings()}
SECTIONS = "|".join(sorted({name.partition(".")[0] for name in NAMES}))
SETTING = re.compile(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*(?!\w|/|\()")
FILES = (".json", ".yaml", ".py", ".md", ".jsonl", ".png", ".txt")


@pytest.mark.parametrize("page", [name for name in pages() if name not in ("docs/reference/upgrading.md",)])
def test_settings_of_a_page_exist(page):
    code = re.findall(r"`([^`\n]+)`", pages()[page]) + [b.text for b in blocks() if b.page == page and not b.language]
    for name in [name for text in code for name in SETTING.findall(text)]:
        if name.endswith(FILES):
            continue
        assert name in NAMES or any(known.startswith(f"{name}.") for known in NAMES), f"{page}: no setting {name}"


def test_wrong_commands_are_found():
    with pytest.raises(click.UsageError):
        parse(["trian", "quickstart"])
    with pytest.raises(click.UsageError):
        parse(["tune", "quickstart", "--sampels", "3"])
    with pytest.raises(click.UsageError):
        parse(["predict", "runs/first"])
    with pytest.raises(click.UsageError):
        parse(["evaluate", "runs/first", "--role", "pupil"])
    with pytest.raises(ValueError, match="no such config"):
        compose(["quikstart"])
    with pytest.raises(ValueError, match="no such setting"):
        compose(["quickstart", "train.stpes=3"])
    assert SETTING.findall("`train.stpes=3`") == ["train.stpes"]
