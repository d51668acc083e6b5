"""Checks of the values of images and annotations, made before any C code receives them. Torch-free.

A malformed polygon or run-length string makes pycocotools crash, hang or return uninitialized memory. Each check raises
DataError for the first broken rule.
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
    short_repr,
)


def check_size(height: Any, width: Any, where: str, limits: Limits = LIMITS) -> tuple[int, int]:
    """Returns (height, width) in px: positive integers, with at most ``limits.max_pixels`` pixels."""
    for name, value in (("height", height), ("width", width)):
        if type(value) is not int or value <= 0:
            raise DataError("image-size", where, f"expected a positive integer as {name}, got {short_repr(value)}")
    if height * width > limits.max_pixels:
        message = (
            f"expected at most max_pixels = {limits.max_pixels}, got {short_repr(height)} x {short_repr(width)} px"
        )
        raise DataError("image-pixels", where, message)
    return height, width


def check_upright(height: int, width: int, expected: tuple[int, int], where: str) -> None:
    """Compares the size of the upright image, px, with ``expected``, the (height, width) in the annotations."""
    if (height, width) != expected:
        message = f"expected {expected[0]} x {expected[1]} px (height x width) as in the annotations, "
        raise DataError("image-unlike", where, message + f"got an upright image of {height} x {width} px")


def check_count(instances: int, where: str, limits: Limits = LIMITS) -> None:
    """Checks the number of annotations of one image."""
    if instances > limits.max_instances:
        message = f"expected at most max_instances = {limits.max_instances}, got {instances} annotations"
        raise DataError("image-instances", where, message)


def check_box(box: object, where: str) -> tuple[float, float, float, float]:
    """Returns a COCO box (x, y, width, height), px. It may lie outside the image and be empty."""
    if type(box) is not list or len(box) != 4 or not _are_numbers(box):
        raise DataError("box-type", where, f"expected bbox [x, y, width, height], got {short_repr(box)}")
    # from 1e15 px on, x + width would not be exact
    if not all(-1e15 < value < 1e15 for value in box):
        raise DataError("box-finite", where, f"expected four finite numbers, got {short_repr(box)}")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise DataError(
            "box-size", where, f"expected bbox [x, y, width, height], got a negative size in {short_repr(box)}"
        )
    return float(x), float(y), float(width), float(height)


def check_polygon(polygon: object, height: int, width: int, where: str) -> float:
    """Checks a polygon [x1, y1, x2, y2, ...] and returns an upper bound of the length of its outline, px.

    It needs at least 3 points, finite and at most ``MAX_OVERHANG`` image sizes away, and an outline short enough to be
    rasterized.
    """
    if type(polygon) is not list or not _are_numbers(polygon):
        raise DataError("polygon-type", where, f"expected a flat list of numbers, got {short_repr(polygon)}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise DataError("polygon-length", where, f"expected an even number of values, at least 6, got {len(polygon)}")
    limit = MAX_OVERHANG * max(height, width)
    low, high = min(polygon), max(polygon)
    # min and max can miss a NaN, the sum cannot; it is only computed if it cannot overflow
    if low == -math.inf or high == math.inf or (-limit <= low and high <= limit and math.isnan(sum(polygon))):
        raise DataError("polygon-finite", where, "expected finite numbers, got an infinite coordinate or NaN")
    if not (-limit <= low and high <= limit):
        if any(value != value for value in polygon):
            raise DataError("polygon-finite", where, "expected finite numbers, got NaN")
        far = low if -low > high else high
        message = f"expected coordinates at most {MAX_OVERHANG} image sizes ({limit} px) away, got {short_repr(far)}"
        raise DataError("polygon-range", where, message)
    longest = min(MAX_OUTLINE * (height + width), MAX_OUTLINE_PX)
    bound = len(polygon) // 2 * (high - low)  # cheap; the exact length only if this exceeds the limit
    if bound > longest:
        bound = _outline(polygon)
        if bound > longest:
            raise DataError(
                "polygon-outline", where, f"expected an outline of at most {longest} px, got {bound:.0f} px"
            )
    return bound


def _outline(polygon: list[float]) -> float:
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def check_rle(rle: Mapping[str, Any], height: int, width: int, where: str) -> None:
    """Checks the RLE of a mask (height, width), compressed or not: it must decode and fill the mask exactly."""
    size = rle.get("size")
    if type(size) is not list or size != [height, width] or set(map(type, size)) != {int}:
        raise DataError("rle-size", where, f"expected size [{height}, {width}], got {short_repr(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        total = int(parse_counts(counts, where).sum())
    elif type(counts) is list and set(map(type, counts)) <= {int}:
        if counts and min(counts) < 0:
            raise DataError(
                "rle-decodes", where, f"expected run lengths, got the negative number {short_repr(min(counts))}"
            )
        total = sum(counts)
    else:
        message = f"expected counts as a list of integers or a string, got {short_repr(counts)}"
        raise DataError("rle-type", where, message)
    if total != height * width:
        raise DataError("rle-sum", where, f"expected runs that cover {height * width} pixels, got {short_repr(total)}")


def parse_counts(counts: str | bytes, where: str) -> np.ndarray:
    """Decodes a compressed COCO string to run lengths (R,) int64, without C code. Raises DataError.

    Each number is a sequence of characters from 48 on with 5 bits each, lowest first. Bit 6 is set if another
    character follows; the top bit of the last character is the sign. From the fourth number on, a number is the
    difference to the second-last run length, because runs of the same color have similar lengths.
    """
    data = counts if isinstance(counts, bytes) else counts.encode("utf-8", "surrogatepass")
    bits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(bits) == 0:
        return bits
    if bits.min() < 0 or bits.max() > 63:
        raise DataError("rle-decodes", where, "expected characters from '0' to 'o' as compressed counts, got others")
    last = np.flatnonzero(bits & 32 == 0)
    if len(last) == 0 or last[-1] != len(bits) - 1:
        raise DataError(
            "rle-decodes", where, "expected complete compressed counts, got a string that ends within a number"
        )
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits: more than any image within the pixel limit needs
        raise DataError("rle-decodes", where, "expected run lengths, got a number of more than 35 bits")
    place = 5 * (np.arange(len(bits)) - np.repeat(first, lengths))
    values = np.add.reduceat((bits & 31) << place, first)
    values -= np.where(bits[last] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0 or values.max() > MAX_RUN:
        raise DataError("rle-decodes", where, f"expected run lengths from 0 to {MAX_RUN}, got one outside")
    return values


def check_segmentation(segmentation: object, height: int, width: int, where: str) -> None:
    """Checks a segmentation: a list of polygons, possibly empty, or an RLE of the image's size."""
    if type(segmentation) is list:
        if len(segmentation) > MAX_POLYGONS:
            message = f"expected at most {MAX_POLYGONS} polygons per instance, got {len(segmentation)}"
            raise DataError("polygon-count", where, message)
        bound = sum(check_polygon(polygon, height, width, where) for polygon in segmentation)
        if bound > MAX_OUTLINES_PX and (outlines := sum(map(_outline, segmentation))) > MAX_OUTLINES_PX:
            message = f"expected outlines of at most {MAX_OUTLINES_PX} px in total, got {outlines:.0f} px"
            raise DataError("polygon-outline", where, message)
    elif isinstance(segmentation, Mapping):
        check_rle(segmentation, height, width, where)
    else:
        message = f"expected a list of polygons or an RLE object, got {short_repr(segmentation)}"
        raise DataError("segmentation-type", where, message)


def check_crowd(flag: object, where: str) -> bool:
    """Returns the ``iscrowd`` flag."""
    if type(flag) not in (int, bool) or flag not in (0, 1):
        raise DataError("crowd-flag", where, f"expected iscrowd 0 or 1, got {short_repr(flag)}")
    return bool(flag)


def check_area(area: object, where: str) -> float | None:
    """Returns the ``area`` of an annotation in px, None if it has none."""
    if area is None:
        return None
    if type(area) not in (int, float) or not 0 <= area < 1e15:  # type: ignore[operator]
        raise DataError(
            "area-type", where, f"expected a finite, non-negative number of pixels as area, got {short_repr(area)}"
        )
    return float(area)  # type: ignore[arg-type]


def check_instance(
    box: Sequence[float], mask_box: Sequence[float], area: float, height: int, width: int, where: str
) -> bool:
    """Returns whether an instance has something to learn from, given its box, the box and the area of its mask (px).

    Boxes are XYWH. Returns False if box or mask is empty and the other one is smaller than ``STRAY_CLICK``. Raises
    DataError if one is empty and the other is not, or if the box reaches out of the image.
    """
    x, y, w, h = box
    over = max(-x, -y, x + w - width, y + h - height)
    if over > BOX_OVERHANG:
        box_text = f"[{x:g}, {y:g}, {w:g}, {h:g}]"
        message = f"expected bbox within the {height} x {width} image, got {box_text}, {over:g} px outside"
        raise DataError("box-outside", where, message)
    inside = min(min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0))  # the shorter side
    if area == 0:
        if inside >= STRAY_CLICK:
            message = f"expected a mask within the image, got no pixel, although bbox is {w:g} x {h:g} px"
            raise DataError("mask-empty", where, message)
        return False
    if inside <= 0:
        if min(mask_box[2], mask_box[3]) >= STRAY_CLICK:
            message = f"expected a bbox around the mask of {area:g} px, got {w:g} x {h:g} px"
            raise DataError("box-empty", where, message)
        return False
    return True


def check_box_mask(box: Sequence[float], mask_box: Sequence[float], where: str) -> None:
    """Raises a warning if the IoU of the box and the mask's box, both XYWH px, is below ``BOX_MASK_IOU``.

    Sides that differ by at most ``BOX_SLACK`` px are accepted.
    """
    (x, y, w, h), (mx, my, mw, mh) = box, mask_box
    right, bottom, mask_right, mask_bottom = x + w, y + h, mx + mw, my + mh
    off = max(abs(x - mx), abs(y - my), abs(right - mask_right), abs(bottom - mask_bottom))
    if off <= BOX_SLACK:
        return
    across = max(0.0, min(right, mask_right) - max(x, mx))
    common = across * max(0.0, min(bottom, mask_bottom) - max(y, my))
    iou = common / (w * h + mw * mh - common)
    if iou < BOX_MASK_IOU:
        message = f"expected the mask's box [{mx:g}, {my:g}, {mw:g}, {mh:g}], got bbox [{x:g}, {y:g}, {w:g}, {h:g}], "
        raise DataError("box-mask", where, message + f"IoU {iou:.2f} < {BOX_MASK_IOU}")


def check_area_mask(area: float | None, mask_box: Sequence[float], mask_area: float, where: str) -> None:
    """Raises a warning if ``area`` is not the area of the mask, px. Accepts a difference of ``AREA_SLACK`` plus the
    pixels along the border."""
    if area is not None and abs(area - mask_area) > AREA_SLACK * mask_area + mask_box[2] + mask_box[3]:
        kind = " (the area of the box)" if abs(area - mask_box[2] * mask_box[3]) <= 0.1 * area else ""
        raise DataError("area-mask", where, f"expected the area of the mask, {mask_area:g} px, got {area:g}{kind}")


def _are_numbers(values: Sequence[object]) -> bool:
    return set(map(type, values)) <= {int, float}  # not bool, a subclass of int
