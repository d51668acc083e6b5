"""TrainState: everything a run must remember, to and from a directory of safetensors and JSON, no pickle.

A checkpoint directory is written aside and renamed, its manifest (digests of the other files) last, so what has
a manifest that fits is whole. The newest checkpoint that verifies is the one to resume from.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pais_ray import plugins
from pais_ray.config import Config
from pais_ray.optim import Schedule, build_optimizer

FORMAT = 1  # of the directory; a reader refuses what it does not know
MANIFEST = "manifest.json"


ROLES = ("teacher", "student")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong with it and what to do."""


class Teacher(nn.Module):
    """A frozen copy of a segmentor that never enters train mode."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.segmentor = copy.deepcopy(student).float().requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def predict(self, images: Any, score_threshold: float | None = None) -> Any:
        return self.segmentor.predict(images, score_threshold=score_threshold)  # type: ignore[operator]


@dataclass(kw_only=True)
class TrainState:
    """Student, teacher, optimizer, scaler and counters of one run. The schedule is a pure function of ``step``."""

    student: nn.Module
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimiser steps made
    g_next: int = 0  # the next global row; independent of the number of workers
    skipped: int = 0
    skipped_in_row: int = 0
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # role -> {"segm_AP": ..., "step": ...}

    def note_score(self, role: str, step: int, ap: float | None) -> bool:
        """Takes up the segm AP of ``role`` at ``step``; True where it is the best so far."""
        if ap is None or ap <= self.best.get(role, {"segm_AP": -1.0})["segm_AP"]:
            return False
        self.best[role] = {"segm_AP": ap, "step": step}
        return True

    def save(self, folder: Path) -> None:
        """Writes the checkpoint ``folder``, whole or not at all."""
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors, scalars = _split_optimizer(self.optimizer)
        save_file(_plain(self.student.state_dict()), aside / "student.safetensors")
        save_file(_plain(self.teacher.segmentor.state_dict()), aside / "teacher.safetensors")
        save_file(tensors, aside / "optimizer.safetensors")
        save_file(_rng_state(), aside / "rng.safetensors")
        state = {
            "format": FORMAT,
            "step": self.step,
            "g_next": self.g_next,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
            "optimizer": scalars,
        }
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        write_manifest(aside, sorted(p.name for p in aside.iterdir()), {})
        if folder.exists():  # left over by a run that was killed after writing it: same content, written again
            shutil.rmtree(folder)
        os.replace(aside, folder)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote. Raises CheckpointError when the weights do not fit this model."""
        state = json.loads((folder / "state.json").read_text())
        _load_weights(self.student, folder / "student.safetensors")
        _load_weights(self.teacher.segmentor, folder / "teacher.safetensors")
        _join_optimizer(self.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.g_next = state["step"], state["g_next"]
        self.skipped, self.skipped_in_row, self.best = (
            state["skipped"],
            state["skipped_in_row"],
            state["best"],
        )
        _restore_rng(load_file(folder / "rng.safetensors"))


def build_state(
    config: Config, schedule: Schedule, num_classes: int, device: torch.device | str, pretrained: bool = True
) -> TrainState:
    """A fresh TrainState, the same on every rank: the seed is the run's. ``pretrained`` False leaves
    segmentor.weights unread, for a checkpoint that is about to replace them."""
    torch.manual_seed(config.train.seed)
    student = plugins.segmentor(config.segmentor.name)(num_classes, config.segmentor, pretrained=pretrained)
    student.to(device).train()
    optimizer = build_optimizer(student.named_parameters(), config.optim, schedule)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.train.precision == "fp16")
    return TrainState(student=student, teacher=Teacher(student).to(device), optimizer=optimizer, scaler=scaler)


def load_segmentor(segmentor: nn.Module, folder: Path, role: str) -> None:
    """Loads one role's weights (``teacher`` or ``student``) of a checkpoint into ``segmentor``."""
    verify(folder)
    _load_weights(segmentor, folder / f"{role}.safetensors")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps of the run at ``root`` lies."""
    return root / "checkpoints" / f"step_{step:08d}"


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file is there with the size and digest its manifest states."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        for name, facts in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path}: differs from its manifest; the file is damaged, use another checkpoint")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({error}); use another one") from error


def write_manifest(folder: Path, names: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """States ``facts``, and size and digest of the files ``names`` of ``folder``; what ``verify`` reads."""
    files = {n: {"sha256": _sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in names}
    manifest = {"format": FORMAT, **facts, "files": files}
    _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


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


def usable_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """As ``newest_verified``; CheckpointError where there are checkpoints and none can be used."""
    folder, refused = newest_verified(root)
    if folder is None and refused:
        raise CheckpointError(
            f"{root}: no usable checkpoint: {'; '.join(refused)}. Move {root / 'checkpoints'} away to start anew, "
            "or choose another run.name"
        )
    return folder, refused


def metric_rows(root: Path, up_to: float = float("inf")) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl until step ``up_to``, without the half line of a killed writer."""
    path = root / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= up_to:
            rows.append(row)
    return rows


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories of the run at ``root``, oldest first, unverified."""
    return sorted((root / "checkpoints").glob("step_*"))


def retain(root: Path, keep: int, best: dict[str, dict[str, float]], step: int) -> None:
    """Deletes all but the last ``keep`` checkpoints until ``step`` and the best of each role. Later ones are not
    this run's any more: they were passed over as damaged, and are written again."""
    treasured = {checkpoint_folder(root, int(b["step"])) for b in best.values()}
    made = [c for c in checkpoints(root) if c <= checkpoint_folder(root, step)]
    for folder in made[:-keep]:
        if folder not in treasured:
            shutil.rmtree(folder, ignore_errors=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory: a copy each, on the CPU.
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()}); "
            "resume with the segmentor settings of the run's config.yaml"
        ) from error


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    entries = [(f"{index}.{name}", value) for index, slots in state["state"].items() for name, value in slots.items()]
    tensors = {key: value for key, value in entries if isinstance(value, Tensor)}
    scalars = {key: value for key, value in entries if not isinstance(value, Tensor)}
    return _plain(tensors), {"scalars": scalars, "param_groups": state["param_groups"]}


def _join_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    slots: dict[int, dict[str, Any]] = {}
    for key, value in {**rest["scalars"], **tensors}.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]  # this run's settings; rates come from the schedule
    if [g["params"] for g in groups] != [g["params"] for g in rest["param_groups"]]:
        raise CheckpointError("the checkpoint's optimizer has other parameter groups; give optim.* as the run had it")
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _rng_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
