"""Supervised training: the baseline, labeled images only."""

import dataclasses
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pais_ray.structures.batch import Predictions, Targets


class Supervised(BaseModel):
    """Learns from ground truth alone. The paper's dagger is the same method under the labeled stream's
    semi-supervised augmentation; without the dagger, `views.preset=plain`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["supervised"] = "supervised"
    ema: float = Field(
        default=0.999,
        ge=0,
        le=1,
        description="decay of the teacher, which here only watches; released code .999",
    )
    labeled_weights: dict[str, float] = Field(
        default={}, description="multiplier of a loss by its name, 1 where unnamed; ours"
    )

    @property
    def uses_unlabeled(self) -> bool:
        return False

    @property
    def unlabeled_weights(self) -> dict[str, float]:
        return {}

    @property
    def score_threshold(self) -> float:
        """No prediction is ever asked for: all may be dropped."""
        return 1.0

    def labeled_weight(self, step: int) -> float:
        return 1.0

    def unlabeled_weight(self, step: int) -> float:
        return 0.0

    def decay(self, step: int) -> float:
        """The teacher is the running mean of the student until that is slower than ``ema``."""
        return min(self.ema, 1 - 1 / (step + 1))

    def keeps(self, predictions: Predictions) -> Tensor:
        """None of them, (N,) bool."""
        return torch.zeros_like(predictions.scores, dtype=torch.bool)

    def pseudo_labels(self, predictions: Predictions) -> Targets:
        """None of the predictions."""
        none = predictions[self.keeps(predictions)]
        masks = dataclasses.replace(none.masks, grids=none.masks.grids.detach())
        return Targets.ground_truth(boxes=none.boxes.detach(), labels=none.labels, masks=masks)
