"""Mask R-CNN with weights per instance and a mask-IoU branch, built from torchvision's modules.

Differs from the paper's mmdetection model as torchvision does: RoIAlign samples 2x2 points per cell, RoIs have no
low-quality matches, and frozen batch norm has no trainable affine parameters.

Legend: B images, N instances, C classes without background, H x W pixels of the padded view.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import (
    MaskRCNN_ResNet50_FPN_Weights,
    MaskRCNNHeads,
    MaskRCNNPredictor,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pais_ray.modeling import losses
from pais_ray.modeling.backbones import (
    LEVELS,
    BackboneConfig,
    NormalizePixels,
    as_views,
    load_weights,
    read_weights,
    resnet_fpn,
)
from pais_ray.modeling.protocols import Segmentor
from pais_ray.modeling.segmentors._mask_rcnn_graph import MaskRCNNGraph
from pais_ray.modeling.segmentors._mask_rcnn_heads import MaskIoUHead, WeightedRoIHeads, WeightedRPN
from pais_ray.structures.batch import Predictions, Targets, Views

BOX_SIZE, MASK_SIZE = 7, 14  # RoIAlign cells per side (Mask R-CNN paper, torchvision)
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

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


class MaskRCNN(Segmentor):
    """Mask R-CNN. Parameter names are torchvision's plus ``roi_heads.mask_iou_head``.

    Losses: `objectness` and `proposal_box` (RPN), `class`, `box`, `mask`, and `mask_iou` (already multiplied by
    ``mask_iou_loss_weight``). Detections are ranked by class score alone, as in the released code.
    """

    Config = MaskRCNNConfig

    def __init__(self, num_classes: int, config: MaskRCNNConfig | None = None, pretrained: bool = True) -> None:
        super().__init__(num_classes, config, pretrained)
        self.config = config = config or MaskRCNNConfig()
        # Read the weights first, so that a wrong path fails before the network is built.
        state = read_weights(config, {"coco": MaskRCNN_ResNet50_FPN_Weights.COCO_V1}) if pretrained else None
        self.normalize = NormalizePixels()
        self.backbone = resnet_fpn(config)
        self.rpn = _rpn(config)
        self.roi_heads = _roi_heads(config, num_classes)
        if state is not None:
            load_weights(
                self,
                state,
                str(config.weights),
                class_layers=CLASS_LAYERS,
                heads=("rpn.", "roi_heads."),
                optional=("roi_heads.mask_iou_head.",),
            )
        if config.weights == "coco":
            for module in self.modules():
                if isinstance(module, FrozenBatchNorm2d):
                    module.eps = 0.0  # as these weights were trained, before torchvision had an epsilon

    def forward(self, views: Views | Tensor, targets: list[Targets]) -> dict[str, Tensor]:
        """Named losses, each a scalar that depends on its parameters even without targets.

        ``views`` is B views, or a tensor (B, 3, H, W) in [0, 1] without padding. Raises ValueError if the numbers of
        targets and images differ, normalizers differ, a box has no area, or a label is not one of the classes.
        """
        views = as_views(views)
        _check(views, targets, self.num_classes)
        batch, features = self._features(views)
        proposals, named = self.rpn.propose(batch, features, targets)
        named |= self.roi_heads.losses(features, proposals, targets)
        named["mask_iou"] = named["mask_iou"] * self.config.mask_iou_loss_weight
        return named

    @torch.no_grad()
    def predict(self, views: Views | Tensor, score_threshold: float | None = None) -> list[Predictions]:
        """Detections in each of the B images, best first, whatever the mode of the module.

        Detections below ``score_threshold``, if it is above the configured one, are dropped before the mask heads. The
        others are not affected.
        """
        batch, features = self._features(as_views(views))
        proposals, _ = self.rpn.propose(batch, features)
        return self.roi_heads.detect(features, proposals, batch.image_sizes, score_threshold or 0.0)

    def graph(self) -> MaskRCNNGraph:
        """``predict`` for one image, over the same layers, for `pais-ray export`."""
        return MaskRCNNGraph(self.normalize, self.backbone, self.rpn, self.roi_heads)

    def _features(self, views: Views) -> tuple[ImageList, dict[str, Tensor]]:
        """Normalized images, zero in the padding, and their P2..P6."""
        images = self.normalize(views)
        sizes = [(int(h), int(w)) for h, w in views.sizes.tolist()]
        return ImageList(images, sizes), self.backbone(images)


def _check(views: Views, targets: list[Targets], num_classes: int) -> None:
    if len(targets) != len(views):
        raise ValueError(f"MaskRCNN: expected {len(views)} targets, one per image, got {len(targets)}")
    losses.same_normalizer(t.normalizer for t in targets)
    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    bad = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1) | (labels < 0) | (labels >= num_classes)
    if bad.any():
        box, label = boxes[bad][0].tolist(), labels[bad][0].item()
        raise ValueError(
            f"MaskRCNN: expected boxes with x1 < x2, y1 < y2 and labels in 0..{num_classes - 1}, "
            f"got box {box} with label {label}; drop such targets"
        )


def _rpn(config: MaskRCNNConfig) -> WeightedRPN:
    anchors = AnchorGenerator(
        tuple((size,) for size in config.anchor_sizes), (config.anchor_ratios,) * len(config.anchor_sizes)
    )
    rpn = WeightedRPN(
        anchors,
        RPNHead(config.fpn_channels, anchors.num_anchors_per_location()[0]),
        config.rpn_positive_iou,
        config.rpn_negative_iou,
        config.rpn_batch_size,
        config.rpn_positive_fraction,
        dict.fromkeys(("training", "testing"), config.rpn_pre_nms),
        dict.fromkeys(("training", "testing"), config.rpn_post_nms),
        config.rpn_nms,
    )
    rpn.smooth_l1_beta = config.smooth_l1_beta
    return rpn


def _roi_heads(config: MaskRCNNConfig, num_classes: int) -> WeightedRoIHeads:
    heads = WeightedRoIHeads(
        _pooler(config, BOX_SIZE),
        TwoMLPHead(config.fpn_channels * BOX_SIZE**2, config.box_head_dim),
        FastRCNNPredictor(config.box_head_dim, num_classes + 1),
        config.box_positive_iou,
        config.box_positive_iou,
        config.box_batch_size,
        config.box_positive_fraction,
        None,
        config.score_threshold,
        config.nms,
        config.detections,
        _pooler(config, MASK_SIZE),
        MaskRCNNHeads(config.fpn_channels, [config.mask_head_dim] * config.mask_head_convs, 1),
        MaskRCNNPredictor(config.mask_head_dim, config.mask_head_dim, num_classes + 1),
    )
    heads.mask_iou_head = MaskIoUHead(config.mask_head_dim, MASK_SIZE, config.mask_iou_dim, config.mask_iou_pool)
    heads.smooth_l1_beta = config.smooth_l1_beta
    heads.max_mask_rois = config.max_mask_rois
    return heads


def _pooler(config: MaskRCNNConfig, size: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(LEVELS, size, sampling_ratio=2, canonical_scale=config.roi_canonical_size)
