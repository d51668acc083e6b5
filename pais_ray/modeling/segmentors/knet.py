"""K-Net: N kernels, each of which finds the mask and class of one object; no boxes, no NMS (K-Net, NeurIPS 2021).

It has PAIS's mask-IoU branch. Scores are sigmoids, one per class, without a background class: c of a pseudo-label is
the probability of its class alone, and the scores of all classes need not add up to one. The exponents and thresholds
of DALoss therefore differ in meaning from those after Mask R-CNN's softmax.

Legend: B images, N kernels, T targets of all images, P pairs of kernel and target, C classes, H x W pixels of the
padded view, X cells of stride 4 or points at which masks are compared.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pais_ray.modeling import losses
from pais_ray.modeling.backbones import (
    BackboneConfig,
    NormalizePixels,
    as_views,
    load_weights,
    read_weights,
    resnet_fpn,
    valid_pixels,
)
from pais_ray.modeling.protocols import Segmentor
from pais_ray.modeling.segmentors._knet_graph import KNetGraph
from pais_ray.modeling.segmentors._knet_kernels import (
    KernelHead,
    SemanticFPN,
    StageOutput,
    UpdateStage,
    read,
    sample_at,
)
from pais_ray.modeling.segmentors._knet_matching import Match, assign, cost
from pais_ray.structures.batch import Predictions, Targets, Views
from pais_ray.structures.masks import Masks

STRIDE = 4  # px per cell of the masks that are compared and predicted (released code)

# Preset -> its differences from the defaults of the fields.
PRESETS: dict[str, dict[str, Any]] = {
    "r50": {},
    # Ours: trains from scratch on one CPU core, with images of 128 to 320 px.
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
        description="Defaults for the settings not given: the paper's network (r50), or a small one that trains from "
        "scratch on a CPU (nano, ours). Default: r50.",
    )
    PRESETS: ClassVar = PRESETS

    num_kernels: int = Field(
        default=100,
        gt=0,
        description="Number of kernels, which limits the objects found in one image. Default: released code.",
    )
    stages: int = Field(default=3, ge=1, description="Number of stages that update the kernels. Default: K-Net-S3.")
    attention_heads: int = Field(
        default=8, gt=0, description="Heads of the self-attention over the kernels. Default: released code."
    )
    ffn_dim: int = Field(
        default=2048, gt=0, description="Width of the feed-forward layer of every stage. Default: released code."
    )
    detections: int = Field(
        default=100, gt=0, description="Largest number of detections per image. Default: released code."
    )
    score_threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Detections below this class score are dropped. Default: none are dropped (released code).",
    )
    classes_per_kernel: Literal["best", "all"] = Field(
        default="best",
        description="Whether a kernel is a detection of its most likely class only (best), or of every class with a "
        "score among the best of the image (all). With all, a pseudo-label can occur twice with different classes, "
        "and two kernels are then matched to one object. Default: ours; released code: all.",
    )
    mask_points: int | None = Field(
        default=None,
        gt=0,
        description="Number of random points at which masks are compared in matching and losses. "
        "Default: null, which compares every cell of stride 4 (released code).",
    )

    class_weight: float = Field(
        default=2.0,
        ge=0,
        description="Weight of the class term in the loss and in the matching cost. "
        "Default: released code; paper 4.2 names 4, 2 and 1 for its three terms.",
    )
    dice_weight: float = Field(
        default=4.0,
        ge=0,
        description="Weight of the dice term in the loss and in the matching cost. Default: released code.",
    )
    mask_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the cross-entropy of the masks in the loss, and of their pixel agreement in the "
        "matching cost. Default: released code.",
    )
    mask_iou_weight: float = Field(
        default=1.0, ge=0, description="Weight of the loss of the mask-IoU branch. Default: released code."
    )
    semantic_weight: float = Field(
        default=1.0, ge=0, description="Weight of the auxiliary semantic loss. Default: released code."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> "KNetConfig":
        if self.fpn_channels % self.attention_heads or self.fpn_channels % 4:
            raise ValueError(
                f"fpn_channels: expected a multiple of 4 and of attention_heads={self.attention_heads}, "
                f"got {self.fpn_channels}"
            )
        return self


class KNet(Segmentor):
    """K-Net with weights per instance and a mask-IoU branch.

    Losses, summed over the kernel head and all stages and multiplied by their weights: `class` (focal), `mask`
    (cross-entropy + dice), `mask_iou`, `semantic` (auxiliary; PAIS omits it on unlabeled images). Every kernel without
    a target has the weight ``negative_weight`` in the class loss.
    """

    Config = KNetConfig

    def __init__(self, num_classes: int, config: KNetConfig | None = None, pretrained: bool = True) -> None:
        super().__init__(num_classes, config, pretrained)
        self.config = config = config or KNetConfig()
        # Read the weights first, so that a wrong path fails before the network is built.
        state = read_weights(config) if pretrained else None
        channels = config.fpn_channels
        self.normalize = NormalizePixels()
        self.backbone = resnet_fpn(config)
        self.fusion = SemanticFPN(channels, channels)
        self.kernel_head = KernelHead(channels, config.num_kernels, num_classes)
        self.stages = nn.ModuleList(
            UpdateStage(channels, num_classes, config.attention_heads, config.ffn_dim) for _ in range(config.stages)
        )
        if state is not None:
            layers = [f"stages.{i}.class_branch.3." for i in range(config.stages)]
            load_weights(
                self,
                state,
                str(config.weights),
                class_layers=("kernel_head.semantic.", *layers),
                heads=("fusion.", "kernel_head.", "stages."),
            )

    def forward(self, views: Views | Tensor, targets: list[Targets]) -> dict[str, Tensor]:
        """Named losses, each a scalar that depends on its parameters even without targets.

        ``views`` is B views, or a tensor (B, 3, H, W) in [0, 1] without padding. Raises ValueError if the numbers of
        targets and images differ, normalizers differ, or a label is not one of the classes.
        """
        views = as_views(views)
        _check(views, targets, self.num_classes)
        outputs, semantic = self._outputs(views)
        height, width = views.images.shape[-2:]
        grids = torch.cat([t.masks.to_grid(STRIDE, (height, width)) for t in targets])  # (T, H / 4, W / 4)
        image = torch.repeat_interleave(
            torch.arange(len(targets)), torch.tensor([len(t) for t in targets]), output_size=len(grids)
        ).to(grids.device)
        points = self._points(len(targets), grids.device)
        wanted = grids.flatten(1) if points is None else sample_at(grids[:, None], points[image])[:, 0]
        return {
            **self._matched_losses(outputs, targets, wanted, points),
            "semantic": self._semantic_loss(semantic, targets, grids, image),
        }

    @torch.no_grad()
    def predict(self, views: Views | Tensor, score_threshold: float | None = None) -> list[Predictions]:
        """Detections in each of the B images, best first, whatever the mode of the module.

        They are ranked by class score alone (released code); kernels with an empty mask give none. Boxes are those
        around the masks. Detections below ``score_threshold``, if it is above the configured one, are dropped.
        """
        views = as_views(views)
        outputs, _ = self._outputs(views)
        last = outputs[-1]
        assert last.classes is not None
        assert last.ious is not None
        minimum = max(self.config.score_threshold, score_threshold or 0.0)
        found = [
            self._detect(classes.sigmoid(), ious.sigmoid(), masks, size, minimum)
            for classes, ious, masks, size in zip(last.classes, last.ious, last.masks, views.sizes, strict=True)
        ]
        sums = [v.sum(dtype=torch.float32) for v in (last.classes, last.ious, last.masks)]  # what is not shows there
        finite = torch.stack(sums).isfinite().all()
        return [dataclasses.replace(seen, finite=finite) for seen in found]

    def graph(self) -> KNetGraph:
        """``predict`` for one image, over the same layers, for `pais-ray export`."""
        return KNetGraph(self)

    def _outputs(self, views: Views) -> tuple[list[StageOutput], Tensor]:
        """The outputs of the kernel head and of every stage, and the semantic features (B, D, h, w)."""
        pyramid = list(self.backbone(self.normalize(views)).values())[:4]
        for_masks, for_classes = self.fusion(pyramid)
        first, kernels, features = self.kernel_head(for_masks, for_classes)
        outputs = [first]
        for stage in self.stages:
            output, kernels = stage(features, kernels, outputs[-1].masks)
            outputs.append(output)
        return outputs, for_classes

    def _points(self, num: int, device: torch.device) -> Tensor | None:
        """Random points (B, K, 2) in [-1, 1], shared by matching and losses, or None to use every cell."""
        if self.config.mask_points is None:
            return None
        return torch.rand(num, self.config.mask_points, 2, device=device) * 2 - 1

    def _match(
        self, outputs: list[StageOutput], targets: list[Targets], wanted: Tensor, points: Tensor | None
    ) -> list[Match]:
        """Match targets to the kernels of each of ``outputs``, by the output before it; the kernel head by its own.

        Only here do masks of all kernels exist at stride 4: for one output at a time and without a graph.
        """
        counts = [len(t) for t in targets]
        slots = [torch.arange(n) for n in counts]
        image = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)]).to(wanted.device)
        slot = torch.cat(slots).to(wanted.device)
        masks = wanted.new_zeros(len(targets), max(counts), wanted.shape[1])
        masks[image, slot] = wanted
        labels = torch.zeros(masks.shape[:2], dtype=torch.long, device=wanted.device)
        labels[image, slot] = torch.cat([t.labels for t in targets])
        config = self.config
        weights = (config.class_weight, config.dice_weight, config.mask_weight)
        with torch.no_grad():
            costs = [cost(o.classes, read(o.masks, points), labels, masks, weights) for o in outputs[:-1]]
        matches = assign(costs, counts)
        return [matches[0], *matches]

    def _matched_losses(
        self, outputs: list[StageOutput], targets: list[Targets], wanted: Tensor, points: Tensor | None
    ) -> dict[str, Tensor]:
        config, device = self.config, wanted.device
        shared = torch.cat([t.labels for t in targets])
        class_weight = torch.cat([t.class_weight for t in targets])
        mask_weight = torch.cat([t.mask_weight for t in targets])
        negative = torch.tensor([t.negative_weight for t in targets]).to(device)
        total: dict[str, list[Tensor]] = {"class": [], "mask": [], "mask_iou": []}
        matches = self._match(outputs, targets, wanted, points)
        for output, match in zip(outputs, matches, strict=True):
            paired = match.image, match.kernel
            own = points[match.image] if points is not None else None
            logits = read(output.masks[paired][:, None], own)[:, 0]  # (P, X)
            truth, weight = wanted[match.target], mask_weight[match.target]
            total["mask"] += [
                losses.binary_cross_entropy(logits, truth, weight, len(match)) * config.mask_weight,
                losses.dice(logits, truth, weight, len(match)) * config.dice_weight,
            ]
            if output.classes is None or output.ious is None:
                continue
            labels = torch.full(output.classes.shape[:2], self.num_classes, device=device)
            labels[paired] = shared[match.target]
            weights = negative[:, None].repeat(1, labels.shape[1])
            weights[paired] = class_weight[match.target]
            class_loss = losses.focal(
                output.classes.flatten(0, 1), labels.flatten(), weights.flatten(), targets[0].normalizer
            )
            total["class"].append(class_loss * config.class_weight)
            total["mask_iou"].append(losses.mask_iou(output.ious[paired], logits, truth) * config.mask_iou_weight)
        return {name: torch.stack(values).sum() for name, values in total.items()}

    def _semantic_loss(self, features: Tensor, targets: list[Targets], grids: Tensor, image: Tensor) -> Tensor:
        """The semantic loss at the features' own stride of 8; the released code upsamples the map first."""
        logits = self.kernel_head.semantic(features).float()
        coarse = (F.avg_pool2d(grids[:, None], 2)[:, 0] > 0.5).float()  # (T, h, w)
        truth = torch.zeros_like(logits)
        truth.index_put_((image, torch.cat([t.labels for t in targets])), coarse, accumulate=True)
        return losses.semantic(logits, truth.clamp_(max=1)) * self.config.semantic_weight

    def _detect(self, scores: Tensor, ious: Tensor, masks: Tensor, size: Tensor, minimum: float) -> Predictions:
        """One image's: ``scores`` (N, C), ``ious`` (N,), ``masks`` (N, h, w) logits, valid ``size`` (2,)."""
        if self.config.classes_per_kernel == "best":
            best, label = scores.max(dim=1)
            kernel = torch.arange(len(scores), device=scores.device)
        else:
            best = scores.flatten()
            kernel, label = torch.unravel_index(torch.arange(len(best), device=best.device), scores.shape)
        ranked = torch.sort(best, descending=True, stable=True).indices[: self.config.detections]
        ranked = ranked[best[ranked] >= minimum]
        kernel = kernel[ranked]
        shape = (2 * masks.shape[1], 2 * masks.shape[2])
        soft = read(masks[kernel][:, None], None)[:, 0].sigmoid().unflatten(1, shape)
        soft = soft * valid_pixels(size[None], shape, STRIDE)
        boxes, seen = mask_boxes(soft > 0.5, size)
        ranked, kernel = ranked[seen], kernel[seen]
        return Predictions(
            boxes=boxes[seen],
            labels=label[ranked],
            scores=best[ranked],
            ious=ious[kernel],
            masks=Masks.strided(soft[seen], STRIDE),
        )


def mask_boxes(masks: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) px of the view around bool ``masks`` (N, h, w) of stride 4, clipped to the valid ``size``
    (2,), and which of them (N,) hold anything."""
    rows, cols = masks.any(dim=2), masks.any(dim=1)
    edges = [extent(side) for side in (cols, rows)]
    (x1, x2), (y1, y2) = [(low * STRIDE, high * STRIDE) for low, high in edges]
    height, width = size[0], size[1]
    boxes = torch.stack([x1, y1, torch.minimum(x2, width), torch.minimum(y2, height)], dim=1).float()
    return boxes, rows.any(dim=1)


def extent(on: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of ``on`` (N, n)."""
    cells = on.to(torch.uint8)
    return cells.argmax(dim=1), on.shape[1] - cells.flip(1).argmax(dim=1)


def _check(views: Views, targets: list[Targets], num_classes: int) -> None:
    if len(targets) != len(views):
        raise ValueError(f"KNet: expected {len(views)} targets, one per image, got {len(targets)}")
    losses.same_normalizer(t.normalizer for t in targets)
    labels = torch.cat([t.labels for t in targets])
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        raise ValueError(f"KNet: expected labels in 0..{num_classes - 1}, got {labels[bad][0].item()}")
