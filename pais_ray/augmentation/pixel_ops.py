"""Pixel operations of one view: resize, warp, color, erase. Images are (3, H, W) float in [0, 1], RGB.

Nothing here is random: views.py draws, this file obeys. Color operations are Kornia functionals chosen for
PIL's meaning of the words (the paper's code calls PIL); tests compare each with PIL.
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
    """The image at ``size`` = (h, w): bilinear, averaging the covered pixels when it shrinks.

    Exactly the frame change ``geometry.scale(w / W, h / H)``; the same size gives the same pixels.
    """
    if tuple(image.shape[1:]) == size:
        return image
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.clamp_(0.0, 1.0)


def warp(image: Tensor, matrix: Tensor, fill: float) -> Tensor:
    """The image moved by ``matrix`` (3, 3; CPU; px -> px of the same frame), bilinear, ``fill`` outside."""
    height, width = image.shape[1:]
    (a, b, tx), (c, d, ty), _ = geometry.invert(matrix).tolist()
    ys = torch.arange(height, device=image.device, dtype=image.dtype)[:, None] + 0.5
    xs = torch.arange(width, device=image.device, dtype=image.dtype) + 0.5
    x = (2 * a / width) * xs + ((2 * b / width) * ys + (2 * tx / width - 1))
    y = (2 * c / height) * xs + ((2 * d / height) * ys + (2 * ty / height - 1))
    where = torch.stack([x, y], dim=-1)[None]  # (1, H, W, 2)
    # grid_sample knows no other border than zero, so the fill value is made the zero.
    moved = F.grid_sample((image - fill)[None], where, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved[0].add_(fill).clamp_(0.0, 1.0)


def color(image: Tensor, name: Color, level: int) -> Tensor:
    """One color operation at an integer ``level`` of 1..9 (method 3; PIL's meaning of each word)."""
    factor = 0.18 * level + 0.1
    match name:
        case "identity":
            return image
        case "autocontrast":
            return _autocontrast(image)
        case "equalize":
            return enhance.equalize(_to_levels(image))
        case "solarize":
            # Half a level below: "at or above the threshold" must not hang on float rounding.
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
    raise ValueError(f"color: no operation named {name!r}; expected one of {', '.join(COLORS)}")


def erase(image: Tensor, patches: tuple[tuple[int, int, int, int], ...], fill: tuple[float, float, float]) -> Tensor:
    """A copy of the image with every patch (x1, y1, x2, y2) px painted in ``fill`` (R, G, B)."""
    image = image.clone()
    for x1, y1, x2, y2 in patches:
        for channel, value in enumerate(fill):
            image[channel, y1:y2, x1:x2] = value
    return image


def _autocontrast(image: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; a constant channel stays as it is (Kornia would blacken it)."""
    stretched = enhance.normalize_min_max(image[None])[0]
    flat = image.amax(dim=(1, 2), keepdim=True) <= image.amin(dim=(1, 2), keepdim=True)
    return torch.where(flat, image, stretched)


def _to_levels(image: Tensor) -> Tensor:
    """Rounded to PIL's 256 levels: without it a resized 127.9999 would fall by a whole posterize step."""
    return (image * 255).round_().div_(255)
