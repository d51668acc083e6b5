"""Optimizer and schedule: the published schedule, scaled to this run's batch and length.

The learning rate is a pure function of the step, so there is no scheduler state to restore.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

# torchvision keeps the pyramid under the backbone's name; the factor means the pretrained part alone.
BACKBONE, NECK = "backbone.", "backbone.fpn."


class ReferenceSchedule(BaseModel):
    """A published schedule, in its own steps, at its own batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(
        default=16,
        gt=0,
        description="images a step, labeled + unlabeled, over all workers; paper 4.2: 4 x (1 + 3)",
    )
    lr: float = Field(default=0.01, gt=0, description="learning rate at that batch; paper 4.2, Mask R-CNN")
    steps: int = Field(default=220_000, gt=0, description="length; paper 4.2")
    warmup: int = Field(default=1000, ge=0, description="steps of linear warm-up; released code")
    milestones: tuple[int, ...] = Field(
        default=(160_000, 200_000),
        description="steps at which multistep multiplies by gamma; released K-Net, the paper names none",
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at a milestone; released code")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        marks = (0, *self.milestones, self.steps)
        if any(a > b for a, b in itertools.pairwise(marks)):
            raise ValueError(f"milestones: expected ascending steps up to {self.steps}, got {self.milestones}")
        return self


class OptimConfig(BaseModel):
    """The section `optim:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="paper 4.2: SGD for Mask R-CNN, AdamW for K-Net")
    lr: float | None = Field(
        default=None, gt=0, description="learning rate of this run; null: reference.lr scaled by the batch"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD; released code")
    weight_decay: float = Field(default=1e-4, ge=0, description="released code: 1e-4 (K-Net .05)")
    decay_norms_and_biases: bool = Field(
        default=True, description="whether weight decay covers vectors too; released code: yes"
    )
    backbone_lr_factor: float = Field(default=1.0, ge=0, description="released K-Net .25")
    clip_norm: float | None = Field(
        default=None, gt=0, description="global gradient norm; released code: none (K-Net 1)"
    )
    schedule: Literal["multistep", "cosine", "constant"] = Field(
        default="multistep", description="shape after the warm-up; released code: multistep"
    )
    warmup_ratio: float = Field(
        default=0.001, ge=0, le=1, description="share of the rate at which the warm-up begins; released code"
    )
    reference: ReferenceSchedule = ReferenceSchedule()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a run does, in its own steps; plain numbers, so that it can be written down."""

    lr: float
    steps: int
    warmup: int
    milestones: tuple[int, ...]
    kind: str  # multistep | cosine | constant
    warmup_ratio: float
    gamma: float
    images_per_step: int
    scale: float  # images_per_step over the reference's batch
    rule: str  # how lr follows the scale: linear | sqrt
    lr_given: bool  # optim.lr instead of the rule
    steps_given: bool  # train.steps instead of the reference's length
    reference_batch: int
    reference_lr: float
    reference_steps: int

    def explain(self) -> str:
        """The arithmetic, in two lines."""
        lr = f"lr {self.reference_lr:g} -> {self.lr:g} ({'as given' if self.lr_given else self.rule})"
        steps = f"steps {self.reference_steps} -> {self.steps}" + (" (as given)" if self.steps_given else "")
        first = f"batch {self.images_per_step} of reference {self.reference_batch}: {lr}, {steps}"
        shape = {
            "multistep": f"times {self.gamma:g} at {', '.join(map(str, self.milestones)) or 'no step'}",
            "cosine": "a half cosine to zero",
            "constant": "constant",
        }[self.kind]
        return f"{first}\nwarm-up {self.warmup} steps from {self.warmup_ratio:g} of the rate, then {shape}"


def plan_schedule(
    optim: OptimConfig, reference: ReferenceSchedule, steps: int | None, images_per_step: int
) -> Schedule:
    """The schedule of a run of ``images_per_step`` images, over all workers and accumulated micro-batches.

    Linear scaling for SGD (Goyal et al. 2017), square root for AdamW (Malladi et al. 2022); the length shrinks
    as the batch grows, so a run sees the reference's number of images. ``steps`` is taken as it is, milestones
    keep their share of it. The warm-up is there for the first steps' sake: it keeps its number of images and is
    at most a twentieth of the run.
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
        scale=scale,
        rule=rule,
        lr_given=optim.lr is not None,
        steps_given=steps is not None,
        reference_batch=reference.batch,
        reference_lr=reference.lr,
        reference_steps=reference.steps,
    )


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of step ``step``, counted from 0."""
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
    """Sets every group's rate for ``step`` and returns the rate before the groups' factors."""
    lr = lr_at(schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, schedule: Schedule
) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable ones of the named ``parameters``; frozen ones are left out."""
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
    described = [
        {"params": members, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(described, lr=lr, momentum=optim.momentum, fused=True)
    return torch.optim.AdamW(described, lr=lr, fused=True)
