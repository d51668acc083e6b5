"""The state of a run: everything that a checkpoint holds, as safetensors and JSON, without pickle."""

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
from pais_ray.runs.checkpoints import CheckpointError, Snapshot, load_weights, read_state, write_checkpoint
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
    """Student, teacher, optimizer, scaler and counters. The learning rate is a pure function of ``step``."""

    student: Segmentor
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # completed steps, skipped ones included
    g_next: int = 0  # the next global row; it does not depend on the number of workers
    skipped: int = 0  # skipped steps of the run
    skipped_in_row: int = 0  # consecutive skipped steps until now
    rollbacks: int = 0  # returns to an earlier checkpoint after too many skipped steps
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # role -> {"segm_AP": ..., "step": ...}

    def note_score(self, role: str, step: int, ap: float | None) -> bool:
        """Record the segm AP of ``role`` at ``step`` if it is the best so far; return whether it is."""
        if ap is None or ap <= self.best.get(role, {"segm_AP": -1.0})["segm_AP"]:
            return False
        self.best[role] = {"segm_AP": ap, "step": step}
        return True

    def snapshot(self) -> Snapshot:
        """A copy of the state on the CPU, which later steps do not change."""
        tensors, scalars = _split_optimizer(self.optimizer)
        return Snapshot(
            step=self.step,
            tensors={
                "student": _copy_to_cpu(self.student.state_dict()),
                "teacher": _copy_to_cpu(self.teacher.segmentor.state_dict()),
                "optimizer": tensors,
                "rng": _copy_to_cpu(_rng_state()),
            },
            state={
                **{name: getattr(self, name) for name in COUNTERS},
                "best": copy.deepcopy(self.best),
                "scaler": self.scaler.state_dict(),
                "optimizer": scalars,
            },
        )

    def save(self, folder: Path) -> None:
        """Write the checkpoint ``folder`` atomically."""
        write_checkpoint(self.snapshot(), folder)

    def load(self, folder: Path) -> None:
        """Restore the state from a checkpoint. Raises CheckpointError if it does not fit the model or the optimizer."""
        state = read_state(folder)
        load_weights(self.student, folder / "student.safetensors")
        load_weights(self.teacher.segmentor, folder / "teacher.safetensors")
        _join_optimizer(self.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the run had another precision before
            self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.best = state["best"]
        _restore_rng(load_file(folder / "rng.safetensors"))


def build_state(
    config: Config, schedule: Schedule, num_classes: int, device: torch.device | str, pretrained: bool = True
) -> TrainState:
    """A new TrainState, seeded with the seed of the run and therefore identical on all ranks.

    If ``pretrained`` is False, `segmentor.weights` is not read, because a checkpoint will replace the weights.
    """
    torch.manual_seed(config.train.seed)
    student = registry.segmentor(config.segmentor.name)(num_classes, config.segmentor, pretrained=pretrained)
    student.to(device).train()
    optimizer = build_optimizer(student.named_parameters(), config.optim, schedule)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=config.train.precision == "fp16")
    teacher = Teacher(student).to(device)
    return TrainState(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)


def _copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A copy of each, because safetensors refuses tensors that share memory.
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the optimizer's state as ``INDEX.NAME``, and the rest of it for JSON."""
    state = optimizer.state_dict()
    entries = [(f"{index}.{name}", value) for index, slots in state["state"].items() for name, value in slots.items()]
    tensors = {key: value for key, value in entries if isinstance(value, Tensor)}
    scalars = {key: value for key, value in entries if not isinstance(value, Tensor)}
    return _copy_to_cpu(tensors), {"scalars": scalars, "param_groups": state["param_groups"]}


def _join_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Load what ``_split_optimizer`` returned. The settings of the groups stay those of this run."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in {**rest["scalars"], **tensors}.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in rest["param_groups"]]:
        raise CheckpointError(
            "the parameter groups of the checkpoint's optimizer differ from those of the config; "
            "use the settings optim.* of the run's config.yaml"
        )
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
