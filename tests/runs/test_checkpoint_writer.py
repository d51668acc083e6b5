"""The checkpoint writer: failures of storage are reported and retried, and never end training."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch

from pais_ray.runs import checkpoint_writer
from pais_ray.runs.checkpoint_writer import ATTEMPTS, CheckpointWriter
from pais_ray.runs.checkpoints import Snapshot, checkpoint_folder, checkpoints, newest_verified


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A writer of ``tmp_path`` that keeps all checkpoints, with its events as (event, text) in ``events``."""
    monkeypatch.setattr(checkpoint_writer, "PAUSE_S", 0.001)
    events = []
    writer = CheckpointWriter(tmp_path, 9, lambda text, fields: events.append((fields["event"], text)))
    writer.events = events
    yield writer
    writer.close()


def snapshot(step, best=(), unscored_steps=()):
    """A snapshot of 2 MiB; ``best`` are the steps of the best scores."""
    return Snapshot(
        step=step,
        tensors={"student": {"weight": torch.full((2**19,), float(step))}},
        state={"step": step, "best": {f"role {s}": {"segm_AP": 0.5, "step": s} for s in best}},
        unscored_steps=frozenset(unscored_steps),
    )


def write(writer, *snapshots):
    for item in snapshots:
        writer.submit(item)
    writer.flush()


def steps_of(root):
    return [int(p.name.split("_")[1]) for p in checkpoints(root)]


def test_snapshots_are_written_in_order_and_old_ones_deleted(writer, tmp_path):
    writer.keep = 2
    write(writer, snapshot(1), snapshot(2), snapshot(3))
    assert writer.written == [1, 2, 3]
    assert newest_verified(tmp_path) == (checkpoint_folder(tmp_path, 3), [])
    assert steps_of(tmp_path) == [2, 3]
    assert writer.events == []


def test_the_best_checkpoint_and_those_with_pending_scores_are_kept(writer, tmp_path):
    """One whose evaluation is being scored may turn out to be the best."""
    writer.keep = 1
    write(writer, snapshot(1), snapshot(2, unscored_steps={1}))
    assert steps_of(tmp_path) == [1, 2]
    write(writer, snapshot(3, best=[1]))
    assert steps_of(tmp_path) == [1, 3]
    write(writer, snapshot(4))
    assert steps_of(tmp_path) == [4]


def test_an_error_while_old_checkpoints_are_listed_is_reported_and_not_fatal(writer, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "delete_old_checkpoints", stale)
        write(writer, snapshot(1))
    write(writer, snapshot(2))
    assert (writer.failed, writer.written) == (None, [1, 2])
    assert [event for event, _ in writer.events] == ["retention_failed"]


def test_a_temporary_failure_of_storage_is_retried(tmp_path, monkeypatch):
    """A file is in the place of the directory of checkpoints until the second attempt has failed."""
    monkeypatch.setattr(checkpoint_writer, "PAUSE_S", 0.001)
    (tmp_path / "checkpoints").write_text("in the way")
    texts = []

    def on_event(text, fields):
        texts.append(text)
        if len(texts) == 2:
            (tmp_path / "checkpoints").unlink()

    writer = CheckpointWriter(tmp_path, 9, on_event)
    write(writer, snapshot(4))
    writer.close()
    assert writer.failed is None
    assert len(texts) == 2
    assert "step_00000004" in texts[0]
    assert "2 MiB are needed" in texts[0]
    assert f"(attempt 1 of {ATTEMPTS})" in texts[0]
    assert newest_verified(tmp_path)[0] == checkpoint_folder(tmp_path, 4)


def test_a_permanent_failure_of_storage_costs_only_that_checkpoint(writer, tmp_path):
    write(writer, snapshot(1))
    shutil.move(tmp_path / "checkpoints", tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("in the way")
    write(writer, snapshot(2))
    assert "step_00000002" in writer.failed
    assert [event for event, _ in writer.events] == ["checkpoint_retry"] * ATTEMPTS + ["checkpoint_failed"]
    (tmp_path / "checkpoints").unlink()
    shutil.move(tmp_path / "aside", tmp_path / "checkpoints")
    write(writer, snapshot(3))
    assert writer.failed is None
    assert writer.written == [1, 3]


FULL_DISK = """
import sys
from pathlib import Path
from pais_ray.runs import checkpoint_writer
from tests.runs.test_checkpoint_writer import snapshot
checkpoint_writer.PAUSE_S = 0.001
root = Path(sys.argv[1])
(root / "ballast").write_bytes(b"x" * (root.stat().st_blksize * 10))
writer = checkpoint_writer.CheckpointWriter(root, 1, lambda text, fields: print(fields["event"], text))
writer.submit(snapshot(1))
writer.flush()
print(sorted(p.name for p in (root / "checkpoints").glob("*")))
sys.exit(writer.failed is None)
"""


def test_a_full_disk_is_reported_with_the_needed_space_and_no_partial_checkpoint_remains(tmp_path):
    """On a real file system of 256 KiB, in its own mount namespace."""
    script = f'mount -t tmpfs -o size=256k tmpfs "$1" && exec {sys.executable} -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        if os.environ.get("PAIS_RAY_CI"):
            pytest.fail(f"a mount namespace is needed: {done.stderr}")
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "no space left: 2 MiB are needed and 0 MiB are free" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_read_only_file_system_is_named(tmp_path):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "read-only, and 3 MiB must be written" in checkpoint_writer.describe_write_error(tmp_path, 3 * 2**20, error)
