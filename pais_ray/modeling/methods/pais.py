"""PAIS: pseudo-labels weighted by their class score and predicted mask IoU (DALoss, Eq. 5).

Legend: N instances of one image; c = ``scores`` and s = ``ious`` of the teacher's predictions, both (N,).
"""

import dataclasses
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from pais_ray.structures.batch import Normalizer, Predictions, Targets

# Losses without an unlabeled term: the mask-IoU branch would confirm itself, the semantic map has no weights.
LABELED_ONLY = {"mask_iou": 0.0, "semantic": 0.0}


class PAIS(BaseModel):
    """Pseudo-label alignment. The defaults are those of section 4.2 of the paper for Mask R-CNN; `PAIS w/o DALoss` is
    alpha = beta = 0.

    Differs from the released Mask R-CNN code, which weighs each background sample by the teacher's background
    probability; the paper does not mention it. Here every background sample has the weight ``negative_weight``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["pais"] = Field(default="pais", description="The name pais selects this method and its settings.")
    tau_cls: float = Field(
        default=0.35,
        ge=0,
        le=1,
        description="Predictions become pseudo-labels only if their class score c is above this. Default: from paper "
        "4.2, Table 7.",
    )
    tau_iou: float = Field(
        default=0.30,
        ge=0,
        le=1,
        description="Predictions become pseudo-labels only if their predicted mask IoU s is above this. Default: from "
        "paper 4.2, Table 8.",
    )
    alpha: float = Field(
        default=4.0,
        ge=0,
        description="Exponent of the class score c in the class weight c^alpha; 0 gives all pseudo-labels the same "
        "weight. Default: from Table 6 of the paper.",
    )
    beta: float = Field(
        default=4.0,
        ge=0,
        description="Exponent of the predicted mask IoU s in the mask weight s^beta; 0 gives all pseudo-labels the "
        "same weight. Default: from Table 6 of the paper.",
    )
    lambda_labeled: float = Field(
        default=1.0, ge=0, description="Weight of the labeled term in the total loss. Default: from the released code."
    )
    lambda_unlabeled: float = Field(
        default=1.5,
        ge=0,
        description="Weight of the unlabeled term in the total loss. Default: from paper 4.2 for Mask R-CNN; the "
        "paper uses 0.3 for K-Net.",
    )
    ema: float = Field(
        default=0.999,
        ge=0,
        le=1,
        description="Largest EMA decay of the teacher per step. Before that decay is reached, the teacher is the mean "
        "of the student over the steps since the burn-in. Default: from paper 4.2.",
    )
    burn_in: int = Field(
        default=0,
        ge=0,
        description="Number of steps at the start without the unlabeled term. Default: none, from the paper.",
    )
    normalizer: Normalizer = Field(
        default="pos_neg",
        description="Divisor of the weighted class loss: the number of samples (mean) or of positives (pos), those of "
        "positives and negatives separately (pos_neg), or the sum of the weights (weight_sum). Default: from Eq. 5 of "
        "the paper.",
    )
    class_scale: float = Field(
        default=1.0,
        ge=0,
        description="Factor of the class weight c^alpha. Default: from Eq. 5 of the paper; the released code uses 12 "
        "for K-Net.",
    )
    class_cap: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Largest c in the class weight: min(c, class_cap)^alpha. Default: no cap, from Eq. 5 of the "
        "paper; the released code uses 0.5 for K-Net.",
    )
    mask_scale: float = Field(
        default=1.0,
        ge=0,
        description="Factor of the mask weight s^beta. Default: from Eq. 5 of the paper; the released code uses 2.5.",
    )
    negative_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of every background sample in the class loss of unlabeled images. Default: from Eq. 5 of "
        "the paper; the released code uses 0.35^2 for K-Net.",
    )
    tau_proposal: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Only pseudo-labels with a class score c above this are targets of the region proposal network. "
        "Default: null, which means tau_cls, from the released code.",
    )
    labeled_weights: dict[str, float] = Field(
        default={},
        description="Multiplier of each labeled loss by its name; 1 for losses not listed. Default: no loss is listed.",
    )
    unlabeled_weights: dict[str, float] = Field(
        default=LABELED_ONLY,
        description="Multiplier of each unlabeled loss by its name; 1 for losses not listed, except for mask_iou and "
        "semantic, where it is 0. Default: 0 for mask_iou, from the paper, and for semantic, from the released code.",
    )

    @field_validator("unlabeled_weights")
    @classmethod
    def _labeled_only(cls, given: dict[str, float]) -> dict[str, float]:
        return {**LABELED_ONLY, **given}

    @property
    def uses_unlabeled(self) -> bool:
        return True

    @property
    def score_threshold(self) -> float:
        """The teacher may drop predictions below it before its mask heads: they would not be kept."""
        return self.tau_cls

    def labeled_weight(self, step: int) -> float:
        return self.lambda_labeled

    def unlabeled_weight(self, step: int) -> float:
        return self.lambda_unlabeled if step >= self.burn_in else 0.0

    def decay(self, step: int) -> float:
        """EMA decay after ``step``: 0, 1/2, 2/3, ... up to ``ema``, so that the teacher starts as the mean of the
        student over the steps since the burn-in (released code). During the burn-in it equals the student."""
        return min(self.ema, 1 - 1 / (max(0, step - self.burn_in) + 1))

    def keeps(self, predictions: Predictions) -> Tensor:
        """Mask (N,) bool of the predictions above both thresholds."""
        return (predictions.scores > self.tau_cls) & (predictions.ious > self.tau_iou)

    def pseudo_labels(self, predictions: Predictions) -> Targets:
        """The predictions above both thresholds, with the weights of DALoss (Eq. 5). No gradient flows into them."""
        kept = predictions[self.keeps(predictions)]
        c, s = constant(kept.scores), constant(kept.ious)
        tau_proposal = self.tau_cls if self.tau_proposal is None else self.tau_proposal
        return Targets(
            boxes=kept.boxes.detach(),
            labels=kept.labels,
            masks=dataclasses.replace(kept.masks, grids=kept.masks.grids.detach()),
            class_weight=self.class_scale * c.clamp(max=self.class_cap) ** self.alpha,
            box_weight=torch.ones_like(c),
            mask_weight=self.mask_scale * s**self.beta,
            proposal_weight=(c > tau_proposal).float(),
            negative_weight=self.negative_weight,
            normalizer=self.normalizer,
        )


def constant(values: Tensor) -> Tensor:
    """``values`` without gradient and in fp32, because the fourth power of a small fp16 number underflows."""
    return values.detach().float()
