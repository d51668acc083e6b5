"""PAIS: pseudo-labels weighted by their class score and predicted mask IoU (DALoss, Eq. 5).

Legend: N instances of one image; c = ``scores``, s = ``ious`` of the teacher's predictions, both (N,).
"""

import dataclasses
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from pais_ray.structures.batch import Normalizer, Predictions, Targets

# Losses that pseudo-labels do not teach: the mask-IoU branch would confirm itself, the semantic map has no weights.
LABELED_ONLY = {"mask_iou": 0.0, "semantic": 0.0}


class PAIS(BaseModel):
    """Every number of section 4.2 of the paper, for Mask R-CNN; `PAIS w/o DALoss` is alpha = beta = 0.

    Left out: the released Mask R-CNN weighs each background sample by the teacher's own background
    probability, which the paper does not mention; here all of them weigh ``negative_weight``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["pais"] = "pais"
    tau_cls: float = Field(default=0.35, ge=0, le=1, description="keep c above it; paper 4.2, Table 7")
    tau_iou: float = Field(default=0.30, ge=0, le=1, description="keep s above it; paper 4.2, Table 8")
    alpha: float = Field(default=4.0, ge=0, description="exponent of c in the class weight; paper Table 6")
    beta: float = Field(default=4.0, ge=0, description="exponent of s in the mask weight; paper Table 6")
    lambda_labeled: float = Field(default=1.0, ge=0, description="weight of the labeled term; released code")
    lambda_unlabeled: float = Field(
        default=1.5, ge=0, description="weight of the unlabeled term; paper 4.2: Mask R-CNN 1.5, K-Net .3"
    )
    ema: float = Field(default=0.999, ge=0, le=1, description="decay of the teacher; paper 4.2")
    burn_in: int = Field(default=0, ge=0, description="steps without the unlabeled term; paper: none")
    normalizer: Normalizer = Field(
        default="pos_neg", description="what weighted sums are divided by; Eq. 5: 1/N_pos and 1/N_neg apart"
    )
    class_scale: float = Field(default=1.0, ge=0, description="times c^alpha; Eq. 5: 1, released K-Net: 12")
    class_cap: float = Field(default=1.0, gt=0, le=1, description="min(c, cap)^alpha; released K-Net: .5")
    mask_scale: float = Field(default=1.0, ge=0, description="times s^beta; Eq. 5: 1, released code: 2.5")
    negative_weight: float = Field(default=1.0, ge=0, description="of background; released K-Net: .35^2")
    tau_proposal: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="boxes with c not above it stay out of the RPN's loss; null: tau_cls (released code)",
    )
    labeled_weights: dict[str, float] = Field(
        default={}, description="multiplier of a labeled loss by its name, 1 where unnamed; ours"
    )
    unlabeled_weights: dict[str, float] = Field(
        default=LABELED_ONLY,
        description="the same for unlabeled losses; 0 unless named: mask_iou (paper), semantic (released code)",
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
        """What the teacher may drop before its mask heads: nothing of it would be kept."""
        return self.tau_cls

    def labeled_weight(self, step: int) -> float:
        return self.lambda_labeled

    def unlabeled_weight(self, step: int) -> float:
        return self.lambda_unlabeled if step >= self.burn_in else 0.0

    def decay(self, step: int) -> float:
        """0, 1/2, 2/3, ...: the teacher is the running mean of the student since the burn-in until that is
        slower than ``ema`` (released code). Through the burn-in it is the student."""
        return min(self.ema, 1 - 1 / (max(0, step - self.burn_in) + 1))

    def keeps(self, predictions: Predictions) -> Tensor:
        """Which predictions (N,) bool become pseudo-labels: those over both thresholds."""
        return (predictions.scores > self.tau_cls) & (predictions.ious > self.tau_iou)

    def pseudo_labels(self, predictions: Predictions) -> Targets:
        """The predictions over both thresholds, with DALoss's weights (Eq. 5). All of it is constant."""
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
    """Without gradient and in fp32: the fourth power of a half underflows early."""
    return values.detach().float()
