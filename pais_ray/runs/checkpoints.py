"""Checkpoint directories: written whole or not at all, verified before use, the damaged ones passed over.

A directory is written aside and renamed, its manifest (digests of the other files) last: what has a manifest that
fits is whole. The newest one that verifies is the one to resume from. A `Writer` does it beside the training,
tries again where storage fails, and never stops a run before its end.
"""

import errno
import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pais_ray.files.json_lines import metric_rows

FORMAT = 3  # of the directory; a reader refuses what is newer

# What the state of an older format lacks. 1: before roll-backs and the cap on pseudo-labels.
MIGRATIONS: dict[int, dict[str, Any]] = {1: {"rollbacks": 0}, 2: {}}

MANIFEST = "manifest.json"

TRIES = 5  # at one checkpoint; with the pauses about half a minute, longer than a server's restart

PAUSE_S = 1.0  # before the second try; doubled before each further one

FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong with it and what to do."""


class StorageLostError(RuntimeError):
    """The last checkpoint of a run could not be written."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A TrainState at one step, on the CPU: what a checkpoint directory will hold."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file name without suffix -> its tensors
    state: dict[str, Any]  # the content of state.json
    unscored_steps: frozenset[int] = frozenset()  # steps whose scores are under way: one of them may be the best

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in self.tensors.values() for t in part.values())


def write(snapshot: Snapshot, folder: Path) -> None:
    """Writes the checkpoint ``folder``, whole or not at all."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.parent.mkdir(exist_ok=True)  # no further up: where storage is gone it would be made on another disk
        aside.mkdir()
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, **snapshot.state}, indent=1))
        names = sorted(p.name for p in aside.iterdir())
        for name in names:  # retention deletes older ones next: this one has to outlive a power cut
            _fsync(aside / name)
        write_manifest(aside, names, {})
        _fsync(aside)
        if folder.exists():  # left over by a run that was killed after writing it: same content, written again
            shutil.rmtree(folder)
        os.replace(aside, folder)
        _fsync(folder.parent)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk the half of it would take what others need
        raise


class CheckpointWriter:
    """Writes one checkpoint after the other in a thread of its own.

    A failure is retried, told through ``tell`` (text, fields of the event) and then left: the next checkpoint is
    a new chance. At most one waits while another is written; a third makes ``submit`` wait, which bounds memory.
    """

    def __init__(self, root: Path, keep: int, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self.root, self.keep, self.on_event = root, keep, on_event
        self.waiting: queue.Queue[Snapshot | None] = queue.Queue(maxsize=1)
        self.failed: str | None = None  # why the newest snapshot is not on the disk
        self.written: list[int] = []  # steps
        self.thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self.thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        self.waiting.put(snapshot)

    def flush(self) -> None:
        """Waits until all that was submitted is written or given up."""
        self.waiting.join()

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (snapshot := self.waiting.get()) is not None:
            try:
                self.failed = self._store(snapshot)
            finally:
                del snapshot  # until the next one it would take as much memory as the state
                self.waiting.task_done()
        self.waiting.task_done()

    def _store(self, snapshot: Snapshot) -> str | None:
        folder = checkpoint_folder(self.root, snapshot.step)
        reason = ""
        for attempt in range(TRIES):
            try:
                write(snapshot, folder)
            except Exception as error:  # OSError, or safetensors' own
                reason = describe_write_error(folder, snapshot.nbytes, error)
                self.on_event(f"{reason} (try {attempt + 1} of {TRIES})", {"event": "checkpoint_retry"})
                if attempt + 1 < TRIES:
                    time.sleep(PAUSE_S * 2**attempt)
                continue
            self.written.append(snapshot.step)
            protected_steps = snapshot.unscored_steps | {int(best["step"]) for best in snapshot.state["best"].values()}
            try:
                delete_old_checkpoints(self.root, self.keep, protected_steps, snapshot.step)
            except OSError as error:
                self.on_event(f"old checkpoints could not be looked through ({error})", {"event": "retention_failed"})
            return None
        self.on_event(f"{reason}; training goes on without it", {"event": "checkpoint_failed", "at": snapshot.step})
        return reason


def describe_write_error(path: Path, need: int, error: Exception) -> str:
    """One line: the path, what was needed, what to do."""
    mib = need / 2**20
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL or "No space left" in str(error):
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f}"
        except OSError:
            free = "?"
        return f"{path}: no space: {mib:.0f} MiB are needed and {free} are free; make room, or keep fewer checkpoints"
    if code == errno.EROFS:
        return f"{path}: the file system is read-only; {mib:.0f} MiB are to be written, mount it writable"
    return f"{path}: could not be written ({error}); {mib:.0f} MiB are needed, see that the storage is there"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps of the run at ``root`` lies."""
    return root / "checkpoints" / f"step_{step:08d}"


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file is there with the size and digest its manifest states."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT and manifest["format"] not in MIGRATIONS:
            raise CheckpointError(
                f"{folder}: checkpoint format {manifest['format']}, this version reads up to {FORMAT}; "
                "use the version that wrote it"
            )
        for name, facts in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path}: differs from its manifest; the file is damaged, use another checkpoint")
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # no JSON, no UTF-8, another shape
        raise CheckpointError(f"{folder}: not a whole checkpoint ({error}); use another one") from error


def write_manifest(folder: Path, names: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """States ``facts``, and size and digest of the files ``names`` of ``folder``; what ``verify`` reads."""
    files = {n: {"sha256": _sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in names}
    manifest = {"format": FORMAT, **facts, "files": files}
    _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with what its older format lacks."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return {**MIGRATIONS.get(state["format"], {}), **state}


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of the run at ``root``, and what was wrong with each newer one."""
    refused: list[str] = []
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        return folder, refused
    return None, refused


def find_rollback_target(root: Path) -> Path | None:
    """The newest good checkpoint that was not made amid steps without a usable loss: those hold the weights that
    fail."""
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError:
            continue
        if read_state(folder)["skipped_in_row"] == 0:
            return folder
    return None


def find_resumable_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """As ``newest_verified``; CheckpointError where there are checkpoints and none can be used."""
    folder, refused = newest_verified(root)
    if folder is None and refused:
        raise CheckpointError(
            f"{root}: no usable checkpoint: {'; '.join(refused)}. Move {root / 'checkpoints'} away to start anew, "
            "or choose another run.name"
        )
    return folder, refused


def best_checkpoint(root: Path, newest: Path, role: str) -> Path | None:
    """The checkpoint of the highest segm AP of ``role``: what ``newest`` knows, and the scores logged since it was
    written, of those that are there. None before the first evaluation."""
    state = read_state(newest)
    best = state["best"].get(role, {"segm_AP": -1.0, "step": None})
    step, highest = best["step"], best["segm_AP"]
    for row in metric_rows(root, state["step"]):
        ap = row.get(f"{role}/segm_AP")
        if ap is not None and ap > highest and has_checkpoint(root, row["step"]):
            step, highest = row["step"], ap
    return None if step is None else checkpoint_folder(root, int(step))


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories of the run at ``root``, oldest first, unverified."""
    return sorted((root / "checkpoints").glob("step_*"))


def delete_old_checkpoints(root: Path, keep: int, protected_steps: Collection[int], step: int) -> None:
    """Deletes all but the last ``keep`` checkpoints until ``step`` and those of the steps ``treasured``. Later ones are
    not this run's any more: they were passed over as damaged, and are written again."""
    kept = {checkpoint_folder(root, t) for t in protected_steps}
    made = [c for c in checkpoints(root) if c <= checkpoint_folder(root, step)]
    for folder in made[:-keep]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def has_checkpoint(root: Path, step: int) -> bool:
    """Whether the checkpoint of ``step`` lies in storage; where storage does not answer, it does not."""
    try:
        return checkpoint_folder(root, step).is_dir()
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


ROLES = ("teacher", "student")


def load_segmentor(segmentor: nn.Module, folder: Path, role: str) -> None:
    """Loads one role's weights (``teacher`` or ``student``) of a checkpoint into ``segmentor``."""
    verify(folder)
    _load_weights(segmentor, folder / f"{role}.safetensors")


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()}); "
            "resume with the segmentor settings of the run's config.yaml"
        ) from error
