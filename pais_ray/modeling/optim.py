"""The optimizer and its learning-rate schedule: a published schedule, scaled to the batch and length of a run.

The learning rate is a pure function of the step, so there is no scheduler state to restore.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

# torchvision's feature pyramid is part of the backbone by name; the backbone's factor is for the pretrained part only.
BACKBONE, NECK = "backbone.", "backbone.fpn."


class ReferenceSchedule(BaseModel):
    """A published schedule, in its own steps and at its own batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(
        default=16,
        gt=0,
        description="Images per step in the published run, labeled and unlabeled, over all workers. "
        "Default: 4 GPUs x (1 + 3) images (paper 4.2).",
    )
    lr: float = Field(
        default=0.01,
        gt=0,
        description="Learning rate at that batch size. A run scales it to its own batch size: linearly for SGD, with "
        "the square root for AdamW. Default: from paper 4.2 for Mask R-CNN.",
    )
    steps: int = Field(
        default=220_000,
        gt=0,
        description="Length of the published run, in steps at that batch size. A run takes as many steps as it needs "
        "for the same number of images, unless train.steps is set. Default: from paper 4.2.",
    )
    warmup: int = Field(
        default=1000,
        ge=0,
        description="Steps of linear warm-up at that batch size. A run warms up over the same number of images, but "
        "for at most a twentieth of its steps. Default: from the released code.",
    )
    milestones: tuple[int, ...] = Field(
        default=(160_000, 200_000),
        description="Steps at which the multistep schedule multiplies the learning rate by gamma. A run places them "
        "at the same shares of its own length. Default: from the released code for K-Net; the paper gives none.",
    )
    gamma: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Factor of the learning rate at each milestone of the multistep schedule. Default: from the "
        "released code.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        marks = (0, *self.milestones, self.steps)
        if any(a > b for a, b in itertools.pairwise(marks)):
            raise ValueError(f"milestones: expected ascending steps up to {self.steps}, got {self.milestones}")
        return self


class OptimConfig(BaseModel):
    """The section `optim:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adamw"] = Field(
        default="sgd",
        description="The optimizer. Default: from paper 4.2 for Mask R-CNN; the paper uses AdamW for K-Net.",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of this run after the warm-up. Default: null, which means reference.lr scaled to "
        "the batch size of this run.",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Momentum of SGD. AdamW ignores it. Default: from the released code."
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        description="Weight decay of the optimizer. Default: from the released code for Mask R-CNN; for K-Net that "
        "code uses 0.05.",
    )
    decay_norms_and_biases: bool = Field(
        default=True,
        description="Whether weight decay also applies to parameters with a single axis (norms and biases). Default: "
        "from the released code.",
    )
    backbone_lr_factor: float = Field(
        default=1.0,
        ge=0,
        description="Factor of the learning rate for the backbone without its feature pyramid. Default: from the "
        "released code for Mask R-CNN; for K-Net that code uses 0.25.",
    )
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="Largest global norm of the gradients; larger gradients are scaled down to it. With null, "
        "gradients are not clipped. Default: from the released code for Mask R-CNN; for K-Net that code uses 1.",
    )
    schedule: Literal["multistep", "cosine", "constant"] = Field(
        default="multistep",
        description="Shape of the learning rate after the warm-up: steps down at the milestones, a half cosine to "
        "zero, or constant. Default: from the released code.",
    )
    warmup_ratio: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="Fraction of the learning rate at which the warm-up begins. Default: from the released code.",
    )
    reference: ReferenceSchedule = Field(
        default=ReferenceSchedule(), description="The published schedule that this run scales."
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOrigin:
    """How a schedule was derived from the published one, to explain it."""

    scale: float  # images per step over the reference batch
    rule: str  # how the learning rate follows the scale: linear | sqrt
    lr_given: bool  # whether the learning rate is optim.lr instead of the scaled one
    steps_given: bool  # whether the length is train.steps instead of the scaled one
    reference_batch: int
    reference_lr: float
    reference_steps: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rates of a run, in its own steps. Two schedules are equal if they give the same run, whatever their
    origins."""

    lr: float
    steps: int
    warmup: int
    milestones: tuple[int, ...]
    kind: str  # multistep | cosine | constant
    warmup_ratio: float
    gamma: float
    images_per_step: int
    origin: ScheduleOrigin = field(compare=False)

    def explain(self) -> str:
        """The derivation as two lines of text."""
        origin = self.origin
        lr = f"{self.lr:g} ({'as given' if origin.lr_given else origin.rule}, reference {origin.reference_lr:g})"
        steps = f"{self.steps} ({'as given, ' if origin.steps_given else ''}reference {origin.reference_steps})"
        images = f"{self.images_per_step} (reference {origin.reference_batch})"
        first = f"schedule: images per step {images}, learning rate {lr}, steps {steps}"
        shape = {
            "multistep": f"multiplied by {self.gamma:g} at {', '.join(map(str, self.milestones)) or 'no step'}",
            "cosine": "decayed to zero as a half cosine",
            "constant": "constant",
        }[self.kind]
        warmup = f"warm-up of {self.warmup} steps from {self.warmup_ratio:g} of the learning rate"
        return f"{first}\n{warmup}, then {shape}"

    def to_json(self) -> dict[str, Any]:
        """One flat object, the content of a run's schedule.json."""
        tree = dataclasses.asdict(self)
        origin = tree.pop("origin")
        return {**tree, **origin}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The schedule that ``to_json`` wrote."""
        of_origin = {f.name for f in dataclasses.fields(ScheduleOrigin)}
        own = {name: value for name, value in tree.items() if name not in of_origin}
        origin = ScheduleOrigin(**{name: tree[name] for name in of_origin})
        return cls(**{**own, "milestones": tuple(tree["milestones"])}, origin=origin)


def plan_schedule(
    optim: OptimConfig, reference: ReferenceSchedule, steps: int | None, images_per_step: int
) -> Schedule:
    """Scale ``reference`` to a run of ``images_per_step`` images, over all workers and accumulated micro-batches.

    The learning rate scales linearly for SGD (Goyal et al. 2017) and with the square root for AdamW (Malladi et al.
    2022). The length shrinks as the batch grows, so that a run sees as many images as the reference, unless ``steps``
    is given. Milestones keep their share of the length. The warm-up keeps its number of images, up to a twentieth of
    the run: it stabilizes the first steps only.
    """
    if images_per_step < 1 or (steps is not None and steps < 1):
        raise ValueError(f"plan_schedule: expected at least 1 image and 1 step, got {images_per_step} and {steps}")
    scale = images_per_step / reference.batch
    rule = "linear" if optim.name == "sgd" else "sqrt"
    length = max(1, round(reference.steps / scale)) if steps is None else steps
    stretch = length / reference.steps
    return Schedule(
        lr=reference.lr * (scale if rule == "linear" else math.sqrt(scale)) if optim.lr is None else optim.lr,
        steps=length,
        warmup=min(round(reference.warmup / scale), length // 20),
        milestones=tuple(round(m * stretch) for m in reference.milestones),
        kind=optim.schedule,
        warmup_ratio=optim.warmup_ratio,
        gamma=reference.gamma,
        images_per_step=images_per_step,
        origin=ScheduleOrigin(
            scale=scale,
            rule=rule,
            lr_given=optim.lr is not None,
            steps_given=steps is not None,
            reference_batch=reference.batch,
            reference_lr=reference.lr,
            reference_steps=reference.steps,
        ),
    )


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of ``step``, counted from 0."""
    lr = schedule.lr
    if schedule.kind == "multistep":
        lr *= schedule.gamma ** sum(step >= m for m in schedule.milestones)
    elif schedule.kind == "cosine":
        done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
        lr *= 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    if step < schedule.warmup:
        lr *= schedule.warmup_ratio + (1 - schedule.warmup_ratio) * step / schedule.warmup
    return lr


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set the learning rate of every parameter group for ``step``; return the rate before the groups' factors."""
    lr = lr_at(schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, schedule: Schedule
) -> torch.optim.Optimizer:
    """SGD or AdamW for the named ``parameters``, without the frozen ones."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith(BACKBONE) and not name.startswith(NECK)
        # Norms and biases are the parameters with a single axis.
        decays = optim.decay_norms_and_biases or parameter.ndim > 1
        key = (optim.backbone_lr_factor if in_backbone else 1.0, optim.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    lr = lr_at(schedule, 0)
    param_groups = [
        {"params": members, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(param_groups, lr=lr, momentum=optim.momentum, fused=True)
    return torch.optim.AdamW(param_groups, lr=lr, fused=True)
