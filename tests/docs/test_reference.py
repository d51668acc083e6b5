"""The reference is complete: settings, commands, event types, renamed settings, moved modules."""

import ast
import importlib.util
import inspect
import re
import tomllib

import click
import pytest
import yaml

from pais_ray.config.describe import all_settings
from pais_ray.config.renamed import RENAMED
from pais_ray.data.shards import dataset
from pais_ray.evaluation.evaluators import coco
from pais_ray.inference.export import onnx_runner
from pais_ray.runs import checkpoints
from pais_ray.search import trials
from pais_ray.train import step_metrics
from tests.docs.pages import ROOT, generator, pages

VIEW = re.compile(r"^views\.(labeled|weak|strong|test)\.")


def test_every_setting_is_in_the_configuration_reference():
    page = pages()["docs/reference/configuration.md"]
    for setting in all_settings():
        assert f"`{VIEW.sub('views.VIEW.', setting.name)}`" in page, setting.name


def test_every_config_name_is_in_the_configuration_reference():
    page = pages()["docs/reference/configuration.md"]
    for path in (ROOT / "configs").glob("*.yaml"):
        assert re.search(rf"^\| `{path.stem}` \| \w.*\|$", page, re.MULTILINE), path.stem


def test_every_command_and_option_is_in_the_command_line_reference():
    page = pages()["docs/reference/cli.md"]
    for name, command in generator().commands():
        section = page.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
        assert section, name
        context = click.Context(command)
        for parameter in command.params:
            shown = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(context)
            if not getattr(parameter, "hidden", False):
                assert shown in section, (name, shown)


def event_types():
    """The event types in the code: values of the key "event", and second arguments of Supervisor.report."""
    found = set()
    for path in (ROOT / "pais_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                found |= {text(value) for key, value in pairs if key is not None and text(key) == "event"}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "report" and len(node.args) == 2:
                found.add(text(node.args[1]))
    return found - {None}


def text(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_every_event_type_is_in_the_reference():
    page = pages()["docs/reference/run_directory.md"].partition("## Events")[2]
    documented = set(re.findall(r"^\| `(\w+)` \|", page.partition("\n## ")[0], re.MULTILINE))
    assert event_types() == documented


def test_every_metric_is_in_the_reference():
    page = pages()["docs/reference/run_directory.md"].partition("## Metrics")[2].partition("\n## ")[0]
    sums = dict.fromkeys(re.findall(r'"(pseudo/\w+)": ', inspect.getsource(step_metrics.pseudo_label_sums)), 1.0)
    assert len(sums) > 5
    assert [name for name in step_metrics.with_pseudo_label_means(sums) if f"`{name}`" not in page] == []
    for name in coco.METRICS:
        assert f"`{name}`" in page or f"_{name}`" in page, name
    worker = "".join(path.read_text() for path in (ROOT / "pais_ray" / "train" / "worker").glob("*.py"))
    for name in re.findall(r'"((?:time|system)/\w+)"', worker):
        assert f"`{name}`" in page, name


def test_the_format_versions_are_those_of_the_code():
    page = pages()["docs/reference/releases.md"]
    older = ", ".join(map(str, checkpoints.MIGRATIONS))
    assert f"| checkpoint | {checkpoints.FORMAT} | {older} |" in page
    assert f"| shards | {dataset.VERSION} |" in page
    assert f"| exported model | {onnx_runner.FORMAT} |" in page
    assert f"| search | {trials.FORMAT} |" in page


def test_every_renamed_setting_is_on_the_upgrading_page():
    page = pages()["docs/reference/upgrading.md"]
    for old, new in RENAMED.items():
        row = f"| `{VIEW.sub('views.VIEW.', old)}` | `{VIEW.sub('views.VIEW.', new)}` |"
        assert row in page, old


def test_modules_of_the_upgrading_page_exist():
    page = pages()["docs/reference/upgrading.md"].partition("### Moved modules")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| `[\w.]+` \| (.+) \|$", page, re.MULTILINE)
    assert len(cells) > 50
    for module in [name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]:
        assert importlib.util.find_spec(f"pais_ray.{module}") is not None, module


def test_functions_of_the_architecture_page_exist():
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", pages()["docs/architecture.md"])
    assert len(named) > 8
    for file, name in named:
        tree = ast.parse((ROOT / "pais_ray" / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            found = [n for n in ast.iter_child_nodes(tree) if getattr(n, "name", None) == part]
            assert found, f"{file}: {name}"
            tree = found[0]


@pytest.mark.parametrize("module", generator().MODULES)
def test_modules_of_the_api_page_exist(module):
    assert importlib.util.find_spec(module) is not None


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in pages()["CHANGELOG.md"]
