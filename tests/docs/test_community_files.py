"""Files around the code: hosted CI, issue forms, citation, pre-commit hooks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT

CHECKER = Path(sys.executable).with_name("check-jsonschema")
FORMS = ".github/ISSUE_TEMPLATE"
SCHEMAS = {
    "github-workflows": [".github/workflows/ci.yml"],
    "github-issue-forms": [f"{FORMS}/bug_report.yml", f"{FORMS}/feature_request.yml"],
    "github-issue-config": [f"{FORMS}/config.yml"],
    "citation-file-format": ["CITATION.cff"],
}


@pytest.mark.parametrize(("schema", "paths"), SCHEMAS.items())
def test_files_fit_their_schema(schema, paths):
    command = [CHECKER, "--builtin-schema", f"vendor.{schema}", *[ROOT / path for path in paths]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hosted_ci_runs_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    supported = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    first, end = map(int, supported.groups())
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(first, end)]
    assert job["steps"][-1]["run"] == ".ci/run"


def test_pre_commit_hooks_are_those_of_make_lint():
    recipe = re.search(r"^lint: .*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    linted = {command.replace("$(BIN)/", "").removesuffix(" .") for command in recipe.split(" && ")}
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]} == linted
