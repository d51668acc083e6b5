"""Jobs: contents of the working_dir, its size limit, checks before the submission, command lines."""

import io
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.cli.cluster import JOB_VERBS, job_command
from pais_ray.cli.training import tune, tune_options
from pais_ray.cluster import jobs, ray_compat


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_working_dir_is_self_contained(folder):
    archive = jobs.pack(jobs.working_dir_files())
    assert archive == jobs.pack(jobs.working_dir_files()), "equal bytes: Ray uploads them once"
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        names = packed.namelist()
        packed.extractall(folder / "job")
    assert {name.split("/")[0] for name in names} == {"pais_ray", "pipelines", "configs"}
    assert not [name for name in names if not name.endswith((".py", ".yaml"))]
    command = [sys.executable, "pipelines/train.py", "quickstart", "run.storage_path=s3://bucket"]
    done = subprocess.run(
        command, cwd=folder / "job", env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "run.storage_path" in done.stderr


def test_included_folders_are_sent_without_hidden_files(folder):
    for name in ("mine/method.py", "mine/.git/config", "mine/__pycache__/x.pyc", "note.yaml", ".secret"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    added = jobs.working_dir_files([Path("mine"), folder / "note.yaml"]).keys() - jobs.working_dir_files().keys()
    assert added == {"mine/method.py", "note.yaml"}


def test_files_outside_the_current_folder_are_placed_at_the_top(folder, monkeypatch):
    for name in ("work/notes.yaml", "pkg/method.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    monkeypatch.chdir(folder / "work")
    added = {n: p for n, p in jobs.working_dir_files([Path("../pkg")]).items() if n not in jobs.working_dir_files()}
    assert added == {"pkg/method.py": folder / "pkg" / "method.py"}
    assert "notes.yaml" in jobs.working_dir_files([Path("../work/notes.yaml")])


@pytest.mark.parametrize("name", [".mine.yaml", ".mine/a.py", "empty/", "pkg/__pycache__/a.pyc"])
def test_an_include_without_a_visible_file_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("x")
    for path in (Path(name), folder / name):
        with pytest.raises(ValueError, match=f"{name.rstrip('/')}: contains no file to send"):
            jobs.working_dir_files([path])


def test_a_config_file_outside_the_current_folder_is_refused(folder, monkeypatch):
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    for path in ("../mine.yaml", "own.yaml"):
        Path(path).write_text("train: {steps: 3}")
    assert jobs.local_files(["quickstart", "own.yaml", "none.yaml", f"{folder}/mine.yaml"]) == [Path("own.yaml")]
    storage = f"run.storage_path={folder}"
    done = CliRunner().invoke(main, ["submit", "train", "quickstart", "../mine.yaml", storage])
    assert done.exit_code == 2
    assert f"../mine.yaml: is outside the current folder, which is all that a job receives; submit from {folder}" in (
        done.stderr
    )


def test_too_large_a_working_dir_is_refused_with_the_largest_files(folder, monkeypatch):
    monkeypatch.setattr(ray_compat, "UPLOAD_LIMIT", 2**20)
    Path("weights.bin").write_bytes(__import__("random").Random(0).randbytes(2**20))
    done = CliRunner().invoke(main, ["submit", "tables", "/runs", "--include", "weights.bin"])
    assert done.exit_code == 2
    assert "1.00 MiB" in done.stderr
    assert "Largest files: weights.bin (1.00 MiB)" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian", "quickstart"], "no such job 'trian'; choose one of audit, batch-predict, "),
        (["train", "quickstart"], "run.storage_path: expected an absolute path that every node sees, got 'runs'"),
        (["train", "quickstart", "train.stepz=3"], "train.stepz: no such setting"),
        (["train", "quickstart", "--forse"], "--forse"),
        (["tune", "quickstart", "search_pais"], "run.storage_path: expected an absolute path"),
        (["tune", "quickstart", "search_pais", "--search", "grit"], "'grit' is not one of"),
        (["search", "quickstart", "search_pais"], "Missing option '--model'"),
        (["search", "quickstart", "search_pais", "--model"], "'--model' requires an argument"),
        (["search", "quickstart", "search_pais", "--model=m"], "run.storage_path: expected an absolute path"),
        (["search", "quickstart", "search_pais", "--model", "m"], "run.storage_path: expected an absolute path"),
        (["search", "quickstart", "search_pais", "--model", "m", "--sampels", "3"], "--sampels"),
        (["search", "quickstart", "--over", "method.tau_clz=1,2", "--model", "m"], "method.tau_clz"),
    ],
)
def test_invalid_words_are_refused_before_the_submission(words, line):
    done = CliRunner().invoke(main, ["submit", *words, "--address", "http://127.0.0.1:9"])
    assert done.exit_code == 2
    assert line in done.stderr


def test_the_search_program_writes_its_json_file(folder, monkeypatch):
    """And registers the run that the file names."""
    calls = []

    def run_verb(verb, words):
        calls.append([verb.name, *words])
        if verb.name == "tune":
            Path(words[words.index("--json") + 1]).write_text('{"retrained": {"stopped": false, "run_dir": "best"}}')

    monkeypatch.setattr("pais_ray.cli.search_pipeline.run_verb", run_verb)
    monkeypatch.setattr(sys, "argv", ["search.py", "quickstart", "--json", "out.json", "--model=m"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(jobs.pipelines()["search"]), run_name="__main__")
    assert calls == [
        ["tune", "quickstart", "--retrain-best", "--json", "out.json"],
        ["register", "best", "--name", "m"],
    ]
    assert Path("out.json").exists()


def test_an_unreachable_cluster_is_a_one_line_error(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # must not win over --address
    done = CliRunner().invoke(main, ["submit", "tables", "/runs", "--address", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "http://127.0.0.1:9" in done.stderr.splitlines()[0]


def test_a_job_runs_a_verb_or_a_program_of_pipelines():
    programs = jobs.pipelines()
    assert job_command("predict", ["run"], programs) == job_command("batch-predict", ["run"], programs)
    assert job_command("tune", ["a=1"], programs) == ["python", "-m", "pais_ray.cli", "tune", "a=1"]
    assert job_command("own", [], {"own": Path("own.py")}) == ["python", "pipelines/own.py"]
    assert set(programs) <= set(JOB_VERBS), "each program of pipelines/ is also a verb"
    assert set(JOB_VERBS.values()) <= set(main.commands)


def test_the_earlier_name_of_the_sampler_option_still_works():
    for option in ("--sampler", "--search"):
        given = tune.make_context("tune", ["quickstart", option, "random"]).params
        assert tune_options(given).sampler == "random"
    assert "--search" not in CliRunner().invoke(main, ["tune", "--help"]).output
