"""Supervised training: the baseline, labeled images only."""

import dataclasses
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pais_ray.structures.batch import Predictions, Targets


class Supervised(BaseModel):
    """Learns from ground truth only. The paper's supervised baseline with a dagger uses the labeled augmentation of
    the semi-supervised runs, as here by default; the one without uses `views.preset=plain`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["supervised"] = Field(
        default="supervised", description="The name supervised selects this method and its settings."
    )
    ema: float = Field(
        default=0.999,
        ge=0,
        le=1,
        description="Largest EMA decay of the teacher per step. The teacher is only evaluated; the student does not "
        "learn from it. Default: from the released code.",
    )
    labeled_weights: dict[str, float] = Field(
        default={},
        description="Multiplier of each loss by its name; 1 for losses not listed. Default: no loss is listed.",
    )

    @property
    def uses_unlabeled(self) -> bool:
        return False

    @property
    def unlabeled_weights(self) -> dict[str, float]:
        return {}

    @property
    def score_threshold(self) -> float:
        """The teacher's predictions are not used: all of them may be dropped."""
        return 1.0

    def labeled_weight(self, step: int) -> float:
        return 1.0

    def unlabeled_weight(self, step: int) -> float:
        return 0.0

    def decay(self, step: int) -> float:
        """EMA decay after ``step``: 0, 1/2, 2/3, ... up to ``ema``, so that the teacher starts as the mean of the
        student over all steps."""
        return min(self.ema, 1 - 1 / (step + 1))

    def keeps(self, predictions: Predictions) -> Tensor:
        """Mask (N,) bool without any prediction."""
        return torch.zeros_like(predictions.scores, dtype=torch.bool)

    def pseudo_labels(self, predictions: Predictions) -> Targets:
        """Empty targets: no prediction becomes a pseudo-label."""
        none = predictions[self.keeps(predictions)]
        masks = dataclasses.replace(none.masks, grids=none.masks.grids.detach())
        return Targets.ground_truth(boxes=none.boxes.detach(), labels=none.labels, masks=masks)
