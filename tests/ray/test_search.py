"""Searches on a real cluster: killed and resumed, stopped at a rung, tracked, best configuration trained."""

import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray.util import placement_group_table

from pais_ray.cli import main
from pais_ray.config.tree import load
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs.checkpoints import checkpoints
from pais_ray.search.trials import TrialStore
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = 8


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("searches")


def words(data: Path, storage: Path, *more: str) -> list[str]:
    """One worker of half a CPU per trial, so that two trials and the reading tasks fit."""
    return [
        *("tune", "synthetic", "mask_rcnn", "pais"),
        *(f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"),
        *("data.image_size=64", "data.labeled=0.25", "batch.labeled=1", "batch.unlabeled=1"),
        *("segmentor.preset=nano", "method.burn_in=2", "optim.lr=0.02", f"train.steps={STEPS}"),
        *("train.eval_every=2", "train.log_every=1", "train.panel_every=null", "train.keep_checkpoints=9"),
        *("scaling.cpus_per_worker=0.5", f"run.storage_path={storage}", f"tracking.uri=sqlite:///{storage}/mlflow.db"),
        *("--rungs", "2,4", *more),
    ]


def tune(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def killed(arguments: list[str], address: str, store: Path, event) -> None:
    """Starts the search in a process and kills it when its trial store shows ``event``."""
    env = {**os.environ, "RAY_ADDRESS": address}
    driver = subprocess.Popen([sys.executable, "-m", "pais_ray.cli", *arguments], env=env)
    try:
        wait_for(lambda: store.exists() and event(TrialStore(store).trials), lambda: driver.poll() is None)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()


def children(storage: Path, name: str):
    """The MLflow runs of a search: the parent, and trial -> run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    parent = client.get_run((storage / name / "mlflow_run_id").read_text())
    found = client.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    return parent, {run.info.run_name: run for run in found}


@pytest.fixture(scope="module")
def searched(cluster, tiny_coco, storage) -> Path:
    """A search of two trials that was killed when a trial had a score and a checkpoint, and resumed."""
    root = storage / "first"
    arguments = words(tiny_coco, storage, "--over", "method.tau_cls=0.05,0.5", "--name", "first")
    killed(arguments, cluster["address"], root / "trials.json", lambda trials: any(t.scores for t in trials))
    before = TrialStore(root / "trials.json")
    made = {
        t.id: {c: (c / "manifest.json").stat().st_mtime_ns for c in checkpoints(root / "trials" / t.id)}
        for t in before.trials
    }
    output = tune(*arguments)
    after = TrialStore(root / "trials.json")
    assert [t.id for t in after.trials] == [t.id for t in before.trials]
    for rung in (2, 4):
        now = after.rung(rung)
        assert {trial: now[trial] for trial in before.rung(rung)} == before.rung(rung)
        assert len(now) == 2
    assert {t.state for t in after.trials} == {"finished"}
    assert any(made.values())
    for trial in after.trials:
        folder = root / "trials" / trial.id
        assert sorted(trial.scores) == [2, 4, 6, STEPS]
        assert [row["step"] for row in metric_rows(folder) if "loss" in row] == list(range(1, STEPS + 1))
        again = {c: (c / "manifest.json").stat().st_mtime_ns for c in made[trial.id]}
        assert again == made[trial.id], "checkpoints from before the kill were not written again"
    assert "resumes after step" in output
    return root


def test_a_killed_search_resumes_and_writes_its_results(searched, storage):
    files = {p.name for p in searched.iterdir()} | {p.name for p in (searched / "figures").iterdir()}
    assert files >= {"table.txt", "results.json", "results.csv", "best.yaml", "parallel.png", "parameters.png"}
    result = json.loads((searched / "results.json").read_text())
    assert result["stopped"] is None
    assert [c["state"] for c in result["configurations"]] == ["finished", "finished"]
    parent, runs = children(storage, "first")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["teacher/segm_AP"] == result["best"]["teacher/segm_AP"]
    assert parent.data.params["method.tau_cls"] == "choice(0.05, 0.5)"
    assert sorted(runs) == ["000s0", "001s0"], "a resumed trial has one run"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.params["method.tau_cls"] for run in runs.values()} == {"0.05", "0.5"}
    assert {run.data.tags["search"] for run in runs.values()} == {"first"}


def test_a_finished_search_starts_no_trial(searched, tiny_coco, storage):
    before = (searched / "trials.json").read_text()
    output = tune(*words(tiny_coco, storage, "--over", "method.tau_cls=0.05,0.5", "--name", "first"))
    assert "starts" not in output
    assert (searched / "trials.json").read_text() == before
    assert "best settings" in output


def test_a_trial_worse_than_those_of_an_earlier_search_is_stopped_at_the_rung(searched, tiny_coco, storage):
    """The trials of the earlier search count at the rungs; here they were better."""
    earlier = storage / "better"
    earlier.mkdir()
    for name in ("config.yaml", "search.json"):
        (earlier / name).write_text((searched / name).read_text())
    store = TrialStore(earlier / "trials.json")
    store.trials = TrialStore(searched / "trials.json").trials
    for trial in store.trials:
        trial.folder = str(searched / "trials" / trial.id)
        trial.scores = dict.fromkeys(trial.scores, 0.9)
    store.save()
    over = ("--over", "method.tau_cls=0.05,0.3,0.5", "--name", "second", "--warm-start", str(earlier))
    output = tune(*words(tiny_coco, storage, *over))
    assert "2 trials imported" in output
    (trial,) = (t for t in TrialStore(storage / "second" / "trials.json").trials if t.folder is None)
    assert (trial.params, trial.state, sorted(trial.scores)) == ({"method.tau_cls": 0.3}, "stopped", [2])
    _, runs = children(storage, "second")
    assert runs[trial.id].info.status == "KILLED"
    assert runs[trial.id].data.tags["search.state"].startswith("stopped AP 0.0")
    root = storage / "second" / "trials" / trial.id
    assert (root / "figures" / "curves.png").exists()
    assert checkpoints(root), "it stopped by itself, with a checkpoint"
    reserved = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not [group for group in reserved if any("CPU" in bundle for bundle in group["bundles"].values())]


@pytest.mark.slow
def test_ctrl_c_resume_with_optuna_and_full_training_of_the_best(cluster, tiny_coco, storage):
    """The printed command resumes; then WORDS are trained at their own length with the best settings."""
    root = storage / "third"
    over = ("--over", "method.tau_cls=uniform(0.05,0.5)", "--over", "method.alpha=1,4", "--name", "third")
    chosen = ("--sampler", "optuna", "--samples", "2", "--seeds", "2", "--steps", "4", "--retrain-best")
    arguments = words(tiny_coco, storage, *over, *chosen)
    arguments[arguments.index("--rungs") + 1] = "none"
    env = {**os.environ, "RAY_ADDRESS": cluster["address"]}
    default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    driver = subprocess.Popen(
        [sys.executable, "-m", "pais_ray.cli", *arguments], env=env, preexec_fn=default_sigint, **pipes
    )
    output = ""
    while " at 2/4: AP" not in output:
        line = driver.stdout.readline()
        assert line, output
        output += line
    driver.send_signal(signal.SIGINT)
    output += driver.communicate()[0]
    assert driver.returncode == 0, output
    assert json.loads((root / "results.json").read_text())["stopped"] == "Ctrl-C"
    left = TrialStore(root / "trials.json").trials
    assert {t.state for t in left} <= {"waiting", "finished"}
    assert "waiting" in {t.state for t in left}
    parent, runs = children(storage, "third")
    assert parent.info.status == "KILLED"
    assert "RUNNING" not in {run.info.status for run in runs.values()}

    command = shlex.split(output.split("Resume with:")[1].strip().splitlines()[0])
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    trials = TrialStore(root / "trials.json").trials
    assert {(t.point, t.seed) for t in trials} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert {t.state for t in trials} == {"finished"}
    assert all((t.scores, t.params) == (t.scores | o.scores, o.params) for t, o in zip(trials, left, strict=False))
    table = (root / "table.txt").read_text().splitlines()
    assert table[0].split() == ["segm", "AP", "+-", "step", "state", "tau_cls", "alpha"]
    best = json.loads((root / "results.json").read_text())["best"]["params"]
    retrained = storage / "third-best"
    assert load(retrained / "config.yaml").method.tau_cls == best["method.tau_cls"]
    assert [row["step"] for row in metric_rows(retrained) if "loss" in row] == list(range(1, STEPS + 1))
    _, runs = children(storage, "third")
    assert len(runs) == 4
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
