"""From the outputs of K-Net's last stage to detections: the same code for prediction and for the exported graph.

Legend: N kernels, n detections, C classes, h x w cells of stride 8.
"""

import torch
from torch import Tensor

from pais_ray.modeling.backbones import valid_pixels
from pais_ray.modeling.segmentors._knet_config import KNetConfig
from pais_ray.modeling.segmentors._knet_kernels import StageOutput, mask_values
from pais_ray.structures.batch import Predictions
from pais_ray.structures.masks import Masks

STRIDE = 4  # px per cell of the predicted masks, and of the masks that are compared in training (released code)


def decode(
    output: StageOutput, sizes: Tensor, config: KNetConfig, score_threshold: float | None = None
) -> list[Predictions]:
    """Detections of each image in the output of the last stage, best first; ``sizes`` (B, 2) px without padding.

    The threshold is the larger one of ``score_threshold`` and the configured one.
    """
    assert output.classes is not None
    assert output.ious is not None
    minimum = max(config.score_threshold, score_threshold or 0.0)
    return [
        _decode_image(classes.sigmoid(), ious.sigmoid(), masks, size, minimum, config)
        for classes, ious, masks, size in zip(output.classes, output.ious, output.masks, sizes, strict=True)
    ]


def _decode_image(
    scores: Tensor, ious: Tensor, masks: Tensor, size: Tensor, minimum: float, config: KNetConfig
) -> Predictions:
    """Detections of one image; ``scores`` (N, C), ``ious`` (N,), ``masks`` (N, h, w) logits, ``size`` (2,)."""
    if config.classes_per_kernel == "best":
        best, label = scores.max(dim=1)
        kernel = torch.arange(len(scores), device=scores.device)
    else:
        best = scores.flatten()
        kernel, label = torch.unravel_index(torch.arange(len(best), device=best.device), scores.shape)
    ranked = torch.sort(best, descending=True, stable=True).indices[: config.detections]
    ranked = ranked[best[ranked] >= minimum]
    kernel = kernel[ranked]
    shape = (2 * masks.shape[1], 2 * masks.shape[2])
    soft = mask_values(masks[kernel][:, None], None)[:, 0].sigmoid().unflatten(1, shape)
    soft = soft * valid_pixels(size[None], shape, STRIDE)
    boxes, nonempty = mask_boxes(soft > 0.5, size)
    ranked, kernel = ranked[nonempty], kernel[nonempty]
    return Predictions(
        boxes=boxes[nonempty],
        labels=label[ranked],
        scores=best[ranked],
        ious=ious[kernel],
        masks=Masks.strided(soft[nonempty], STRIDE),
    )


def mask_boxes(masks: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) px of the view around bool ``masks`` (n, h, w) of stride 4, clipped to ``size`` (2,) px, and a mask
    (n,) of those that are not empty."""
    rows, cols = masks.any(dim=2), masks.any(dim=1)
    (x1, x2), (y1, y2) = [(low * STRIDE, high * STRIDE) for low, high in (extent(cols), extent(rows))]
    height, width = size[0], size[1]
    boxes = torch.stack([x1, y1, torch.minimum(x2, width), torch.minimum(y2, height)], dim=1).float()
    return boxes, rows.any(dim=1)


def extent(on: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first True of each row of ``on`` (n, length), and one past that of the last."""
    cells = on.to(torch.uint8)
    return cells.argmax(dim=1), on.shape[1] - cells.flip(1).argmax(dim=1)
