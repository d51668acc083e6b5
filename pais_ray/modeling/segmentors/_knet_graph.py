"""K-Net's prediction for one image as a graph that an exporter can trace, for any image size.

Legend: N kernels, n detections, C classes, H x W px of the padded view, h x w cells of stride 8.
"""

import dataclasses

import torch
from torch import Tensor, nn

from pais_ray.modeling.backbones import NormalizePixels
from pais_ray.modeling.protocols import ExportGraph
from pais_ray.modeling.segmentors._knet_config import KNetConfig
from pais_ray.modeling.segmentors._knet_decode import decode
from pais_ray.modeling.segmentors._knet_kernels import KernelHead, SemanticFPN, StageOutput, kernel_outputs
from pais_ray.structures.batch import Views


class KNetGraph(ExportGraph):
    """The graph over the layers of a K-Net. Masks are at stride 4 and span the whole view, which is their window."""

    def __init__(
        self,
        normalize: NormalizePixels,
        backbone: nn.Module,
        fusion: SemanticFPN,
        kernel_head: KernelHead,
        stages: nn.ModuleList,
        config: KNetConfig,
    ) -> None:
        super().__init__()
        self.normalize, self.backbone = normalize, backbone
        self.fusion, self.kernel_head, self.stages = fusion, kernel_head, stages
        self.config = config

    def forward(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        outputs, _ = kernel_outputs(self.fusion, self.kernel_head, self.stages, self._pyramid(images, size))
        [found] = decode(outputs[-1], size, self.config)
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
        """The raw outputs, each stage computed from the masks of ``found``: a kernel sums the cells inside its last
        mask, and the last bit of a logit close to zero decides about a whole cell."""
        masks = [found[f"masks_{i}"] for i in range(1 + len(self.stages))]
        outputs, _ = kernel_outputs(self.fusion, self.kernel_head, self.stages, self._pyramid(images, size), masks)
        return _raw(outputs)

    def _pyramid(self, images: Tensor, size: Tensor) -> list[Tensor]:
        """P2..P5."""
        views = dataclasses.replace(Views.of(images), sizes=size)
        return list(self.backbone(self.normalize(views)).values())[:4]


def _raw(outputs: list[StageOutput]) -> dict[str, Tensor]:
    """Mask logits (1, N, h, w) of the kernel head and of every stage, class logits (1, N, C) and mask-IoU logits
    (1, N) of the stages."""
    raw = {}
    for i, output in enumerate(outputs):
        raw[f"masks_{i}"] = output.masks
        if output.classes is not None and output.ious is not None:
            raw |= {f"classes_{i}": output.classes, f"ious_{i}": output.ious}
    return raw
