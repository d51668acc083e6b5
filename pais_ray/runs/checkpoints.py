"""Checkpoint directories: written atomically, verified before use.

A checkpoint is written to a hidden directory, which is renamed at the end. Its manifest, the digests of the other
files, is written last. A run resumes from the newest checkpoint that verifies.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pais_ray.files.json_lines import metric_rows

FORMAT = 3  # of the directory; older versions refuse newer formats
# What the states of earlier formats lack. Format 1 is older than rollbacks; until format 2 there was a `cap`, which is
# ignored: the limit of pseudo-labels is in the run directory.
MIGRATIONS: dict[int, dict[str, Any]] = {1: {"rollbacks": 0}, 2: {}}
MANIFEST = "manifest.json"
ROLES = ("teacher", "student")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message has the reason and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of a TrainState on the CPU: the contents of a checkpoint directory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file name without suffix -> its tensors
    state: dict[str, Any]  # the contents of state.json
    unscored_steps: frozenset[int] = frozenset()  # steps whose scores are being computed: one may be the best

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in self.tensors.values() for t in part.values())


def write_checkpoint(snapshot: Snapshot, folder: Path) -> None:
    """Write the checkpoint ``folder`` atomically. Raises OSError and errors of safetensors."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Without parents: if the storage is gone, they would be created on another disk.
        folder.parent.mkdir(exist_ok=True)
        partial.mkdir()
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, **snapshot.state}, indent=1))
        names = sorted(p.name for p in partial.iterdir())
        for name in names:  # older checkpoints are deleted next, so this one must survive a power failure
            _fsync(partial / name)
        write_manifest(partial, names, {})
        _fsync(partial)
        if folder.exists():  # written by a run that was killed afterwards, with the same contents
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _fsync(folder.parent)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would take the space that others need
        raise


def write_manifest(folder: Path, names: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest that ``verify`` reads: ``facts``, and size and digest of the files ``names`` of ``folder``."""
    files = {n: {"sha256": _sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in names}
    manifest = {"format": FORMAT, **facts, "files": files}
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())
    return manifest


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file exists with the size and the digest in the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT and manifest["format"] not in MIGRATIONS:
            raise CheckpointError(
                f"{folder}: expected checkpoint format {FORMAT} or older, got {manifest['format']}; "
                "use the version that wrote it"
            )
        for name, facts in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path}: does not match its manifest, so it is damaged; use another checkpoint")
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # missing, no JSON, another structure
        raise CheckpointError(f"{folder}: incomplete checkpoint ({error}); use another one") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json in the present format."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return {**MIGRATIONS.get(state["format"], {}), **state}


def checkpoint_folder(root: Path, step: int) -> Path:
    """Path of the checkpoint of ``step`` in the run directory ``root``."""
    return root / "checkpoints" / f"step_{step:08d}"


def has_checkpoint(root: Path, step: int) -> bool:
    """Whether the checkpoint of ``step`` exists; False if the storage does not answer."""
    try:
        return checkpoint_folder(root, step).is_dir()
    except OSError:
        return False


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints of the run directory ``root``, oldest first, not verified."""
    return sorted((root / "checkpoints").glob("step_*"))


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one does not."""
    failures: list[str] = []
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        return folder, failures
    return None, failures


def find_resumable_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """As ``newest_verified``. Raises CheckpointError if there are checkpoints and none can be used."""
    folder, failures = newest_verified(root)
    if folder is None and failures:
        raise CheckpointError(
            f"{root}: no usable checkpoint: {'; '.join(failures)}. Move {root / 'checkpoints'} away to start from "
            "scratch, or choose another run.name"
        )
    return folder, failures


def find_rollback_target(root: Path) -> Path | None:
    """The newest verified checkpoint that was not written between skipped steps, whose weights may be at fault."""
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError:
            continue
        if read_state(folder)["skipped_in_row"] == 0:
            return folder
    return None


def best_checkpoint(root: Path, newest: Path, role: str) -> Path | None:
    """The existing checkpoint with the highest segm AP of ``role``; None before the first evaluation.

    Considers the scores in the checkpoint ``newest`` and those logged until its step after it had been written.
    """
    state = read_state(newest)
    best = state["best"].get(role, {"segm_AP": -1.0, "step": None})
    step, highest = best["step"], best["segm_AP"]
    for row in metric_rows(root, state["step"]):
        ap = row.get(f"{role}/segm_AP")
        if ap is not None and ap > highest and has_checkpoint(root, row["step"]):
            step, highest = row["step"], ap
    return None if step is None else checkpoint_folder(root, int(step))


def delete_old_checkpoints(root: Path, keep: int, protected_steps: Collection[int], step: int) -> None:
    """Delete the checkpoints until ``step``, except the last ``keep`` and those of ``protected_steps``.

    Later ones are left: they were skipped as damaged, and the run will write them again.
    """
    protected = {checkpoint_folder(root, s) for s in protected_steps}
    present = [c for c in checkpoints(root) if c <= checkpoint_folder(root, step)]
    for folder in present[:-keep]:
        if folder not in protected:
            shutil.rmtree(folder, ignore_errors=True)


def load_segmentor(segmentor: nn.Module, folder: Path, role: str) -> None:
    """Verify the checkpoint ``folder`` and load the weights of one role (``teacher`` or ``student``)."""
    verify(folder)
    load_weights(segmentor, folder / f"{role}.safetensors")


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file of weights. Raises CheckpointError if it does not fit the module."""
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()}); "
            "use the segmentor settings of the run's config.yaml"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
