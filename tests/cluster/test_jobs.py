"""What goes to a cluster: the code and nothing else, the same bytes each time, within Ray's limit."""

import io
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.cluster import jobs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_working_dir_runs_by_itself(here):
    archive = jobs.pack(jobs.contents())
    assert archive == jobs.pack(jobs.contents()), "Ray knows it again"
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        names = packed.namelist()
        packed.extractall(here / "job")
    assert {name.split("/")[0] for name in names} == {"pais_ray", "pipelines", "configs"}
    assert not [name for name in names if not name.endswith((".py", ".yaml"))]
    command = [sys.executable, "pipelines/train.py", "quickstart", "run.storage_path=s3://bucket"]
    done = subprocess.run(
        command, cwd=here / "job", env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "run.storage_path" in done.stderr


def test_what_the_user_adds_is_sent_without_what_is_hidden(here):
    for name in ("mine/method.py", "mine/.git/config", "mine/__pycache__/x.pyc", "note.yaml", ".secret"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    added = jobs.contents([Path("mine"), here / "note.yaml"]).keys() - jobs.contents().keys()
    assert added == {"mine/method.py", "note.yaml"}


def test_what_lies_elsewhere_stands_beside_the_code(here, monkeypatch):
    for name in ("work/notes.yaml", "pkg/method.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    monkeypatch.chdir(here / "work")
    added = {n: p for n, p in jobs.contents([Path("../pkg")]).items() if n not in jobs.contents()}
    assert added == {"pkg/method.py": here / "pkg" / "method.py"}
    assert "notes.yaml" in jobs.contents([Path("../work/notes.yaml")])


@pytest.mark.parametrize("name", [".mine.yaml", ".mine/a.py", "empty/", "pkg/__pycache__/a.pyc"])
def test_what_adds_no_file_is_refused(here, name):
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).mkdir() if name.endswith("/") else (here / name).write_text("x")
    for given in (Path(name), here / name):
        with pytest.raises(ValueError, match=f"{name.rstrip('/')}: no file of it would be sent"):
            jobs.contents([given])


def test_a_word_that_the_job_would_not_find_is_refused(here, monkeypatch):
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    for path in ("../mine.yaml", "own.yaml"):
        Path(path).write_text("train: {steps: 3}")
    assert jobs.local_files(["quickstart", "own.yaml", "none.yaml", f"{here}/mine.yaml"]) == [Path("own.yaml")]
    storage = f"run.storage_path={here}"
    done = CliRunner().invoke(main, ["submit", "train", "quickstart", "../mine.yaml", storage])
    assert done.exit_code == 2
    assert (
        f"../mine.yaml: lies above the current folder, and a job has no folder above its own; submit from {here}"
        in (done.stderr)
    )


def test_too_much_is_refused_by_name(here, monkeypatch):
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert jobs.UPLOAD_LIMIT == DASHBOARD_CLIENT_MAX_SIZE
    monkeypatch.setattr(jobs, "UPLOAD_LIMIT", 2**20)
    Path("weights.bin").write_bytes(__import__("random").Random(0).randbytes(2**20))
    done = CliRunner().invoke(main, ["submit", "tables", "/runs", "--include", "weights.bin"])
    assert done.exit_code == 2
    assert "1.00 MiB" in done.stderr
    assert "The largest: weights.bin (1.00 MiB)" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian", "quickstart"], "no pipeline 'trian'; there are audit, "),
        (["train", "quickstart"], "run.storage_path: expected an absolute path that every node sees, got 'runs'"),
        (["train", "quickstart", "train.stepz=3"], "train.stepz: no such setting"),
        (["train", "quickstart", "--forse"], "--forse"),
        (["search", "quickstart", "search_pais"], "--model NAME is missing"),
        (["search", "quickstart", "search_pais", "--model"], "--model NAME is missing"),
        (["search", "quickstart", "search_pais", "--model=m"], "run.storage_path: expected an absolute path"),
        (["search", "quickstart", "search_pais", "--model", "m"], "run.storage_path: expected an absolute path"),
        (["search", "quickstart", "search_pais", "--model", "m", "--sampels", "3"], "--sampels"),
        (["search", "quickstart", "--over", "method.tau_clz=1,2", "--model", "m"], "method.tau_clz"),
    ],
)
def test_wrong_words_never_reach_the_cluster(words, line):
    done = CliRunner().invoke(main, ["submit", *words, "--address", "http://127.0.0.1:9"])
    assert done.exit_code == 2
    assert line in done.stderr


def test_the_searching_program_writes_the_json_that_it_is_told_to(here, monkeypatch):
    """And reads there what to register."""
    calls = []

    def main(words):
        calls.append(words)
        if words[0] == "tune":
            Path(words[words.index("--json") + 1]).write_text('{"retrained": {"stopped": false, "run_dir": "best"}}')

    monkeypatch.setattr("pais_ray.cli.main", main)
    monkeypatch.setattr(sys, "argv", ["search.py", "quickstart", "--json", "out.json", "--model=m"])
    runpy.run_path(str(jobs.pipelines()["search"]), run_name="__main__")
    assert calls == [
        ["tune", "quickstart", "--retrain-best", "--json", "out.json"],
        ["register", "best", "--name", "m"],
    ]
    assert Path("out.json").exists()


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # must not win over --address
    done = CliRunner().invoke(main, ["submit", "tables", "/runs", "--address", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "http://127.0.0.1:9" in done.stderr.splitlines()[0]
