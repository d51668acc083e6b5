"""Instances drawn over an image: masks, boxes and text tags.

Drawn with Pillow and NumPy, because overlays are made for every image of a data set and matplotlib is slow.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pais_ray.figures.canvas import READABLE, enlarge, enlargement

Color = tuple[int, int, int]

MASK_OPACITY = 0.4
GRAY: Color = (150, 150, 150)  # of dropped instances


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    masks: np.ndarray,
    names: Sequence[str],
    readable: int = READABLE,
) -> np.ndarray:
    """The image (H, W, 3) uint8 with masks (N, H, W) bool, boxes (N, 4) XYXY px, and tags "class score".

    Instances are in descending order of score; ``scores`` is None for ground truth. An image whose longer side is
    below ``readable`` px is enlarged by a whole factor; 0 keeps the size.
    """
    tags = [names[int(label)] for label in labels]
    if scores is not None:
        tags = [f"{tag} {float(score):.2f}" for tag, score in zip(tags, scores, strict=True)]
    return draw_tagged(image, np.asarray(boxes), tags, np.asarray(masks), readable)


def draw_tagged(
    image: np.ndarray,
    boxes: np.ndarray,
    tags: Sequence[str],
    masks: np.ndarray,
    readable: int = READABLE,
    dropped: tuple[np.ndarray, Sequence[str]] = (np.zeros((0, 4)), ()),
) -> np.ndarray:
    """As ``draw_instances``, with the tags given; ``dropped``: boxes and tags of instances in dashed gray.

    Large masks are painted first, so that small ones stay visible, and the tag of the first instance last.
    """
    factor = enlargement(image.shape[:2], readable)
    canvas = np.array(enlarge(image, factor))
    height, width = canvas.shape[:2]
    thickness = max(1, round(max(height, width) / 400))
    for i in np.argsort(-masks.sum(axis=(1, 2)), kind="stable") if len(masks) else ():
        _paint_mask(canvas, masks[i], instance_color(int(i)), factor, thickness)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, round(max(height, width) / 45)))
    for box, tag in reversed(list(zip(dropped[0] * factor, dropped[1], strict=True))):
        _draw_dashed_box(pen, box, GRAY, thickness)
        _draw_tag(pen, box, tag, GRAY, font, (height, width))
    boxes = boxes * factor
    for i in reversed(range(len(boxes))):
        pen.rectangle(_corner_pixels(boxes[i]), outline=instance_color(i), width=thickness)
    for i in reversed(range(len(boxes))):
        _draw_tag(pen, boxes[i], tags[i], instance_color(i), font, (height, width))
    return np.asarray(picture)


def instance_color(index: int) -> Color:
    """The color of instance ``index``; consecutive instances have very different hues."""
    hue = (0.58 + index * 0.61803398875) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[index % 3], (1.0, 0.95, 0.8)[index // 3 % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def _paint_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, factor: int, thickness: int) -> None:
    """Tint the mask and draw its outline, inside the mask's bounding box only."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(ys) == 0:
        return
    window = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].repeat(factor, axis=0).repeat(factor, axis=1)
    part = canvas[ys[0] * factor : (ys[-1] + 1) * factor, xs[0] * factor : (xs[-1] + 1) * factor]
    inner = np.pad(window, 1)
    for _ in range(thickness):  # erode by one pixel
        core = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = np.pad(core, 1)
    part[window] = (part[window] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)
    part[window & ~inner[1:-1, 1:-1]] = color


def _corner_pixels(box: np.ndarray) -> tuple[float, float, float, float]:
    """The first and last pixel of a box, as Pillow expects them; valid for an empty box too."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _draw_dashed_box(pen: ImageDraw.ImageDraw, box: np.ndarray, color: Color, width: int) -> None:
    x1, y1, x2, y2 = _corner_pixels(box)
    dash = 4 * width + 2
    for start in np.arange(x1, x2, 2 * dash):
        end = min(start + dash, x2)
        pen.line([(start, y1), (end, y1)], fill=color, width=width)
        pen.line([(start, y2), (end, y2)], fill=color, width=width)
    for start in np.arange(y1, y2, 2 * dash):
        end = min(start + dash, y2)
        pen.line([(x1, start), (x1, end)], fill=color, width=width)
        pen.line([(x2, start), (x2, end)], fill=color, width=width)


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    box: np.ndarray,
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Text on a plate above the top left corner of the box, below it at the upper border; always inside the image of
    ``size`` = (height, width)."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0.0, float(box[0])), max(0.0, size[1] - width))
    y = float(box[1]) - height
    y = min(y if y >= 0 else max(0.0, float(box[1])), max(0.0, size[0] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    pen.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if luminance > 140 else (255, 255, 255), font=font)
