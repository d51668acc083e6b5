"""Write checkpoints in a background thread while training continues."""

import errno
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pais_ray.runs.checkpoints import Snapshot, checkpoint_folder, delete_old_checkpoints, write_checkpoint

ATTEMPTS = 5  # per checkpoint; with the pauses they take about half a minute, longer than a restart of a file server
PAUSE_S = 1.0  # before the second attempt; doubled before each further one
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """Writes snapshots in the order of submission, and deletes old checkpoints.

    A failed write is retried. If all attempts fail, training continues, and the next snapshot is written instead. At
    most one snapshot waits while another is written: ``submit`` blocks on a third one, which bounds the memory.
    ``on_event`` receives the text and the fields of events, in the thread of the writer.
    """

    def __init__(self, root: Path, keep: int, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self.root, self.keep, self.on_event = root, keep, on_event
        self.waiting: queue.Queue[Snapshot | None] = queue.Queue(maxsize=1)
        self.failed: str | None = None  # why the newest snapshot was not written
        self.written: list[int] = []  # steps
        self.thread = threading.Thread(target=self._write_snapshots, name="checkpoints", daemon=True)
        self.thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        self.waiting.put(snapshot)

    def flush(self) -> None:
        """Wait until all submitted snapshots are written or have failed."""
        self.waiting.join()

    def close(self) -> None:
        """Write what was submitted and end the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _write_snapshots(self) -> None:
        while (snapshot := self.waiting.get()) is not None:
            try:
                self.failed = self._write(snapshot)
            finally:
                del snapshot  # else it would occupy as much memory as the state until the next one arrives
                self.waiting.task_done()
        self.waiting.task_done()

    def _write(self, snapshot: Snapshot) -> str | None:
        """Write one snapshot; return why it could not be written."""
        folder = checkpoint_folder(self.root, snapshot.step)
        reason = ""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                write_checkpoint(snapshot, folder)
            except Exception as error:  # OSError, or an error of safetensors
                reason = describe_write_error(folder, snapshot.nbytes, error)
                self.on_event(f"{reason} (attempt {attempt} of {ATTEMPTS})", {"event": "checkpoint_retry"})
                if attempt < ATTEMPTS:
                    time.sleep(PAUSE_S * 2 ** (attempt - 1))
                continue
            self.written.append(snapshot.step)
            self._delete_old(snapshot)
            return None
        self.on_event(f"{reason}; training continues without it", {"event": "checkpoint_failed", "at": snapshot.step})
        return reason

    def _delete_old(self, snapshot: Snapshot) -> None:
        best_steps = {int(best["step"]) for best in snapshot.state["best"].values()}
        try:
            delete_old_checkpoints(self.root, self.keep, best_steps | snapshot.unscored_steps, snapshot.step)
        except OSError as error:
            self.on_event(f"old checkpoints could not be listed ({error})", {"event": "retention_failed"})


def describe_write_error(path: Path, size: int, error: Exception) -> str:
    """One line with the path, the ``size`` in bytes that must be written, and the remedy."""
    mib = size / 2**20
    code = error.errno if isinstance(error, OSError) else None
    if code in DISK_FULL or "No space left" in str(error):  # safetensors raises its own error
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f}"
        except OSError:
            free = "?"
        return (
            f"{path}: no space left: {mib:.0f} MiB are needed and {free} MiB are free; free disk space or lower "
            "train.keep_checkpoints"
        )
    if code == errno.EROFS:
        return f"{path}: the file system is read-only, and {mib:.0f} MiB must be written; mount it writable"
    return f"{path}: could not be written ({error}); {mib:.0f} MiB are needed; check that the storage is available"
