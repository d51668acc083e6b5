"""The command line as scripts use it: exit codes, JSON output, and one line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.identity import flatten
from pais_ray.config.tree import load
from tests.support.paper import PAPER


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_help_imports_no_module_that_takes_seconds():
    code = "import sys; from pais_ray.cli import main; main(['--help'], standalone_mode=False); "
    code += "sys.exit(bool({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "evaluate", "predict", "export", "show"):
        assert verb in done.stdout


def test_a_closed_pipe_does_not_change_the_exit_code():
    code = "import sys; from pais_ray.cli.options import echo; [echo('x' * 99999) for _ in range(3)]; sys.exit(7)"
    unread, pipe = os.pipe()
    os.close(unread)
    done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (7, "")


def test_show_prints_settings_and_schedule(tmp_path):
    out = tmp_path / "show.json"
    done = call("show", "coco", "mask_rcnn", "pais", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert (
        "images per step 4 (reference 16), learning rate 0.0025 (linear, reference 0.01), "
        "steps 880000 (reference 220000)" in done.output
    )
    shown = json.loads(out.read_text())
    assert shown["config"]["method"]["lambda_unlabeled"] == 1.5
    assert (shown["schedule"]["steps"], shown["schedule"]["reference_steps"]) == (880000, 220000)


def test_show_prints_the_constants_of_the_paper_for_knet(tmp_path):
    done = call("show", "coco", "knet", "pais")
    assert done.exit_code == 0, done.output
    settings = flatten(load(write(tmp_path / "shown.yaml", done.stdout)))
    assert {name: settings.get(name) for name in PAPER["knet"]} == PAPER["knet"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["coco", "mask_rcnn", "pais", "method.alhpa=2"], "method.alhpa: no such setting; did you mean 'alpha'?"),
        (["coco", "mask_rcnn", "pais", "train.steps=many"], "train.steps: "),
        (["coco", "mask_rccn", "pais"], "mask_rccn: no such config; did you mean 'mask_rcnn'?"),
        (["quickstart", "run.storage_path=s3://bucket/runs"], "run.storage_path: "),
        (["quickstart", "data.train=nowhere.json", "data.val=nowhere.json", "data.images=."], "nowhere.json"),
    ],
)
def test_wrong_words_end_in_one_line_and_exit_code_2(words, line):
    done = call("train", *words)
    assert done.exit_code == 2
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert "Traceback" not in done.output


def test_evaluate_scores_any_results_file(tmp_path):
    reference = Path(__file__).parents[1] / "fixtures" / "evaluation" / "coco"
    for kind in ("segm", "bbox"):
        out = tmp_path / f"{kind}.json"
        done = call(
            "evaluate",
            *("--annotations", str(reference / "ground_truth.json")),
            *("--predictions", str(reference / f"{kind}_results.json")),
            *("--json", str(out)),
        )
        assert done.exit_code == 0, done.output
        expected = {"segm": 0.320, "bbox": 0.505}[kind]  # published
        assert json.loads(out.read_text())[kind]["AP"] == pytest.approx(expected, abs=5e-4)


def test_evaluate_and_predict_require_existing_input(tmp_path):
    assert call("evaluate").exit_code == 2
    assert call("evaluate", "--annotations", str(tmp_path / "none.json"), "--predictions", "x").exit_code == 2
    assert call("predict", str(tmp_path), "--out", str(tmp_path / "o")).exit_code == 2


def test_show_prints_the_schema_of_config_files():
    done = call("show", "--schema")
    assert done.exit_code == 0, done.output
    assert {"data", "base", "per_segmentor"} <= set(json.loads(done.stdout)["properties"])
    assert call("show", "--schema", "coco").exit_code == 2


def test_every_verb_and_option_has_a_help_text():
    for name, command in main.commands.items():
        assert command.get_short_help_str(limit=200).endswith("."), name
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"{name} {option.name}"
                assert option.help[0].isupper(), f"{name} {option.name}"
                assert option.help.rstrip("]").rpartition("  [")[0].endswith(".") or option.help.endswith("."), (
                    option.name
                )


def test_show_describes_a_setting(tmp_path):
    out = tmp_path / "describe.json"
    done = call("show", "--describe", "train.log_every", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "train.log_every"
    for line in ("Type: integer, at least 1", "Default value: 50", "On resume: may change"):
        assert f"    {line}\n" in done.stdout
    assert [s["name"] for s in json.loads(out.read_text())["settings"]] == ["train.log_every"]
    assert call("show", "coco", "--describe", "train").exit_code == 2
    unknown = call("show", "--describe", "trian")
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("error: trian: no such setting or section; did you mean 'train'?")
