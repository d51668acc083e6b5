"""What may be wrong with a data set: one rule per fault, checked before any C call sees the data. Torch-free.

A malformed polygon or run-length string makes pycocotools crash, hang or return uninitialized memory, so
every annotation passes here first. Each check raises the first rule that is broken, by name; `report.py` collects.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pais_ray.data.validation.rules import (
    AREA_SLACK,
    BOX_MASK_IOU,
    BOX_OVERHANG,
    BOX_SLACK,
    LIMITS,
    MAX_OUTLINE,
    MAX_OUTLINE_PX,
    MAX_OUTLINES_PX,
    MAX_OVERHANG,
    MAX_POLYGONS,
    MAX_RUN,
    STRAY_CLICK,
    DataError,
    Limits,
    short,
)


def check_size(height: Any, width: Any, where: str, limits: Limits = LIMITS) -> tuple[int, int]:
    """(height, width) in pixels: positive whole numbers within the pixel cap."""
    for name, value in (("height", height), ("width", width)):
        if type(value) is not int or value <= 0:
            raise DataError("image-size", where, f"expected a positive whole {name}, got {short(value)}")
    if height * width > limits.max_pixels:
        message = f"{short(height)} x {short(width)} px are more than max_pixels = {limits.max_pixels}"
        raise DataError("image-pixels", where, message)
    return height, width


def check_upright(height: int, width: int, expected: tuple[int, int], where: str) -> None:
    """The upright picture, (height, width) px, against the size that the annotations say."""
    if (height, width) != expected:
        message = f"the upright picture is {height} x {width} px (height x width), its annotations say "
        raise DataError("image-unlike", where, message + f"{expected[0]} x {expected[1]}")


def check_count(instances: int, where: str, limits: Limits = LIMITS) -> None:
    """The number of annotations of one image."""
    if instances > limits.max_instances:
        message = f"{instances} annotations are more than max_instances = {limits.max_instances}"
        raise DataError("image-instances", where, message)


def check_box(box: object, where: str) -> tuple[float, float, float, float]:
    """A COCO box (x, y, width, height) in pixels; it may lie outside the image and be empty."""
    if type(box) is not list or len(box) != 4 or not _are_numbers(box):
        raise DataError("box-type", where, f"expected bbox [x, y, width, height], got {short(box)}")
    # 1e15 px and more is finite, yet x + width would not be exact
    if not all(-1e15 < value < 1e15 for value in box):
        raise DataError("box-finite", where, f"expected four finite numbers, got {short(box)}")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise DataError("box-size", where, f"expected bbox [x, y, width, height], got a negative size {short(box)}")
    return float(x), float(y), float(width), float(height)


def check_polygon(polygon: object, height: int, width: int, where: str) -> float:
    """One polygon [x1, y1, x2, y2, ...]: at least 3 points, finite, at most ``MAX_OVERHANG`` images
    away, with an outline that can be drawn. Returns what the outline is no longer than, px."""
    if type(polygon) is not list or not _are_numbers(polygon):
        raise DataError("polygon-type", where, f"expected a flat list of numbers, got {short(polygon)}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise DataError("polygon-length", where, f"expected an even number of at least 6 values, got {len(polygon)}")
    limit = MAX_OVERHANG * max(height, width)
    low, high = min(polygon), max(polygon)
    # min and max may step over a NaN; the sum does not, and is taken where it cannot overflow
    if low == -math.inf or high == math.inf or (-limit <= low and high <= limit and math.isnan(sum(polygon))):
        raise DataError("polygon-finite", where, "a coordinate is infinite or not a number")
    if not (-limit <= low and high <= limit):
        if any(value != value for value in polygon):
            raise DataError("polygon-finite", where, "a coordinate is not a number")
        far = low if -low > high else high
        message = f"a coordinate of {short(far)} is further than {MAX_OVERHANG} images ({limit} px) away"
        raise DataError("polygon-range", where, message)
    longest = min(MAX_OUTLINE * (height + width), MAX_OUTLINE_PX)
    bound = len(polygon) // 2 * (high - low)  # quick to see
    if bound > longest:
        bound = _outline(polygon)
        if bound > longest:
            raise DataError("polygon-outline", where, f"an outline of {bound:.0f} px is longer than {longest} px")
    return bound


def _outline(polygon: list[float]) -> float:
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def check_rle(rle: Mapping[str, Any], height: int, width: int, where: str) -> None:
    """Run lengths of a mask (height, width), compressed or not: they must be readable and fill it exactly."""
    size = rle.get("size")
    if type(size) is not list or size != [height, width] or set(map(type, size)) != {int}:
        raise DataError("rle-size", where, f"expected size [{height}, {width}], got {short(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        total = int(parse_counts(counts, where).sum())
    elif type(counts) is list and set(map(type, counts)) <= {int}:
        if counts and min(counts) < 0:
            raise DataError("rle-decodes", where, f"expected run lengths, got the negative {short(min(counts))}")
        total = sum(counts)
    else:
        message = f"expected counts as a list of whole numbers or a string, got {short(counts)}"
        raise DataError("rle-type", where, message)
    if total != height * width:
        raise DataError("rle-sum", where, f"the runs cover {short(total)} of {height * width} pixels")


def parse_counts(counts: str | bytes, where: str) -> np.ndarray:
    """Run lengths (R,) int64 of a compressed COCO string, which no C code has seen yet.

    Each number is a chain of characters from 48 on, 5 bits each, lowest first; bit 6 says that another
    character follows and the top bit of the last one is the sign. From the fourth number on, a number is
    the difference to the one before the last (run lengths of the same color resemble each other).
    """
    data = counts if isinstance(counts, bytes) else counts.encode("utf-8", "surrogatepass")
    bits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(bits) == 0:
        return bits
    if bits.min() < 0 or bits.max() > 63:
        raise DataError("rle-decodes", where, "the compressed counts hold characters outside '0' to 'o'")
    last = np.flatnonzero(bits & 32 == 0)
    if len(last) == 0 or last[-1] != len(bits) - 1:
        raise DataError("rle-decodes", where, "the compressed counts end within a number")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits: more than any image within the pixel cap needs
        raise DataError("rle-decodes", where, "the compressed counts hold a number of more than 35 bits")
    place = 5 * (np.arange(len(bits)) - np.repeat(first, lengths))
    values = np.add.reduceat((bits & 31) << place, first)
    values -= np.where(bits[last] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0 or values.max() > MAX_RUN:
        raise DataError("rle-decodes", where, "the compressed counts hold a run of negative or absurd length")
    return values


def check_segmentation(segmentation: object, height: int, width: int, where: str) -> None:
    """A list of polygons (perhaps empty) or an RLE of the image's size."""
    if type(segmentation) is list:
        if len(segmentation) > MAX_POLYGONS:
            message = f"{len(segmentation)} polygons of one instance are more than {MAX_POLYGONS}"
            raise DataError("polygon-count", where, message)
        bound = sum(check_polygon(polygon, height, width, where) for polygon in segmentation)
        if bound > MAX_OUTLINES_PX and (outlines := sum(map(_outline, segmentation))) > MAX_OUTLINES_PX:
            message = f"outlines of {outlines:.0f} px together are longer than {MAX_OUTLINES_PX} px"
            raise DataError("polygon-outline", where, message)
    elif isinstance(segmentation, Mapping):
        check_rle(segmentation, height, width, where)
    else:
        message = f"expected a list of polygons or an RLE object, got {short(segmentation)}"
        raise DataError("segmentation-type", where, message)


def check_crowd(flag: object, where: str) -> bool:
    """The ``iscrowd`` flag."""
    if type(flag) not in (int, bool) or flag not in (0, 1):
        raise DataError("crowd-flag", where, f"expected iscrowd 0 or 1, got {short(flag)}")
    return bool(flag)


def check_area(area: object, where: str) -> float | None:
    """The ``area`` of an annotation, px; None where it has none."""
    if area is None:
        return None
    if type(area) not in (int, float) or not 0 <= area < 1e15:  # type: ignore[operator]
        raise DataError("area-type", where, f"expected a finite number of pixels, got {short(area)}")
    return float(area)  # type: ignore[arg-type]


def check_instance(
    box: Sequence[float], mask_box: Sequence[float], area: float, height: int, width: int, where: str
) -> bool:
    """Whether an instance has anything to learn: its box (XYWH px) against the image, its mask's box and area.

    False where neither is more than a stray click; an error where one is empty and the other is not.
    """
    x, y, w, h = box
    over = max(-x, -y, x + w - width, y + h - height)
    if over > BOX_OVERHANG:
        message = f"bbox [{x:g}, {y:g}, {w:g}, {h:g}] reaches {over:g} px out of the {height} x {width} image"
        raise DataError("box-outside", where, message)
    inside = min(min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0))  # the shorter side
    if area == 0:
        if inside >= STRAY_CLICK:
            message = f"the mask covers no pixel of the image, though bbox is {w:g} x {h:g} px"
            raise DataError("mask-empty", where, message)
        return False
    if inside <= 0:
        if min(mask_box[2], mask_box[3]) >= STRAY_CLICK:
            raise DataError("box-empty", where, f"bbox is {w:g} x {h:g} px, though the mask covers {area:g}")
        return False
    return True


def check_box_mask(box: Sequence[float], mask_box: Sequence[float], where: str) -> None:
    """A warning where the box and the mask's own box, both XYWH px, have less than half in common."""
    (x, y, w, h), (mx, my, mw, mh) = box, mask_box
    right, bottom, mask_right, mask_bottom = x + w, y + h, mx + mw, my + mh
    off = max(abs(x - mx), abs(y - my), abs(right - mask_right), abs(bottom - mask_bottom))
    if off <= BOX_SLACK:
        return
    across = max(0.0, min(right, mask_right) - max(x, mx))
    common = across * max(0.0, min(bottom, mask_bottom) - max(y, my))
    iou = common / (w * h + mw * mh - common)
    if iou < BOX_MASK_IOU:
        message = f"bbox [{x:g}, {y:g}, {w:g}, {h:g}] and the mask's own [{mx:g}, {my:g}, {mw:g}, {mh:g}] "
        raise DataError("box-mask", where, message + f"have an IoU of {iou:.2f}, less than {BOX_MASK_IOU}")


def check_area_mask(area: float | None, mask_box: Sequence[float], mask_area: float, where: str) -> None:
    """A warning where ``area`` is not the mask's, px: a tenth, and the pixels along the border, are let through."""
    if area is not None and abs(area - mask_area) > AREA_SLACK * mask_area + mask_box[2] + mask_box[3]:
        kind = " (it is that of the box)" if abs(area - mask_box[2] * mask_box[3]) <= 0.1 * area else ""
        raise DataError("area-mask", where, f"area is {area:g}{kind}, the mask covers {mask_area:g} px")


def _are_numbers(values: Sequence[object]) -> bool:
    return set(map(type, values)) <= {int, float}  # leaves out bool, str and None
