"""Laws of the checkpoint writer: training goes on whatever storage does, and what was wrong is said."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys

import pytest

from pais_ray.runs import checkpoints
from pais_ray.runs.checkpoints import CheckpointWriter, checkpoint_folder, newest_verified
from tests.support.tiny import state_of


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(checkpoints, "PAUSE_S", 0.001)
    return []


def writer_of(root, told, keep=9):
    return CheckpointWriter(root, keep, lambda text, fields: told.append((fields["event"], text)))


def snapshot(step):
    state = state_of()
    state.step = step
    return state.snapshot()


def test_what_was_submitted_is_there_in_order_and_verified(tmp_path, told):
    writer = writer_of(tmp_path, told, keep=2)
    for step in (1, 2, 3):
        writer.submit(snapshot(step))
    writer.flush()
    assert writer.written == [1, 2, 3]
    assert newest_verified(tmp_path) == (checkpoint_folder(tmp_path, 3), [])
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000002", "step_00000003"]
    assert told == []
    writer.close()


def test_a_checkpoint_whose_scores_are_under_way_and_the_best_outlive_retention(tmp_path, told):
    """One of an evaluation that is still being scored may turn out to be the best."""
    writer = writer_of(tmp_path, told, keep=1)
    writer.submit(snapshot(1))
    writer.submit(dataclasses.replace(snapshot(2), unscored_steps=frozenset({1})))
    best = snapshot(3)
    best.state["best"] = {"teacher": {"segm_AP": 0.5, "step": 1}}
    writer.submit(best)
    writer.flush()
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    writer.submit(snapshot(4))
    writer.flush()
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["step_00000004"]
    writer.close()


def test_old_checkpoints_that_cannot_be_looked_through_end_nothing(tmp_path, told, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    writer = writer_of(tmp_path, told)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "retain", stale)
        writer.submit(snapshot(1))
        writer.flush()
    writer.submit(snapshot(2))
    writer.flush()
    assert (writer.failed, writer.written) == (None, [1, 2])
    assert [event for event, _ in told] == ["retention_failed"]
    writer.close()


def test_a_snapshot_is_the_state_when_it_was_taken(tmp_path, told):
    state = state_of()
    taken = state.snapshot()
    with __import__("torch").no_grad():
        for parameter in state.student.parameters():
            parameter.zero_()
    checkpoints.write(taken, tmp_path / "step_0")
    fresh = state_of(seed=3)
    fresh.load(tmp_path / "step_0")
    assert any(p.any() for p in fresh.student.parameters())


def test_storage_that_fails_for_a_while_is_tried_again(tmp_path, told, monkeypatch):
    """The folder of the checkpoints is a file until it is not."""
    (tmp_path / "checkpoints").write_text("in the way")
    tries = []

    def on_event(text, fields):
        tries.append(text)
        if len(tries) == 2:
            (tmp_path / "checkpoints").unlink()

    writer = CheckpointWriter(tmp_path, 9, on_event)
    writer.submit(snapshot(4))
    writer.flush()
    assert writer.failed is None
    assert len(tries) == 2
    assert "step_00000004" in tries[0]
    assert "MiB are needed" in tries[0]
    assert newest_verified(tmp_path)[0] == checkpoint_folder(tmp_path, 4)
    writer.close()


def test_storage_that_is_gone_for_good_costs_that_checkpoint_and_no_more(tmp_path, told):
    writer = writer_of(tmp_path, told)
    writer.submit(snapshot(1))
    writer.flush()
    shutil.move(tmp_path / "checkpoints", tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("in the way")
    writer.submit(snapshot(2))
    writer.flush()
    assert "step_00000002" in writer.failed
    assert [event for event, _ in told] == ["checkpoint_retry"] * checkpoints.TRIES + ["checkpoint_failed"]
    (tmp_path / "checkpoints").unlink()
    shutil.move(tmp_path / "aside", tmp_path / "checkpoints")
    writer.submit(snapshot(3))
    writer.flush()
    assert writer.failed is None
    assert writer.written == [1, 3]
    writer.close()


FULL = """
import sys
from pathlib import Path
from pais_ray.runs import checkpoints
from tests.support.tiny import state_of
checkpoints.PAUSE_S = 0.001
root = Path(sys.argv[1])
(root / "ballast").write_bytes(b"x" * (root.stat().st_blksize * 10))
writer = checkpoints.Writer(root, 1, lambda text, fields: print(fields["event"], text))
writer.submit(state_of().snapshot())
writer.flush()
print(sorted(p.name for p in (root / "checkpoints").glob("*")))
sys.exit(writer.failed is None)
"""


def test_a_full_disk_is_named_with_the_need_and_nothing_is_left_of_the_try(tmp_path):
    """A real file system of 256 KiB, in a mount namespace of its own."""
    script = f'mount -t tmpfs -o size=256k tmpfs "$1" && exec {sys.executable} -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        if os.environ.get("PAIS_RAY_CI"):
            pytest.fail(f"a mount namespace is needed: {done.stderr}")
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "no space: " in done.stdout
    assert "MiB are needed and 0 are free" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_words_for_a_read_only_file_system(tmp_path):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "read-only; 3 MiB" in checkpoints.describe_write_error(tmp_path, 3 * 2**20, error)
