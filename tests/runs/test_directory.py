"""Laws of a run directory: one driver at a time, free again however the driver ends; what is kept over starts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import compose, dump, run_schedule
from pais_ray.runs import directory, lock
from pais_ray.runs.checkpoints import best_checkpoint, checkpoint_folder, checkpoints
from pais_ray.runs.lock import lock_run
from pais_ray.runs.prepare import prepare
from pais_ray.train import errors
from pais_ray.train.driver import resources
from pais_ray.train.worker import loop
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
    monkeypatch.setattr(lock, "LOCK_S", 0.0)
    words = rf"in the hands of another process \(pid {other.pid} on .* since 20"
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
    assert run_schedule(fewer) != began == directory.kept_schedule(tmp_path, fewer)
    given = compose([*WORDS, "scaling.num_workers=1", f"optim.lr={began.lr!r}"])  # the rate that the run has already
    assert directory.kept_schedule(tmp_path, given) == began
    slower = compose([*WORDS, "scaling.num_workers=1", "optim.lr=0.002"])
    assert directory.kept_schedule(tmp_path, slower) == run_schedule(slower) != began


def test_an_evaluation_is_owed_whose_scores_no_start_has_lived_to_see(begun, tmp_path):
    schedule, rows = run_schedule(begun), []

    def owed(step):
        folder = checkpoint_folder(tmp_path, step)
        found = directory.evaluation_owed(tmp_path, folder, rows, begun, schedule)
        return None if found is None else int(found.name[5:])

    for step in (3, 4, 5, 8):
        made = state_of()
        made.step = step
        made.save(checkpoint_folder(tmp_path, step))
    assert directory.evaluation_owed(tmp_path, None, rows, begun, schedule) is None
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
    (tmp_path / directory.CAP_FILE).write_text('{"cap": 6}')
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.kept_cap(tmp_path, 100) == 6
    checkpoint_folder(tmp_path, 4).rmdir()
    directory.write_run_directory(tmp_path, config, data, run_schedule(config))
    assert directory.kept_cap(tmp_path, 100) == 100


def test_a_cluster_that_was_joined_may_grow(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})  # a head that takes no work, no nodes yet
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    config = compose([*WORDS, "scaling.use_gpu=true"])
    assert resources.worker_resources(config, is_own_cluster=False) == (1.0, 1)
    with pytest.raises(ConfigError, match="and 0 of 2 GPUs"):
        resources.worker_resources(config, is_own_cluster=True)


def rank_of(root, best=None):
    """Rank 0 of a run at ``root``, without what trains."""
    rank = loop.Worker.__new__(loop.Worker)
    rank.job, rank.rank, rank.world, rank.device = SimpleNamespace(root=root), 0, 1, None
    rank.scoring = []
    state = SimpleNamespace(step=9, g_next=18, skipped=3, skipped_in_row=3, rollbacks=0, cap=100, best=best or {})
    state.note_score = lambda role, step, ap: state.best.update({role: {"segm_AP": ap, "step": step}})
    rank.state = state
    return rank


def test_scores_of_weights_that_were_not_written_are_no_best(tmp_path):
    checkpoint_folder(tmp_path, 4).mkdir(parents=True)
    rank = rank_of(tmp_path)
    rank.note_scores([{"step": 4, "teacher/segm_AP": 0.2}, {"step": 8, "teacher/segm_AP": 0.9}])
    assert rank.state.best["teacher"] == {"segm_AP": 0.2, "step": 4}


def test_a_roll_back_leaves_no_newer_checkpoint_to_restart_from(tmp_path, monkeypatch):
    for step in (4, 9):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    sound = checkpoint_folder(tmp_path, 4)
    monkeypatch.setattr(loop, "sound_checkpoint", lambda root: sound)
    rows = ({"step": step, "teacher/segm_AP": step / 10} for step in (4, 8))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rank = rank_of(tmp_path)
    rank.config = compose([*WORDS, "guards.max_rollbacks=2"])
    rank.writer, rank.log = SimpleNamespace(flush=lambda: None), None

    def load(folder):
        rank.state.step = int(folder.name[5:])

    rank.state.load = load
    rank.roll_back("not finite", "lower optim.lr")
    assert checkpoints(tmp_path) == [sound]
    assert rank.state.best["teacher"]["step"] == 4
    assert (rank.state.step, rank.state.g_next, rank.state.skipped_in_row, rank.state.rollbacks) == (4, 18, 0, 1)


def test_scores_that_cannot_be_computed_end_a_run_only_at_its_end(tmp_path, monkeypatch):
    """Storage that does not answer the scoring task, say; the same command then makes up for the last ones."""

    def lost(task):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(loop.ray, "get", lost)
    rank, told = rank_of(tmp_path), []
    rank.job.schedule = SimpleNamespace(steps=20)
    rank.heart = SimpleNamespace(within=lambda stage: contextlib.nullcontext())
    rank.guards = SimpleNamespace(teacher=lambda teacher, student: None)
    rank.log, rank.writer = SimpleNamespace(), SimpleNamespace()
    rank.tell = lambda text, fields: told.append(fields)
    rank.scoring = [(8, "teacher", "reference"), (8, "student", "reference")]
    rank.collect_scores(up_to=9)
    assert [(row["event"], row["at"]) for row in told] == [("scoring_failed", 8)] * 2
    assert rank.scoring == []
    rank.scoring = [(20, "teacher", "reference")]
    with pytest.raises(errors.TrainingEnded, match="Stale file handle; give the same command again"):
        rank.collect_scores(up_to=20)


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
