"""TrainState: everything a run must remember, to and from a directory of safetensors and JSON, no pickle."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pais_ray.config.tree import Config
from pais_ray.modeling import registry
from pais_ray.modeling.optim import Schedule, build_optimizer
from pais_ray.modeling.protocols import Segmentor
from pais_ray.runs.checkpoints import CheckpointError, Snapshot, _load_weights, read_state, write
from pais_ray.structures.batch import Predictions, Views

COUNTERS = ("step", "g_next", "skipped", "skipped_in_row", "rollbacks")


class Teacher(nn.Module):
    """A frozen copy of a segmentor that never enters train mode."""

    def __init__(self, student: Segmentor) -> None:
        super().__init__()
        self.segmentor = copy.deepcopy(student).float().requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def predict(self, views: Views, score_threshold: float | None = None) -> list[Predictions]:
        return self.segmentor.predict(views, score_threshold=score_threshold)


@dataclass(kw_only=True)
class TrainState:
    """Student, teacher, optimizer, scaler and counters of one run. The schedule is a pure function of ``step``."""

    student: Segmentor
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps made
    g_next: int = 0  # the next global row; independent of the number of workers
    skipped: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0  # returns to a checkpoint because of losses that were not finite
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # role -> {"segm_AP": ..., "step": ...}

    def note_score(self, role: str, step: int, ap: float | None) -> bool:
        """Takes up the segm AP of ``role`` at ``step``; True where it is the best so far."""
        if ap is None or ap <= self.best.get(role, {"segm_AP": -1.0})["segm_AP"]:
            return False
        self.best[role] = {"segm_AP": ap, "step": step}
        return True

    def snapshot(self) -> Snapshot:
        """A copy of all of it on the CPU, which later steps do not touch."""
        tensors, scalars = _split_optimizer(self.optimizer)
        return Snapshot(
            step=self.step,
            tensors={
                "student": _plain(self.student.state_dict()),
                "teacher": _plain(self.teacher.segmentor.state_dict()),
                "optimizer": tensors,
                "rng": _plain(_rng_state()),
            },
            state={
                **{name: getattr(self, name) for name in COUNTERS},
                "best": copy.deepcopy(self.best),
                "scaler": self.scaler.state_dict(),
                "optimizer": scalars,
            },
        )

    def save(self, folder: Path) -> None:
        """Writes the checkpoint ``folder``, whole or not at all."""
        write(self.snapshot(), folder)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote. Raises CheckpointError when the weights do not fit this model."""
        state = read_state(folder)
        _load_weights(self.student, folder / "student.safetensors")
        _load_weights(self.teacher.segmentor, folder / "teacher.safetensors")
        _join_optimizer(self.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run had another precision until now
            self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.best = state["best"]
        _restore_rng(load_file(folder / "rng.safetensors"))


def build_state(
    config: Config, schedule: Schedule, num_classes: int, device: torch.device | str, pretrained: bool = True
) -> TrainState:
    """A fresh TrainState, the same on every rank: the seed is the run's. ``pretrained`` False leaves
    segmentor.weights unread, for a checkpoint that is about to replace them."""
    torch.manual_seed(config.train.seed)
    student = registry.segmentor(config.segmentor.name)(num_classes, config.segmentor, pretrained=pretrained)
    student.to(device).train()
    optimizer = build_optimizer(student.named_parameters(), config.optim, schedule)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.train.precision == "fp16")
    teacher = Teacher(student).to(device)
    return TrainState(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory: a copy each, on the CPU.
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


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
