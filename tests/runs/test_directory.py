"""Laws of a run directory: one driver at a time, free again however the driver ends; what is kept over starts."""

import json
import os
import signal
import subprocess
import sys

import pytest
import ray

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import compose, dump, run_schedule
from pais_ray.runs import directory, lock
from pais_ray.runs.checkpoints import best_checkpoint, checkpoint_folder
from pais_ray.runs.lock import lock_run
from pais_ray.runs.prepare import prepare
from pais_ray.train.driver import resources
from tests.support.tiny import state_of

HOLDER = """
import sys, time
from pathlib import Path
from pais_ray.runs.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_driver_is_refused_and_told_who_has_it(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_S", 0.0)
    words = rf"locked by another process \(pid {other.pid} on .* since 20"
    with pytest.raises(ConfigError, match=words), lock_run(tmp_path):
        pytest.fail("two drivers")


def test_a_killed_driver_lets_go(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    with lock_run(tmp_path):  # waits for the end of the process
        assert f"pid {os.getpid()} " in (tmp_path / lock.LOCK_FILE).read_text()
    with lock_run(tmp_path):  # and again, after an orderly end
        pass


def test_a_file_system_without_locks_holds_nothing_up(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock_run(tmp_path):
        assert (tmp_path / lock.LOCK_FILE).exists()


WORDS = ["synthetic", "mask_rcnn", "pais", "train.steps=8", "train.eval_every=4", "scaling.num_workers=2"]


@pytest.fixture
def begun(tmp_path):
    """A run directory with one checkpoint."""
    config = compose(WORDS)
    checkpoint_folder(tmp_path, 4).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "schedule.json").write_text(json.dumps(run_schedule(config).to_json()))
    return config


def test_a_resumed_run_keeps_its_schedule_unless_the_settings_of_the_schedule_change(begun, tmp_path):
    began = run_schedule(begun)
    fewer = compose([*WORDS, "scaling.num_workers=1", "data.labeled=0.5"])  # other data, by --force
    assert run_schedule(fewer) != began == directory.recorded_schedule(tmp_path, fewer)
    given = compose([*WORDS, "scaling.num_workers=1", f"optim.lr={began.lr!r}"])  # the rate that the run has already
    assert directory.recorded_schedule(tmp_path, given) == began
    slower = compose([*WORDS, "scaling.num_workers=1", "optim.lr=0.002"])
    assert directory.recorded_schedule(tmp_path, slower) == run_schedule(slower) != began


def test_an_evaluation_is_owed_whose_scores_no_start_has_lived_to_see(begun, tmp_path):
    schedule, rows = run_schedule(begun), []

    def owed(step):
        folder = checkpoint_folder(tmp_path, step)
        found = directory.find_unscored_checkpoint(tmp_path, folder, rows, begun, schedule)
        return None if found is None else int(found.name[5:])

    for step in (3, 4, 5, 8):
        made = state_of()
        made.step = step
        made.save(checkpoint_folder(tmp_path, step))
    assert directory.find_unscored_checkpoint(tmp_path, None, rows, begun, schedule) is None
    assert [owed(step) for step in (3, 4, 5, 8)] == [None, 4, 4, 8]
    rows = [{"step": 4, "teacher/segm_AP": None}]
    assert owed(5) == 4, "the student's is missing"
    rows.append({"step": 4, "student/segm_AP": 0.1})
    assert [owed(step) for step in (4, 5, 8)] == [None, None, 8]
    rows.clear()
    (checkpoint_folder(tmp_path, 4) / "student.safetensors").unlink()
    assert owed(5) is None, "there are no weights to evaluate"


def test_a_cap_on_pseudo_labels_outlives_starts_and_not_a_new_run(begun, tiny_coco, tmp_path):
    paths = (f"data.train={tiny_coco}/train.json", f"data.val={tiny_coco}/val.json", f"data.images={tiny_coco}/images")
    config, data = prepare(compose([*WORDS, *paths, "data.labeled=0.5"]))
    (tmp_path / directory.LIMIT_FILE).write_text('{"cap": 6}')
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.read_pseudo_label_limit(tmp_path, 100) == 6
    checkpoint_folder(tmp_path, 4).rmdir()
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.read_pseudo_label_limit(tmp_path, 100) == 100


def test_a_cluster_that_was_joined_may_grow(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})  # a head that takes no work, no nodes yet
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    config = compose([*WORDS, "scaling.use_gpu=true"])
    assert resources.worker_resources(config, is_own_cluster=False) == (1.0, 1)
    with pytest.raises(ConfigError, match="and 0 of 2 GPUs"):
        resources.worker_resources(config, is_own_cluster=True)


def test_the_best_checkpoint_is_told_by_scores_that_were_logged_after_it(tmp_path):
    newest = checkpoint_folder(tmp_path, 8)
    for step in (4, 8):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    best = {"teacher": {"segm_AP": 0.2, "step": 4}}
    (newest / "state.json").write_text(json.dumps({"format": 2, "step": 8, "best": best}))
    assert best_checkpoint(tmp_path, newest, "teacher") == checkpoint_folder(tmp_path, 4)
    assert best_checkpoint(tmp_path, newest, "student") is None
    rows = [
        {"step": 6, "teacher/segm_AP": 0.9},
        {"step": 8, "teacher/segm_AP": 0.3},
        {"step": 12, "teacher/segm_AP": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert best_checkpoint(tmp_path, newest, "teacher") == newest, "6 was never written, 12 is of a later start"
