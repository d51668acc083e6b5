"""K-Net: N kernels, each of which finds the mask and class of one object; no boxes, no NMS (K-Net, NeurIPS 2021).

It has PAIS's mask-IoU branch. Scores are sigmoids, one per class, without a background class: c of a pseudo-label is
the probability of its class alone, and the scores of all classes need not add up to one. The exponents and thresholds
of DALoss therefore differ in meaning from those after Mask R-CNN's softmax.

Legend: B images, N kernels, T targets of all images, P pairs of kernel and target, C classes, H x W pixels of the
padded view, X cells of stride 4 or points at which masks are compared.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pais_ray.modeling import losses
from pais_ray.modeling.backbones import NormalizePixels, as_views, load_weights, read_weights, resnet_fpn
from pais_ray.modeling.protocols import Segmentor
from pais_ray.modeling.segmentors._knet_config import KNetConfig
from pais_ray.modeling.segmentors._knet_decode import STRIDE, decode
from pais_ray.modeling.segmentors._knet_graph import KNetGraph
from pais_ray.modeling.segmentors._knet_kernels import (
    KernelHead,
    SemanticFPN,
    StageOutput,
    UpdateStage,
    kernel_outputs,
    mask_values,
    sample_points,
)
from pais_ray.modeling.segmentors._knet_matching import Matching, assign, matching_cost
from pais_ray.structures.batch import Predictions, Targets, Views


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
        outputs, semantic = self.outputs(views)
        height, width = views.images.shape[-2:]
        grids = torch.cat([t.masks.to_grid(STRIDE, (height, width)) for t in targets])  # (T, H / 4, W / 4)
        image = torch.repeat_interleave(
            torch.arange(len(targets)), torch.tensor([len(t) for t in targets]), output_size=len(grids)
        ).to(grids.device)
        points = self._points(len(targets), grids.device)
        mask_targets = grids.flatten(1) if points is None else sample_points(grids[:, None], points[image])[:, 0]
        return {
            **self._matched_losses(outputs, targets, mask_targets, points),
            "semantic": self._semantic_loss(semantic, targets, grids, image),
        }

    @torch.no_grad()
    def predict(self, views: Views | Tensor, score_threshold: float | None = None) -> list[Predictions]:
        """Detections in each of the B images, best first, whatever the mode of the module.

        They are ranked by class score alone (released code); kernels with an empty mask give none. Boxes are those
        around the masks. Detections below ``score_threshold``, if it is above the configured one, are dropped.
        """
        views = as_views(views)
        outputs, _ = self.outputs(views)
        last = outputs[-1]
        # One value that is not finite makes its sum not finite.
        sums = [v.sum(dtype=torch.float32) for v in (last.classes, last.ious, last.masks) if v is not None]
        finite = torch.stack(sums).isfinite().all()
        found = decode(last, views.sizes, self.config, score_threshold)
        return [dataclasses.replace(predictions, finite=finite) for predictions in found]

    def graph(self) -> KNetGraph:
        """``predict`` for one image, over the same layers, for `pais-ray export`."""
        return KNetGraph(self.normalize, self.backbone, self.fusion, self.kernel_head, self.stages, self.config)

    def outputs(self, views: Views) -> tuple[list[StageOutput], Tensor]:
        """The outputs of the kernel head and of every stage, and the semantic features (B, D, h, w)."""
        pyramid = list(self.backbone(self.normalize(views)).values())[:4]
        return kernel_outputs(self.fusion, self.kernel_head, self.stages, pyramid)

    def _points(self, num: int, device: torch.device) -> Tensor | None:
        """Random points (B, K, 2) in [-1, 1], shared by matching and losses, or None to use every cell."""
        if self.config.mask_points is None:
            return None
        return torch.rand(num, self.config.mask_points, 2, device=device) * 2 - 1

    def _match(
        self, outputs: list[StageOutput], targets: list[Targets], mask_targets: Tensor, points: Tensor | None
    ) -> list[Matching]:
        """Match targets to the kernels of each of ``outputs``, by the output before it; the kernel head by its own.

        Only here do masks of all kernels exist at stride 4: for one output at a time and without a graph.
        """
        counts = [len(t) for t in targets]
        slots = [torch.arange(n) for n in counts]
        image = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)]).to(mask_targets.device)
        slot = torch.cat(slots).to(mask_targets.device)
        masks = mask_targets.new_zeros(len(targets), max(counts), mask_targets.shape[1])
        masks[image, slot] = mask_targets
        labels = torch.zeros(masks.shape[:2], dtype=torch.long, device=mask_targets.device)
        labels[image, slot] = torch.cat([t.labels for t in targets])
        config = self.config
        weights = (config.class_weight, config.dice_weight, config.mask_weight)
        with torch.no_grad():
            costs = [
                matching_cost(o.classes, mask_values(o.masks, points), labels, masks, weights) for o in outputs[:-1]
            ]
        matches = assign(costs, counts)
        return [matches[0], *matches]

    def _matched_losses(
        self, outputs: list[StageOutput], targets: list[Targets], mask_targets: Tensor, points: Tensor | None
    ) -> dict[str, Tensor]:
        config, device = self.config, mask_targets.device
        all_labels = torch.cat([t.labels for t in targets])
        class_weight = torch.cat([t.class_weight for t in targets])
        mask_weight = torch.cat([t.mask_weight for t in targets])
        negative = torch.tensor([t.negative_weight for t in targets]).to(device)
        total: dict[str, list[Tensor]] = {"class": [], "mask": [], "mask_iou": []}
        matches = self._match(outputs, targets, mask_targets, points)
        for output, match in zip(outputs, matches, strict=True):
            paired = match.image, match.kernel
            pair_points = points[match.image] if points is not None else None
            logits = mask_values(output.masks[paired][:, None], pair_points)[:, 0]  # (P, X)
            expected, weight = mask_targets[match.target], mask_weight[match.target]
            total["mask"] += [
                losses.binary_cross_entropy(logits, expected, weight, len(match)) * config.mask_weight,
                losses.dice(logits, expected, weight, len(match)) * config.dice_weight,
            ]
            if output.classes is None or output.ious is None:
                continue
            labels = torch.full(output.classes.shape[:2], self.num_classes, device=device)
            labels[paired] = all_labels[match.target]
            weights = negative[:, None].repeat(1, labels.shape[1])
            weights[paired] = class_weight[match.target]
            class_loss = losses.focal(
                output.classes.flatten(0, 1), labels.flatten(), weights.flatten(), targets[0].normalizer
            )
            total["class"].append(class_loss * config.class_weight)
            total["mask_iou"].append(losses.mask_iou(output.ious[paired], logits, expected) * config.mask_iou_weight)
        return {name: torch.stack(values).sum() for name, values in total.items()}

    def _semantic_loss(self, features: Tensor, targets: list[Targets], grids: Tensor, image: Tensor) -> Tensor:
        """The semantic loss at the features' own stride of 8; the released code upsamples the map first."""
        logits = self.kernel_head.semantic(features).float()
        coarse = (F.avg_pool2d(grids[:, None], 2)[:, 0] > 0.5).float()  # (T, h, w)
        expected = torch.zeros_like(logits)
        expected.index_put_((image, torch.cat([t.labels for t in targets])), coarse, accumulate=True)
        return losses.semantic(logits, expected.clamp_(max=1)) * self.config.semantic_weight


def _check(views: Views, targets: list[Targets], num_classes: int) -> None:
    if len(targets) != len(views):
        raise ValueError(f"KNet: expected {len(views)} targets, one per image, got {len(targets)}")
    losses.same_normalizer(t.normalizer for t in targets)
    labels = torch.cat([t.labels for t in targets])
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        raise ValueError(f"KNet: expected labels in 0..{num_classes - 1}, got {labels[bad][0].item()}")
