"""Mask R-CNN with weights per instance and a mask-IoU branch, on torchvision's parts.

Differs from the paper's mmdetection model where torchvision does: RoIAlign takes 2x2 points a cell, RoIs
have no low-quality matches, frozen batch norm has no trainable affine.

Legend: B images, N instances, C classes without background, H x W pixels of the padded view.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import (
    MaskRCNN_ResNet50_FPN_Weights,
    MaskRCNNHeads,
    MaskRCNNPredictor,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pais_ray.segmentors._mask_rcnn_heads import MaskIoUHead, WeightedRoIHeads, WeightedRPN, same_normaliser
from pais_ray.structures import Predictions, Targets, Views

LEVELS = ["0", "1", "2", "3"]  # torchvision's names of P2..P5; P6 ("pool") feeds the RPN alone
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


class MaskRCNNConfig(BaseModel):
    """The section `segmentor:` when ``name`` is mask_rcnn. Fields not given come from ``preset``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["mask_rcnn"] = "mask_rcnn"
    preset: Literal["r50", "nano"] = "r50"
    backbone: str = "resnet50"  # any torchvision ResNet
    # None, `imagenet` (paper), `coco` (torchvision's Mask R-CNN, resnet50), a local .safetensors or .pth file
    weights: str | None = "imagenet"
    norm: Literal["frozen_bn", "group"] = "frozen_bn"  # `group` by default without weights
    # -1 none, 0 the stem, 1 the stem and layer1 (paper, released code), ...; -1 by default without weights
    frozen_stages: int = Field(default=1, ge=-1, le=4)
    fpn_channels: int = Field(default=256, gt=0)

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

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "r50")
        filled = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **given}
        weights = filled.get("weights", "imagenet")
        if weights is None:  # frozen statistics of nothing would normalise nothing
            filled = {"norm": "group", "frozen_stages": -1, **filled}
        elif weights in ("imagenet", "coco") and "norm" not in given:
            filled["norm"] = "frozen_bn"
        return filled

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, value: str) -> str:
        known = [n for n in torchvision.models.list_models(torchvision.models) if "resne" in n]
        if value not in known:
            near = difflib.get_close_matches(value, known, 1, 0)[0]
            raise ValueError(f"expected one of {known}, got {value!r}; did you mean {near!r}?")
        return value

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights in ("imagenet", "coco") and self.norm != "frozen_bn":
            raise ValueError(f"weights: {self.weights!r} come with batch norm, norm is {self.norm!r}; use frozen_bn")
        if self.weights == "coco" and (self.backbone, self.preset) != ("resnet50", "r50"):
            raise ValueError("weights: 'coco' exist for preset r50 with resnet50 only; use 'imagenet' or a file")
        return self


class MaskRCNN(nn.Module):
    """Mask R-CNN. Parameter names are torchvision's plus ``roi_heads.mask_iou_head``.

    Losses: `objectness`, `proposal_box` (RPN), `class`, `box`, `mask`, `mask_iou` (already times
    ``mask_iou_loss_weight``). Detections are ranked by class score alone, as in the released code.
    """

    Config = MaskRCNNConfig
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, num_classes: int, config: MaskRCNNConfig | None = None, pretrained: bool = True) -> None:
        """``num_classes`` without background. Loads the weights that ``config`` names, unless ``pretrained`` is
        False: a checkpoint will be loaded over them."""
        super().__init__()
        self.num_classes = num_classes
        self.config = config = config or MaskRCNNConfig()
        state = _pretrained(config) if pretrained else None  # first: a wrong path should not wait for a network
        self.backbone = _backbone(config)
        self.rpn = _rpn(config)
        self.roi_heads = _roi_heads(config, num_classes)
        # ImageNet statistics of RGB in [0, 1]
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        if state is not None:
            _load(self, state, str(config.weights))
        if config.weights == "coco":
            for module in self.modules():
                if isinstance(module, FrozenBatchNorm2d):
                    module.eps = 0.0  # as these weights were trained, before torchvision had an epsilon

    def forward(self, images: Views | Tensor, targets: list[Targets]) -> dict[str, Tensor]:
        """Named losses, each a scalar that touches its parameters even without targets.

        ``images`` is B views, or a tensor (B, 3, H, W) in [0, 1] without padding. ValueError where targets
        and images do not match in number, normalisers differ, or a box has no area.
        """
        views = _as_views(images)
        _check(views, targets, self.num_classes)
        batch, features = self._features(views)
        proposals, losses = self.rpn(batch, features, targets)
        losses |= self.roi_heads.losses(features, proposals, targets)
        losses["mask_iou"] = losses["mask_iou"] * self.config.mask_iou_loss_weight
        return losses

    @torch.no_grad()
    def predict(self, images: Views | Tensor, score_threshold: float | None = None) -> list[Predictions]:
        """What is seen in each of the B images, best first, whatever the module's mode.

        Detections below ``score_threshold``, where it is above the configured one, are dropped before the
        mask heads: exact for whoever needs none of them.
        """
        batch, features = self._features(_as_views(images))
        proposals, _ = self.rpn(batch, features)
        return self.roi_heads.detect(features, proposals, batch.image_sizes, score_threshold or 0.0)

    def _features(self, views: Views) -> tuple[ImageList, dict[str, Tensor]]:
        """Normalised images, zero in the padding, and their P2..P6."""
        height, width = views.images.shape[-2:]
        rows = torch.arange(height, device=views.images.device)[None, :, None] < views.sizes[:, 0, None, None]
        cols = torch.arange(width, device=views.images.device)[None, None, :] < views.sizes[:, 1, None, None]
        images = (views.images - self.pixel_mean) / self.pixel_std * (rows & cols)[:, None]
        sizes = [(int(h), int(w)) for h, w in views.sizes.tolist()]
        return ImageList(images, sizes), self.backbone(images)


def _as_views(images: Views | Tensor) -> Views:
    return Views.of(images) if isinstance(images, Tensor) else images


def _check(views: Views, targets: list[Targets], num_classes: int) -> None:
    if len(targets) != len(views):
        raise ValueError(f"MaskRCNN: expected {len(views)} targets, one an image, got {len(targets)}")
    same_normaliser(targets)
    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    bad = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1) | (labels < 0) | (labels >= num_classes)
    if bad.any():
        box, label = boxes[bad][0].tolist(), labels[bad][0].item()
        raise ValueError(
            f"MaskRCNN: expected boxes with x1 < x2, y1 < y2 and labels in 0..{num_classes - 1}, "
            f"got box {box} with label {label}; drop such targets"
        )


def _backbone(config: MaskRCNNConfig) -> BackboneWithFPN:
    norm = FrozenBatchNorm2d if config.norm == "frozen_bn" else _group_norm
    # Residual branches that begin at zero help the network without pretrained weights.
    body = getattr(torchvision.models, config.backbone)(
        weights=None, norm_layer=norm, zero_init_residual=config.norm == "group"
    )
    stem = nn.ModuleList([body.conv1, body.bn1])
    for stage in (stem, body.layer1, body.layer2, body.layer3, body.layer4)[: config.frozen_stages + 1]:
        stage.requires_grad_(False)
    narrow = body.inplanes // 8
    return BackboneWithFPN(
        body,
        return_layers={f"layer{i + 1}": name for i, name in enumerate(LEVELS)},
        in_channels_list=[narrow * 2**i for i in range(4)],
        out_channels=config.fpn_channels,
    )


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)


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


def _pretrained(config: MaskRCNNConfig) -> Mapping[str, Tensor] | None:
    """The state that ``config.weights`` names; a file's may be wrapped under `model` or `state_dict`."""
    if config.weights is None:
        return None
    if config.weights in ("imagenet", "coco"):
        named = torchvision.models.get_model_weights(config.backbone)["IMAGENET1K_V1"]
        named = MaskRCNN_ResNet50_FPN_Weights.COCO_V1 if config.weights == "coco" else named
        try:
            return named.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ValueError(
                f"segmentor.weights: could not fetch {named.url} ({error}); "
                "download it elsewhere and give the file's path, or use none"
            ) from error
    path = Path(config.weights)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"segmentor.weights: expected a .safetensors, .pth or .pt file, got {path.name!r}")
    if not path.is_file():
        raise ValueError(f"segmentor.weights: expected 'imagenet', 'coco' or a file; {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("model", state.get("state_dict", state))


def _load(model: MaskRCNN, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a ResNet classifier's or a whole Mask R-CNN's state.

    Layers whose size is the number of classes stay as initialised where that number differs, and so does
    the mask-IoU branch where ``state`` has none; anything else must fit, else ValueError.
    """
    if "conv1.weight" in state:
        state = {f"backbone.body.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        optional: tuple[str, ...] = ("backbone.fpn.", "rpn.", "roi_heads.")
    else:
        optional = ("roi_heads.mask_iou_head.",)
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if not (k.startswith(CLASS_LAYERS) and k in own and v.shape != own[k].shape)}
    left_out = set(state) - set(fits)
    # Batch norms count batches; the frozen ones have nothing to count.
    unknown = [k for k in fits if k not in own and not k.endswith("num_batches_tracked")]
    missing = [k for k in own if k not in fits and k not in left_out and not k.startswith(optional)]
    wrong = [k for k in fits if k in own and fits[k].shape != own[k].shape]
    if unknown or missing or wrong:
        raise ValueError(
            f"segmentor.weights: {source!r} does not fit this network: "
            f"{len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}; "
            "check segmentor.backbone, norm and fpn_channels"
        )
    model.load_state_dict({k: v for k, v in fits.items() if k in own}, strict=False)
