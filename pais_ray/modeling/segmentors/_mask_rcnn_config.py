"""The settings of Mask R-CNN."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pais_ray.modeling.backbones import BackboneConfig

# Preset -> its differences from the defaults of the fields.
PRESETS: dict[str, dict[str, Any]] = {
    "r50": {},
    # Ours: trains from scratch on one CPU core, with images of 128 to 320 px.
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
        description="Defaults for the settings not given: the paper's network (r50), or a small one that trains from "
        "scratch on a CPU (nano, ours). Default: r50.",
    )
    PRESETS: ClassVar = PRESETS

    anchor_sizes: tuple[int, int, int, int, int] = Field(
        default=(32, 64, 128, 256, 512),
        description="Side of the square anchor in px, for each of the pyramid levels P2 to P6. Default: torchvision.",
    )
    anchor_ratios: tuple[float, ...] = Field(
        default=(0.5, 1.0, 2.0),
        min_length=1,
        description="Height over width of the anchors at every position. Default: torchvision.",
    )
    # One pair of limits for training and prediction: the released teacher also uses those of training.
    rpn_pre_nms: int = Field(
        default=2000,
        gt=0,
        description="Proposals per pyramid level that enter non-maximum suppression, in training and prediction. "
        "Default: released code.",
    )
    rpn_post_nms: int = Field(
        default=1000,
        gt=0,
        description="Proposals per image that are left after non-maximum suppression, in training and prediction. "
        "Default: released code; torchvision trains with 2000.",
    )
    rpn_nms: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="A proposal is suppressed by a better one if their box IoU is above this. Default: torchvision.",
    )
    rpn_batch_size: int = Field(
        default=256, gt=0, description="Sampled anchors per image in the proposal losses. Default: torchvision."
    )
    rpn_positive_fraction: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Largest share of positives among the sampled anchors. Default: torchvision.",
    )
    rpn_positive_iou: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="An anchor with at least this box IoU with a target is positive, as is each target's best one. "
        "Default: torchvision.",
    )
    rpn_negative_iou: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="An anchor with less than this box IoU with every target is background; anchors in between are "
        "ignored. Default: torchvision.",
    )

    roi_canonical_size: int = Field(
        default=224,
        gt=0,
        description="Side in px of the boxes whose features are read from P4; larger boxes use coarser levels, smaller "
        "ones finer levels. Default: FPN paper, Eq. 1.",
    )
    box_batch_size: int = Field(
        default=512, gt=0, description="Sampled regions of interest per image in the box losses. Default: torchvision."
    )
    box_positive_fraction: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Largest share of positives among the sampled regions of interest. Default: torchvision.",
    )
    box_positive_iou: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="A region with at least this box IoU with a target is positive, others are background. "
        "Default: torchvision.",
    )
    box_head_dim: int = Field(
        default=1024, gt=0, description="Width of the two fully connected layers of the box head. Default: torchvision."
    )
    smooth_l1_beta: float = Field(
        default=1 / 9,
        ge=0,
        description="Error at which the box losses change from quadratic to linear; 0 gives the L1 loss "
        "of the released COCO configs. Default: torchvision.",
    )
    score_threshold: float = Field(
        default=0.05, ge=0, le=1, description="Detections must have a class score above this. Default: torchvision."
    )
    nms: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="A detection is suppressed by a better one of its class if their box IoU is above this. "
        "Default: torchvision.",
    )
    detections: int = Field(
        default=100, gt=0, description="Largest number of detections per image. Default: torchvision."
    )

    mask_head_dim: int = Field(
        default=256, gt=0, description="Number of channels of the mask head. Default: torchvision."
    )
    mask_head_convs: int = Field(
        default=4, gt=0, description="Number of 3x3 convolutions in the mask head. Default: torchvision."
    )
    max_mask_rois: int | None = Field(
        default=None,
        gt=0,
        description="Largest number of positive regions per image in the mask losses, drawn at random. "
        "Default: null, which uses all of them (torchvision).",
    )
    mask_iou_dim: int = Field(
        default=1024, gt=0, description="Width of the hidden layer of the mask-IoU branch. Default: released code."
    )
    mask_iou_pool: Literal[1, 2, 7, 14] = Field(
        default=1,
        description="Side of the average pooling of the 14x14 features that the mask-IoU branch reads; 1 means none. "
        "Default: released code.",
    )
    mask_iou_loss_weight: float = Field(
        default=0.25, ge=0, description="Weight of the loss of the mask-IoU branch. Default: released code."
    )

    @model_validator(mode="after")
    def _coco_weights_fit(self) -> Self:
        if self.weights == "coco" and (self.backbone, self.preset) != ("resnet50", "r50"):
            raise ValueError("weights: 'coco' exists only for preset r50 with resnet50; use 'imagenet' or a file")
        return self
