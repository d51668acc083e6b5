"""Mask R-CNN with weights per instance and a mask-IoU branch, on torchvision's parts.

Differs from the paper's mmdetection model where torchvision does: RoIAlign takes 2x2 points a cell, RoIs
have no low-quality matches, frozen batch norm has no trainable affine.

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

BOX_SIZE, MASK_SIZE = 7, 14  # RoIAlign cells, paper of Mask R-CNN and torchvision
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

# What differs from the fields' defaults, which are the preset `r50`.
PRESETS: dict[str, dict[str, Any]] = {
    "r50": {},
    # Ours: trains from scratch on one CPU core, images of 128 to 320 px.
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
    """The section `segmentor:` when ``name`` is mask_rcnn. Fields not given come from ``preset``."""

    name: Literal["mask_rcnn"] = "mask_rcnn"
    preset: Literal["r50", "nano"] = "r50"
    PRESETS: ClassVar = PRESETS
    # `weights` may be `coco` too: torchvision's Mask R-CNN, resnet50

    anchor_sizes: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)  # px, one for each of P2..P6
    anchor_ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    # One pair of limits for training and prediction: the released teacher too uses those of training.
    rpn_pre_nms: int = Field(default=2000, gt=0)  # a level (released code)
    rpn_post_nms: int = Field(default=1000, gt=0)  # an image (released code; torchvision trains with 2000)
    rpn_nms: float = Field(default=0.7, gt=0, le=1)
    rpn_batch_size: int = Field(default=256, gt=0)  # sampled anchors an image
    rpn_positive_fraction: float = Field(default=0.5, gt=0, le=1)
    rpn_positive_iou: float = Field(default=0.7, gt=0, le=1)
    rpn_negative_iou: float = Field(default=0.3, ge=0, le=1)

    roi_canonical_size: int = Field(default=224, gt=0)  # side in px of the box that is read from P4 (FPN's Eq. 1)
    box_batch_size: int = Field(default=512, gt=0)  # sampled RoIs an image
    box_positive_fraction: float = Field(default=0.25, gt=0, le=1)
    box_positive_iou: float = Field(default=0.5, gt=0, le=1)
    box_head_dim: int = Field(default=1024, gt=0)
    smooth_l1_beta: float = Field(default=1 / 9, ge=0)  # torchvision; 0 is the L1 of the released COCO runs
    score_threshold: float = Field(default=0.05, ge=0, le=1)
    nms: float = Field(default=0.5, gt=0, le=1)
    detections: int = Field(default=100, gt=0)  # an image, at most

    mask_head_dim: int = Field(default=256, gt=0)
    mask_head_convs: int = Field(default=4, gt=0)
    max_mask_rois: int | None = Field(default=None, gt=0)  # of one image in training; None: every positive
    mask_iou_dim: int = Field(default=1024, gt=0)  # released code
    mask_iou_pool: Literal[1, 2, 7, 14] = 1  # averages the 14x14 features first; released code: 1
    mask_iou_loss_weight: float = Field(default=0.25, ge=0)  # released code

    @model_validator(mode="after")
    def _coco_weights_fit(self) -> Self:
        if self.weights == "coco" and (self.backbone, self.preset) != ("resnet50", "r50"):
            raise ValueError("weights: 'coco' exist for preset r50 with resnet50 only; use 'imagenet' or a file")
        return self


class MaskRCNN(Segmentor):
    """Mask R-CNN. Parameter names are torchvision's plus ``roi_heads.mask_iou_head``.

    Losses: `objectness`, `proposal_box` (RPN), `class`, `box`, `mask`, `mask_iou` (already times
    ``mask_iou_loss_weight``). Detections are ranked by class score alone, as in the released code.
    """

    Config = MaskRCNNConfig

    def __init__(self, num_classes: int, config: MaskRCNNConfig | None = None, pretrained: bool = True) -> None:
        """``num_classes`` without background. Loads the weights that ``config`` names, unless ``pretrained`` is
        False: a checkpoint will be loaded over them."""
        super().__init__(num_classes, config, pretrained)
        self.config = config = config or MaskRCNNConfig()
        # First: a wrong path should not wait for a network.
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
        """Named losses, each a scalar that touches its parameters even without targets.

        ``views`` is B views, or a tensor (B, 3, H, W) in [0, 1] without padding. ValueError where targets
        and images do not match in number, normalizers differ, or a box has no area.
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
        """What is seen in each of the B images, best first, whatever the module's mode.

        Detections below ``score_threshold``, where it is above the configured one, are dropped before the
        mask heads: exact for whoever needs none of them.
        """
        batch, features = self._features(as_views(views))
        proposals, _ = self.rpn.propose(batch, features)
        return self.roi_heads.detect(features, proposals, batch.image_sizes, score_threshold or 0.0)

    def graph(self) -> MaskRCNNGraph:
        """``predict`` for one image, over the same layers, as `pais-ray export` takes it."""
        return MaskRCNNGraph(self.normalize, self.backbone, self.rpn, self.roi_heads)

    def _features(self, views: Views) -> tuple[ImageList, dict[str, Tensor]]:
        """Normalized images, zero in the padding, and their P2..P6."""
        images = self.normalize(views)
        sizes = [(int(h), int(w)) for h, w in views.sizes.tolist()]
        return ImageList(images, sizes), self.backbone(images)


def _check(views: Views, targets: list[Targets], num_classes: int) -> None:
    if len(targets) != len(views):
        raise ValueError(f"MaskRCNN: expected {len(views)} targets, one an image, got {len(targets)}")
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
