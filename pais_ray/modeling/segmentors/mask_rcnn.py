"""Mask R-CNN with weights per instance and a mask-IoU branch, built from torchvision's modules.

Differs from the paper's mmdetection model as torchvision does: RoIAlign samples 2x2 points per cell, RoIs have no
low-quality matches, and frozen batch norm has no trainable affine parameters.

Legend: B images, N instances, C classes without background, H x W pixels of the padded view.
"""

import torch
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
    NormalizePixels,
    as_views,
    load_weights,
    read_weights,
    resnet_fpn,
)
from pais_ray.modeling.protocols import Segmentor
from pais_ray.modeling.segmentors._mask_rcnn_config import MaskRCNNConfig
from pais_ray.modeling.segmentors._mask_rcnn_graph import MaskRCNNGraph
from pais_ray.modeling.segmentors._mask_rcnn_heads import MaskIoUHead, WeightedRoIHeads, WeightedRPN
from pais_ray.structures.batch import Predictions, Targets, Views

BOX_SIZE, MASK_SIZE = 7, 14  # RoIAlign cells per side (Mask R-CNN paper, torchvision)
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


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
        batch, features = self.features(views)
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
        batch, features = self.features(as_views(views))
        proposals, _ = self.rpn.propose(batch, features)
        return self.roi_heads.detect(features, proposals, batch.image_sizes, score_threshold or 0.0)

    def graph(self) -> MaskRCNNGraph:
        """``predict`` for one image, over the same layers, for `pais-ray export`."""
        return MaskRCNNGraph(self.normalize, self.backbone, self.rpn, self.roi_heads)

    def features(self, views: Views) -> tuple[ImageList, dict[str, Tensor]]:
        """The normalized images, zero in the padding, and their features P2..P6."""
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
