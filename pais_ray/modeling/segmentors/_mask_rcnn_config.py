"""The settings of Mask R-CNN."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pais_ray.modeling.backbones import BackboneConfig

# Preset -> its differences from the defaults of the fields.
PRESETS: dict[str, dict[str, Any]] = {
    "r50": {},
    # Chosen by this project: trains from scratch on one CPU core, with images of 128 to 320 px.
    "nano": {
        "backbone": "resnet18",
        "weights": None,
        "norm": "group",
        "frozen_stages": -1,
        "fpn_channels": 64,
        "anchor_sizes": (16, 32, 64, 128, 256),
        "rpn_pre_nms": 250,
        "rpn_post_nms": 150,
        "rpn_batch_size": 128,
        "roi_canonical_size": 112,
        "box_batch_size": 64,
        "box_head_dim": 256,
        "mask_head_dim": 64,
        "mask_head_convs": 2,
        "max_mask_rois": 16,
        "mask_iou_dim": 128,
        "mask_iou_pool": 2,
    },
}


class MaskRCNNConfig(BackboneConfig):
    """The section `segmentor:` if ``name`` is mask_rcnn. Settings that are not given come from ``preset``."""

    name: Literal["mask_rcnn"] = Field(
        default="mask_rcnn", description="The name mask_rcnn selects this segmentor and its settings."
    )
    preset: Literal["r50", "nano"] = Field(
        default="r50",
        description="Name of the defaults for the settings not given: the paper's network (r50), or a small network "
        "of this project that trains from scratch on a CPU (nano). Default: r50.",
    )
    PRESETS: ClassVar = PRESETS

    anchor_sizes: tuple[int, int, int, int, int] = Field(
        default=(32, 64, 128, 256, 512),
        description="Side of the square anchor on each of the pyramid levels P2 to P6, in pixels. Default: from "
        "torchvision.",
    )
    anchor_ratios: tuple[float, ...] = Field(
        default=(0.5, 1.0, 2.0),
        min_length=1,
        description="Ratios of height to width of the anchors at every position. Default: from torchvision.",
    )
    # One pair of limits for training and prediction: the released teacher also uses those of training.
    rpn_pre_nms: int = Field(
        default=2000,
        gt=0,
        description="Maximum number of proposals per pyramid level that enter non-maximum suppression, in training "
        "and prediction. Default: from the released code.",
    )
    rpn_post_nms: int = Field(
        default=1000,
        gt=0,
        description="Maximum number of proposals per image that are left after non-maximum suppression, in training "
        "and prediction. Default: from the released code; torchvision trains with 2000.",
    )
    rpn_nms: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="Threshold of non-maximum suppression: a proposal is dropped if its box IoU with a better one is "
        "above this. Default: from torchvision.",
    )
    rpn_batch_size: int = Field(
        default=256,
        gt=0,
        description="Number of anchors per image that are sampled for the proposal losses. Default: from torchvision.",
    )
    rpn_positive_fraction: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Largest share of positives among the sampled anchors. Default: from torchvision.",
    )
    rpn_positive_iou: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="An anchor is positive if its box IoU with a target is at least this, or the highest for that "
        "target. Default: from torchvision.",
    )
    rpn_negative_iou: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="An anchor is background if its box IoU with every target is below this. Anchors between this and "
        "rpn_positive_iou are ignored. Default: from torchvision.",
    )

    roi_canonical_size: int = Field(
        default=224,
        gt=0,
        description="Side of a box whose features are read from pyramid level P4, in pixels. Larger boxes use coarser "
        "levels, smaller boxes finer ones. Default: from the FPN paper, Eq. 1.",
    )
    box_batch_size: int = Field(
        default=512,
        gt=0,
        description="Number of regions of interest per image that are sampled for the box losses. Default: from "
        "torchvision.",
    )
    box_positive_fraction: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Largest share of positives among the sampled regions of interest. Default: from torchvision.",
    )
    box_positive_iou: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="A region is positive if its box IoU with a target is at least this; the other regions are "
        "background. Default: from torchvision.",
    )
    box_head_dim: int = Field(
        default=1024,
        gt=0,
        description="Width of the two fully connected layers of the box head. Default: from torchvision.",
    )
    smooth_l1_beta: float = Field(
        default=1 / 9,
        ge=0,
        description="Error at which the box losses change from quadratic to linear; 0 gives the L1 loss of the "
        "released COCO configs. Default: from torchvision.",
    )
    score_threshold: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Detections are kept only if their class score is above this. Default: from torchvision.",
    )
    nms: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Threshold of non-maximum suppression: a detection is dropped if its box IoU with a better one of "
        "the same class is above this. Default: from torchvision.",
    )
    detections: int = Field(
        default=100, gt=0, description="Largest number of detections per image. Default: from torchvision."
    )

    mask_head_dim: int = Field(
        default=256, gt=0, description="Number of channels of the mask head. Default: from torchvision."
    )
    mask_head_convs: int = Field(
        default=4, gt=0, description="Number of 3x3 convolutions in the mask head. Default: from torchvision."
    )
    max_mask_rois: int | None = Field(
        default=None,
        gt=0,
        description="Largest number of positive regions per image in the mask losses, drawn at random. Default: null, "
        "which uses all of them, from torchvision.",
    )
    mask_iou_dim: int = Field(
        default=1024,
        gt=0,
        description="Width of the hidden layer of the mask-IoU branch. Default: from the released code.",
    )
    mask_iou_pool: Literal[1, 2, 7, 14] = Field(
        default=1,
        description="Kernel size of the average pooling of the 14x14 features that the mask-IoU branch reads; 1 means "
        "no pooling. Default: from the released code.",
    )
    mask_iou_loss_weight: float = Field(
        default=0.25, ge=0, description="Weight of the loss of the mask-IoU branch. Default: from the released code."
    )

    @model_validator(mode="after")
    def _coco_weights_fit(self) -> Self:
        if self.weights == "coco" and (self.backbone, self.preset) != ("resnet50", "r50"):
            raise ValueError("weights: 'coco' exists only for preset r50 with resnet50; use 'imagenet' or a file")
        return self
