"""Images (H, W, 3) uint8 as a whole: enlarge, caption, arrange in a grid, write to a file."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pais_ray.files.atomic import replace_bytes

READABLE = 512  # px; text on an image with a shorter longer side is hard to read
CAPTION_HEIGHT = 24  # px
JPEG_QUALITY = 92


def enlargement(size: tuple[int, int], readable: int) -> int:
    """The whole factor that makes the longer side of ``size`` at least ``readable`` px; 1 if ``readable`` is 0."""
    return max(1, math.ceil(readable / max(size))) if readable else 1


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """The image enlarged by a whole factor, bicubic."""
    if factor == 1:
        return image
    size = image.shape[1] * factor, image.shape[0] * factor
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def add_caption(image: np.ndarray, text: str) -> np.ndarray:
    """The image with a line of text above it."""
    strip = Image.new("RGB", (image.shape[1], CAPTION_HEIGHT), (255, 255, 255))
    ImageDraw.Draw(strip).text((4, 4), text, fill=(0, 0, 0), font=ImageFont.load_default(size=14))
    return np.concatenate([np.asarray(strip), image])


def grid(images: Sequence[np.ndarray], columns: int, gap: int = 6) -> np.ndarray:
    """Images of any size as one image, row by row, on white, with ``gap`` px between them."""
    if not images:
        return np.full((64, 64, 3), 255, dtype=np.uint8)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.shape[0] for image in row) for row in rows]
    widths = [max(image.shape[1] for image in images[c::columns]) for c in range(min(columns, len(images)))]
    canvas = np.full((sum(heights) + gap * (len(rows) - 1), sum(widths) + gap * (len(widths) - 1), 3), 255, np.uint8)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for image, width in zip(row, widths, strict=False):
            canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
            x += width + gap
        y += height + gap
    return canvas


def save(image: np.ndarray, path: Path | str) -> None:
    """Write the image atomically, as JPEG if the suffix of ``path`` is .jpg or .jpeg, else as PNG."""
    buffer = io.BytesIO()
    kind = "JPEG" if Path(path).suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(image).save(buffer, format=kind, quality=JPEG_QUALITY)
    replace_bytes(Path(path), buffer.getvalue())
