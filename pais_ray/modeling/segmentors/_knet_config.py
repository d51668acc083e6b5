"""The settings of K-Net."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pais_ray.modeling.backbones import BackboneConfig

# Preset -> its differences from the defaults of the fields.
PRESETS: dict[str, dict[str, Any]] = {
    "r50": {},
    # Chosen by this project: trains from scratch on one CPU core, with images of 128 to 320 px.
    "nano": {
        "backbone": "resnet18",
        "weights": None,
        "fpn_channels": 64,
        "num_kernels": 40,
        "attention_heads": 4,
        "ffn_dim": 256,
    },
}


class KNetConfig(BackboneConfig):
    """The section `segmentor:` if ``name`` is knet. Settings that are not given come from ``preset``."""

    name: Literal["knet"] = Field(default="knet", description="The name knet selects this segmentor and its settings.")
    preset: Literal["r50", "nano"] = Field(
        default="r50",
        description="Name of the defaults for the settings not given: the paper's network (r50), or a small network "
        "of this project that trains from scratch on a CPU (nano). Default: r50.",
    )
    PRESETS: ClassVar = PRESETS

    num_kernels: int = Field(
        default=100,
        gt=0,
        description="Number of kernels. It limits the number of objects found in one image. Default: from the "
        "released code.",
    )
    stages: int = Field(
        default=3, ge=1, description="Number of stages that update the kernels. Default: from the paper's K-Net-S3."
    )
    attention_heads: int = Field(
        default=8,
        gt=0,
        description="Number of heads of the self-attention over the kernels. Default: from the released code.",
    )
    ffn_dim: int = Field(
        default=2048,
        gt=0,
        description="Width of the feed-forward layer of every stage. Default: from the released code.",
    )
    detections: int = Field(
        default=100, gt=0, description="Largest number of detections per image. Default: from the released code."
    )
    score_threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Detections below this class score are dropped. Default: none are dropped, from the released code.",
    )
    classes_per_kernel: Literal["best", "all"] = Field(
        default="best",
        description="Whether a kernel is a detection of its most likely class only (best), or of every class with a "
        "score among the best of the image (all). With all, a pseudo-label can occur twice with different classes, "
        "and two kernels are then matched to one object. Default: chosen by this project; the released code uses all.",
    )
    mask_points: int | None = Field(
        default=None,
        gt=0,
        description="Number of random points at which masks are compared in matching and losses. Default: null, which "
        "compares masks at every cell of stride 4, from the released code.",
    )

    class_weight: float = Field(
        default=2.0,
        ge=0,
        description="Weight of the class term in the loss and in the matching cost. Default: from the released code; "
        "paper 4.2 gives 4, 2 and 1 as weights of its three terms.",
    )
    dice_weight: float = Field(
        default=4.0,
        ge=0,
        description="Weight of the dice term in the loss and in the matching cost. Default: from the released code.",
    )
    mask_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the cross-entropy of the masks in the loss, and of their pixel agreement in the "
        "matching cost. Default: from the released code.",
    )
    mask_iou_weight: float = Field(
        default=1.0, ge=0, description="Weight of the loss of the mask-IoU branch. Default: from the released code."
    )
    semantic_weight: float = Field(
        default=1.0, ge=0, description="Weight of the auxiliary semantic loss. Default: from the released code."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> "KNetConfig":
        if self.fpn_channels % self.attention_heads or self.fpn_channels % 4:
            raise ValueError(
                f"fpn_channels: expected a multiple of 4 and of attention_heads={self.attention_heads}, "
                f"got {self.fpn_channels}"
            )
        return self
