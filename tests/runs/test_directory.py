"""Run directories: one driver at a time, and what later starts of a run keep."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import compose, dump, run_schedule
from pais_ray.runs import directory, lock
from pais_ray.runs.checkpoints import checkpoint_folder
from pais_ray.runs.lock import lock_run
from pais_ray.runs.prepare import prepare
from tests.support.tiny import state_of

LOCKER = """
import sys, time
from pathlib import Path
from pais_ray.runs.lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has locked ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", LOCKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_driver_is_refused_and_the_first_one_named(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_S", 0.0)
    message = rf"locked by another process \(pid {other.pid} on .* since 20"
    with pytest.raises(ConfigError, match=message), lock_run(tmp_path):
        pytest.fail("two drivers")


def test_a_killed_driver_releases_the_lock(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    with lock_run(tmp_path):  # waits for the end of the process
        assert f"pid {os.getpid()} " in (tmp_path / lock.LOCK_FILE).read_text()
    with lock_run(tmp_path):  # and again, after a normal end
        pass


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock_run(tmp_path):
        assert (tmp_path / lock.LOCK_FILE).exists()


WORDS = ["synthetic", "mask_rcnn", "pais", "train.steps=8", "train.eval_every=4", "scaling.num_workers=2"]


@pytest.fixture
def started(tmp_path):
    """A run directory with one checkpoint."""
    config = compose(WORDS)
    checkpoint_folder(tmp_path, 4).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "schedule.json").write_text(json.dumps(run_schedule(config).to_json()))
    return config


def test_a_resumed_run_keeps_its_schedule_unless_the_settings_of_the_schedule_change(started, tmp_path):
    began = run_schedule(started)
    fewer = compose([*WORDS, "scaling.num_workers=1", "data.labeled=0.5"])  # other data, by --force
    assert run_schedule(fewer) != began == directory.recorded_schedule(tmp_path, fewer)
    given = compose([*WORDS, "scaling.num_workers=1", f"optim.lr={began.lr!r}"])  # the rate that the run has already
    assert directory.recorded_schedule(tmp_path, given) == began
    slower = compose([*WORDS, "scaling.num_workers=1", "optim.lr=0.002"])
    assert directory.recorded_schedule(tmp_path, slower) == run_schedule(slower) != began


def test_the_checkpoint_of_the_last_evaluation_without_scores_is_found(started, tmp_path):
    schedule, rows = run_schedule(started), []

    def unscored(step):
        folder = checkpoint_folder(tmp_path, step)
        found = directory.find_unscored_checkpoint(tmp_path, folder, rows, started, schedule)
        return None if found is None else int(found.name[5:])

    for step in (3, 4, 5, 8):
        made = state_of()
        made.step = step
        made.save(checkpoint_folder(tmp_path, step))
    assert directory.find_unscored_checkpoint(tmp_path, None, rows, started, schedule) is None
    assert [unscored(step) for step in (3, 4, 5, 8)] == [None, 4, 4, 8]
    rows = [{"step": 4, "teacher/segm_AP": None}]
    assert unscored(5) == 4, "the score of the student is missing"
    rows.append({"step": 4, "student/segm_AP": 0.1})
    assert [unscored(step) for step in (4, 5, 8)] == [None, None, 8]
    rows.clear()
    (checkpoint_folder(tmp_path, 4) / "student.safetensors").unlink()
    assert unscored(5) is None, "there are no weights to evaluate"


def test_a_lowered_limit_of_pseudo_labels_holds_for_later_starts_but_not_for_a_new_run(started, tiny_coco, tmp_path):
    paths = (f"data.train={tiny_coco}/train.json", f"data.val={tiny_coco}/val.json", f"data.images={tiny_coco}/images")
    config, data = prepare(compose([*WORDS, *paths, "data.labeled=0.5"]))
    directory.write_pseudo_label_limit(tmp_path, 6)
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.read_pseudo_label_limit(tmp_path, 100) == 6
    checkpoint_folder(tmp_path, 4).rmdir()
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.read_pseudo_label_limit(tmp_path, 100) == 100


def test_a_resumed_run_with_other_settings_is_refused_with_both_values(tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump(compose(["quickstart"])))
    changed = compose(["quickstart", "train.seed=3"])
    with pytest.raises(ConfigError, match=r"different values of train\.seed \(0, now 3\); restore"):
        directory.check_resume(tmp_path, changed, force=False)
    directory.check_resume(tmp_path, changed, force=True)
