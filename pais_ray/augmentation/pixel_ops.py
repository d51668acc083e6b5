"""Pixel operations of one view: resize, warp, color, erase. Images are (3, H, W) float in [0, 1], RGB.

The functions are deterministic; ``sampling`` draws their parameters. Color operations are the Kornia functionals that
match PIL, which the released code uses; tests compare each of them with PIL.
"""

from typing import Literal, get_args

import kornia.enhance as enhance
import torch
import torch.nn.functional as F
from torch import Tensor

from pais_ray.structures import geometry

Color = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "posterize",
]
COLORS: tuple[Color, ...] = get_args(Color)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to ``size`` = (h, w): bilinear, with antialiasing when the image shrinks.

    The change of frame is exactly ``geometry.scale(w / W, h / H)``. The same size returns the same pixels.
    """
    if tuple(image.shape[1:]) == size:
        return image
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.clamp_(0.0, 1.0)


def warp(image: Tensor, matrix: Tensor, fill: float) -> Tensor:
    """Move the image by ``matrix`` (3, 3) on the CPU, px -> px of the same frame; bilinear, ``fill`` outside."""
    height, width = image.shape[1:]
    (a, b, tx), (c, d, ty), _ = geometry.invert(matrix).tolist()
    ys = torch.arange(height, device=image.device, dtype=image.dtype)[:, None] + 0.5
    xs = torch.arange(width, device=image.device, dtype=image.dtype) + 0.5
    x = (2 * a / width) * xs + ((2 * b / width) * ys + (2 * tx / width - 1))
    y = (2 * c / height) * xs + ((2 * d / height) * ys + (2 * ty / height - 1))
    grid = torch.stack([x, y], dim=-1)[None]  # (1, H, W, 2)
    # grid_sample can only fill with zero, so the fill value is subtracted first.
    moved = F.grid_sample((image - fill)[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved[0].add_(fill).clamp_(0.0, 1.0)


def color(image: Tensor, name: Color, level: int) -> Tensor:
    """Apply one color operation as PIL defines it, at an integer ``level`` of 1..9 (method 3)."""
    factor = 0.18 * level + 0.1
    match name:
        case "identity":
            return image
        case "autocontrast":
            return _autocontrast(image)
        case "equalize":
            return enhance.equalize(_to_levels(image))
        case "solarize":
            # Half a level lower, so that "at or above the threshold" does not depend on float rounding.
            return enhance.solarize(image, (min(int(25.6 * level), 255) - 0.5) / 255)
        case "color":
            return enhance.adjust_saturation_with_gray_subtraction(image, factor)
        case "contrast":
            return enhance.adjust_contrast_with_mean_subtraction(image, factor)
        case "brightness":
            return enhance.adjust_brightness_accumulative(image, factor)
        case "sharpness":
            return enhance.sharpness(image, factor)
        case "posterize":
            return enhance.posterize(_to_levels(image), 4 - int(0.4 * level))
    raise ValueError(f"color: expected one of {', '.join(COLORS)}, got {name!r}")


def erase(image: Tensor, patches: tuple[tuple[int, int, int, int], ...], fill: tuple[float, float, float]) -> Tensor:
    """A copy of the image with every patch (x1, y1, x2, y2) px filled with ``fill`` (R, G, B)."""
    image = image.clone()
    for x1, y1, x2, y2 in patches:
        for channel, value in enumerate(fill):
            image[channel, y1:y2, x1:x2] = value
    return image


def _autocontrast(image: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]. A constant channel is unchanged; Kornia would make it black."""
    stretched = enhance.normalize_min_max(image[None])[0]
    flat = image.amax(dim=(1, 2), keepdim=True) <= image.amin(dim=(1, 2), keepdim=True)
    return torch.where(flat, image, stretched)


def _to_levels(image: Tensor) -> Tensor:
    """Round to the 256 levels of PIL; otherwise 127.9999 after a resize would lose a whole posterize step."""
    return (image * 255).round_().div_(255)
