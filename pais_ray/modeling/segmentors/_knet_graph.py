"""K-Net's prediction for one image as one graph of tensors, at any size: what an exporter can follow.

Legend: N kernels, n detections, C classes, H x W px of the padded view, h x w cells of stride 8.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pais_ray.modeling.protocols import ExportGraph
from pais_ray.modeling.segmentors._knet_kernels import StageOutput, group_features
from pais_ray.structures.batch import Views

if TYPE_CHECKING:
    from pais_ray.modeling.segmentors.knet import KNet


class KNetGraph(ExportGraph):
    """``forward`` is what is exported, ``heads`` what it is compared with."""

    def __init__(self, network: "KNet") -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Detections, best first, and the raw outputs that ``heads`` has too.

        ``images`` (1, 3, H, W) in [0, 1], H and W multiples of 32, of which ``size`` (1, 2) int64 is no padding.
        Detections: ``boxes`` (n, 4) px of the view, ``labels``, ``scores``, ``ious`` (n,), ``masks`` (n, H / 4, W / 4)
        in [0, 1], each stretched over its own of ``windows`` (n, 4) px.
        """
        outputs, _ = self.network._outputs(_views(images, size))
        last = outputs[-1]
        assert last.classes is not None
        assert last.ious is not None
        minimum = self.network.config.score_threshold
        scores, ious = last.classes[0].sigmoid(), last.ious[0].sigmoid()
        found = self.network._detect(scores, ious, last.masks[0], size[0], minimum)
        one = torch.ones_like(found.scores)
        return {
            "boxes": found.boxes,
            "labels": found.labels,
            "scores": found.scores,
            "ious": found.ious,
            "masks": found.masks.grids,
            "windows": torch.stack([0 * one, 0 * one, images.shape[3] * one, images.shape[2] * one], dim=1),
            **_raw(outputs),
        }

    @torch.no_grad()
    def heads(self, images: Tensor, size: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The raw outputs as the segmentor makes them, each stage after the masks of ``found``: a kernel sums up the
        cells where its last mask is on, and a logit that is zero but for its last bit switches a whole cell."""
        network = self.network
        pyramid = list(network.backbone(network.normalize(_views(images, size))).values())[:4]
        first, _, features = network.kernel_head(*network.fusion(pyramid))
        kernels = network.kernel_head.kernels + group_features(found["masks_0"], features)
        outputs = [first]
        for i, stage in enumerate(network.stages):
            output, kernels = stage(features, kernels, found[f"masks_{i}"])
            outputs.append(output)
        return _raw(outputs)


def _views(images: Tensor, size: Tensor) -> Views:
    return dataclasses.replace(Views.of(images), sizes=size)


def _raw(outputs: list[StageOutput]) -> dict[str, Tensor]:
    """Mask logits (1, N, h, w) of the kernel head and of every stage, class logits (1, N, C) and mask-IoU logits
    (1, N) of the stages."""
    raw = {}
    for i, output in enumerate(outputs):
        raw[f"masks_{i}"] = output.masks
        if output.classes is not None and output.ious is not None:
            raw |= {f"classes_{i}": output.classes, f"ious_{i}": output.ious}
    return raw
