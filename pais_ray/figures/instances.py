"""Arrays to pictures: overlays, panels of pseudo-labels and curves. No model and no data access here.

Overlays are drawn with Pillow and NumPy, because they are made for every image of a set; matplotlib, which is
slow to import and to draw, only makes the curves.
"""

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pais_ray.structures.batch import Predictions, Targets

if TYPE_CHECKING:
    pass
from pais_ray.files.atomic import replace_bytes

Color = tuple[int, int, int]

FILL = 0.4  # opacity of a mask

GRAY: Color = (150, 150, 150)

READABLE = 512  # px: shorter pictures are enlarged by a whole factor, so that tags can be read


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """One unlabeled image as the teacher and the student see it."""

    weak: np.ndarray  # (H, W, 3) uint8
    strong: np.ndarray  # (h, w, 3) uint8
    predictions: Predictions  # the teacher's, in the weak view, on the CPU
    kept: Tensor  # (N,) bool: which of them became pseudo-labels
    targets: Targets  # the pseudo-labels in the strong view, on the CPU


def overlay(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    masks: np.ndarray,
    names: Sequence[str],
    readable: int = READABLE,
) -> np.ndarray:
    """The image (H, W, 3) uint8 with masks (N, H, W) bool, boxes (N, 4) XYXY px, and tags "class score".

    Instances come best first; ``scores`` None is ground truth. Pictures whose longer side is below ``readable`` px
    are enlarged by a whole factor; 0 keeps the size.
    """
    tags = [names[int(label)] for label in labels]
    if scores is not None:
        tags = [f"{tag} {float(score):.2f}" for tag, score in zip(tags, scores, strict=True)]
    return _draw(image, np.asarray(boxes), tags, np.asarray(masks), readable)


def pseudo_label_panel(
    rows: Sequence[PanelRow], names: Sequence[str], path: Path | str | None = None, max_dropped: int = 15
) -> np.ndarray:
    """A picture (H, W, 3) uint8, a line an image, written to ``path`` as PNG where one is given.

    Left the weak view: pseudo-labels in color, the best ``max_dropped`` dropped predictions in dashed gray,
    each with class, class score c and predicted mask IoU s. Right the strong view with the pseudo-labels
    warped to it.
    """
    pictures: list[np.ndarray] = []
    for row in rows:
        kept, found = row.kept.cpu().numpy(), row.predictions
        labels, scores, ious = (value.tolist() for value in (found.labels, found.scores, found.ious))
        tags = [
            f"{names[label]} c{_two_digits(c)} s{_two_digits(s)}"
            for label, c, s in zip(labels, scores, ious, strict=True)
        ]
        boxes = found.boxes.numpy()
        chosen = np.flatnonzero(kept)
        masks = found.masks[row.kept.cpu()].paste(row.weak.shape[:2]).numpy()
        dropped = np.flatnonzero(~kept)
        dropped = dropped[np.argsort(-np.asarray(scores)[dropped], kind="stable")][:max_dropped]
        weak = _draw(
            row.weak, boxes[chosen], [tags[i] for i in chosen], masks, READABLE,
            (boxes[dropped], [tags[i] for i in dropped]),
        )  # fmt: skip
        pictures.append(captioned(weak, f"weak view: {len(chosen)} kept, {int((~kept).sum())} dropped"))
        target_tags = [names[label] for label in row.targets.labels.tolist()]
        target_masks = row.targets.masks.paste(row.strong.shape[:2]).numpy()
        strong = _draw(row.strong, row.targets.boxes.numpy(), target_tags, target_masks, READABLE)
        pictures.append(captioned(strong, f"strong view: {len(row.targets)} pseudo-labels"))
    panel = grid(pictures, columns=2)
    if path is not None:
        save(panel, path)
    return panel


def grid(images: Sequence[np.ndarray], columns: int, gap: int = 6) -> np.ndarray:
    """Images (H, W, 3) uint8 of any size as one picture, line by line, on white."""
    if not images:
        return np.full((64, 64, 3), 255, dtype=np.uint8)
    lines = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.shape[0] for image in line) for line in lines]
    widths = [max(image.shape[1] for image in images[c::columns]) for c in range(min(columns, len(images)))]
    canvas = np.full((sum(heights) + gap * (len(lines) - 1), sum(widths) + gap * (len(widths) - 1), 3), 255, np.uint8)
    y = 0
    for line, height in zip(lines, heights, strict=True):
        x = 0
        for image, width in zip(line, widths, strict=False):
            canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
            x += width + gap
        y += height + gap
    return canvas


def save(image: np.ndarray, path: Path | str) -> None:
    """Writes a picture (H, W, 3) uint8, as PNG or JPEG by its name: whole or not at all."""
    buffer = io.BytesIO()
    kind = "JPEG" if Path(path).suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(image).save(buffer, format=kind, quality=92)
    replace_bytes(Path(path), buffer.getvalue())


def color(index: int) -> Color:
    """The color of instance ``index``: neighbors in the list are far apart in hue."""
    hue = (0.58 + index * 0.61803398875) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[index % 3], (1.0, 0.95, 0.8)[index // 3 % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    tags: Sequence[str],
    masks: np.ndarray,
    readable: int,
    dropped: tuple[np.ndarray, Sequence[str]] = (np.zeros((0, 4)), ()),
) -> np.ndarray:
    """Large masks are painted first, so that small ones stay visible, and the best tag last."""
    factor = max(1, math.ceil(readable / max(image.shape[:2]))) if readable else 1
    if factor > 1:
        image = np.asarray(Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), 3))
    canvas = np.array(image)
    height, width = canvas.shape[:2]
    thickness = max(1, round(max(height, width) / 400))
    for i in np.argsort(-masks.sum(axis=(1, 2)), kind="stable") if len(masks) else ():
        _paint(canvas, masks[i], color(int(i)), factor, thickness)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, round(max(height, width) / 45)))
    for box, tag in reversed(list(zip(dropped[0] * factor, dropped[1], strict=True))):
        _dashed(pen, box, GRAY, thickness)
        _tag(pen, box, tag, GRAY, font, (height, width))
    boxes = boxes * factor
    for i in reversed(range(len(boxes))):
        pen.rectangle(_corners(boxes[i]), outline=color(i), width=thickness)
    for i in reversed(range(len(boxes))):
        _tag(pen, boxes[i], tags[i], color(i), font, (height, width))
    return np.asarray(picture)


def _paint(canvas: np.ndarray, mask: np.ndarray, paint: Color, factor: int, thickness: int) -> None:
    """Tints the mask and draws its outline, inside the window that holds it."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(ys) == 0:
        return
    window = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].repeat(factor, axis=0).repeat(factor, axis=1)
    part = canvas[ys[0] * factor : (ys[-1] + 1) * factor, xs[0] * factor : (xs[-1] + 1) * factor]
    inner = np.pad(window, 1)
    for _ in range(thickness):
        core = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = np.pad(core, 1)
    part[window] = (part[window] * (1 - FILL) + np.array(paint) * FILL).astype(np.uint8)
    part[window & ~inner[1:-1, 1:-1]] = paint


def _corners(box: np.ndarray) -> tuple[float, float, float, float]:
    """First and last pixel of a box, as Pillow wants them, also of an empty box."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _dashed(pen: ImageDraw.ImageDraw, box: np.ndarray, paint: Color, width: int) -> None:
    x1, y1, x2, y2 = _corners(box)
    dash = 4 * width + 2
    for start in np.arange(x1, x2, 2 * dash):
        end = min(start + dash, x2)
        pen.line([(start, y1), (end, y1)], fill=paint, width=width)
        pen.line([(start, y2), (end, y2)], fill=paint, width=width)
    for start in np.arange(y1, y2, 2 * dash):
        end = min(start + dash, y2)
        pen.line([(x1, start), (x1, end)], fill=paint, width=width)
        pen.line([(x2, start), (x2, end)], fill=paint, width=width)


def _tag(
    pen: ImageDraw.ImageDraw,
    box: np.ndarray,
    text: str,
    paint: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Text on a plate above the box's corner, or within it at the upper border; never outside the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0.0, float(box[0])), max(0.0, size[1] - width))
    y = float(box[1]) - height
    y = min(y if y >= 0 else max(0.0, float(box[1])), max(0.0, size[0] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=paint)
    luminance = 0.299 * paint[0] + 0.587 * paint[1] + 0.114 * paint[2]
    pen.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if luminance > 140 else (255, 255, 255), font=font)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """The image (H, W, 3) uint8 under a line of text."""
    strip = Image.new("RGB", (image.shape[1], 24), (255, 255, 255))
    ImageDraw.Draw(strip).text((4, 4), text, fill=(0, 0, 0), font=ImageFont.load_default(size=14))
    return np.concatenate([np.asarray(strip), image])


def _two_digits(value: float) -> str:
    """0.934 -> ".93", 1.0 -> "1.0"."""
    text = f"{float(value):.2f}"
    return text[1:] if text.startswith("0.") else text[:3]
