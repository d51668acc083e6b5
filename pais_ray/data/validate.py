"""What may be wrong with a data set: one rule per fault, checked before any C call sees the data. Torch-free.

A malformed polygon or run-length string makes pycocotools crash, hang or return uninitialised memory, so
every annotation passes here first. Each check raises the first rule that is broken, by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Pillow's own limit against decompression bombs: a quarter of a GiB of 24-bit pixels.
MAX_PIXELS = 1024**3 // 4 // 3
# Polygons reach over the border by rounding or by design of a tool; pycocotools takes time and memory linear
# in the coordinate (1e7: 6.9 s and 1.2 GB), so what lies further out than this is an error.
MAX_OVERHANG = 10

# rule -> what the user can do about it
RULES: dict[str, str] = {
    "file-missing": "give an existing path",
    "file-json": "give a COCO file: an object with the lists images, annotations and categories",
    "key-missing": "add the key, see the COCO data format",
    "key-type": "write the value as the COCO data format has it",
    "id-type": "use whole numbers as ids",
    "id-duplicate": "give each entry its own id",
    "id-unknown": "remove the annotation or add the entry it refers to",
    "image-path": "use names relative to the image folder, which must hold the files themselves",
    "image-missing": "put the file there, or give the folder the names are relative to (data.images)",
    "image-empty": "fetch the file again or remove it",
    "image-format": "convert it to JPEG, PNG or WebP, or remove it",
    "image-decodes": "fetch the file again or remove it",
    "image-mode": "convert it to 8-bit RGB or grayscale",
    "image-size": "write the upright height and width as positive whole numbers of pixels",
    "image-pixels": f"scale the image down to at most {MAX_PIXELS} pixels",
    "crowd-flag": "write iscrowd as 0 or 1",
    "box-type": "write bbox as four numbers: x, y, width, height in pixels",
    "box-finite": "write finite numbers",
    "box-size": "write width and height, which are not negative",
    "segmentation-type": "write a list of polygons, or RLE as an object with size and counts",
    "polygon-type": "write each polygon as a flat list of numbers: x1, y1, x2, y2, ...",
    "polygon-length": "give at least three points, as pairs x, y",
    "polygon-finite": "write finite numbers",
    "polygon-range": "write pixels of this image, not fractions of another one",
    "rle-type": "write counts as a list of run lengths or as a compressed COCO string",
    "rle-size": "write size as [height, width] of the image",
    "rle-decodes": "encode the mask again, with pycocotools.mask.encode",
    "rle-sum": "encode the mask again at the size of its image",
    "cityscapes-layout": (
        "arrange the files as ROOT/gtFine/PART/CITY/NAME_gtFine_instanceIds.png (or NAME_gtFine_polygons.json) and "
        "ROOT/leftImg8bit/PART/CITY/NAME_leftImg8bit.png, and give data.train=ROOT/gtFine/train"
    ),
    "cityscapes-label": "use the labels of Cityscapes, or remove the object",
    "cityscapes-ids": "give the instanceIds.png of the release (not labelIds, not train ids)",
    "cityscapes-results": "write one NAME.txt an image with lines `mask.png label score`, masks beside it",
}


class DataError(ValueError):
    """Data that breaks a rule of ``RULES``: ``where: what was expected, what came; remedy [rule]``."""

    def __init__(self, rule: str, where: str, message: str, remedy: str | None = None) -> None:
        self.rule, self.where, self.message = rule, where, message
        self.remedy = RULES[rule] if remedy is None else remedy
        super().__init__(rule, where, message, self.remedy)  # the arguments, so that it pickles

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy} [{self.rule}]"


def check_size(height: Any, width: Any, where: str) -> tuple[int, int]:
    """(height, width) in pixels: positive whole numbers within the pixel cap."""
    for name, value in (("height", height), ("width", width)):
        if type(value) is not int or value <= 0:
            raise DataError("image-size", where, f"expected a positive whole {name}, got {_short(value)}")
    if height * width > MAX_PIXELS:
        raise DataError("image-pixels", where, f"{height} x {width} px are more than {MAX_PIXELS}")
    return height, width


def check_box(box: object, where: str) -> tuple[float, float, float, float]:
    """A COCO box (x, y, width, height) in pixels; it may lie outside the image and be empty."""
    if type(box) is not list or len(box) != 4 or not _are_numbers(box):
        raise DataError("box-type", where, f"expected bbox [x, y, width, height], got {_short(box)}")
    # 1e15 px and more is finite, yet x + width would not be exact
    if not all(-1e15 < value < 1e15 for value in box):
        raise DataError("box-finite", where, f"expected four finite numbers, got {_short(box)}")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise DataError("box-size", where, f"expected bbox [x, y, width, height], got a negative size {_short(box)}")
    return float(x), float(y), float(width), float(height)


def check_polygon(polygon: object, height: int, width: int, where: str) -> None:
    """One polygon [x1, y1, x2, y2, ...]: at least 3 points, finite, at most ``MAX_OVERHANG`` images away."""
    if type(polygon) is not list or not _are_numbers(polygon):
        raise DataError("polygon-type", where, f"expected a flat list of numbers, got {_short(polygon)}")
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
        message = f"a coordinate of {_short(far)} is further than {MAX_OVERHANG} images ({limit} px) away"
        raise DataError("polygon-range", where, message)


def check_rle(rle: Mapping[str, Any], height: int, width: int, where: str) -> None:
    """Run lengths of a mask (height, width), compressed or not: they must be readable and fill it exactly."""
    size = rle.get("size")
    if type(size) is not list or size != [height, width]:
        raise DataError("rle-size", where, f"expected size [{height}, {width}], got {_short(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        total = int(parse_counts(counts, where).sum())
    elif type(counts) is list and set(map(type, counts)) <= {int}:
        if counts and min(counts) < 0:
            raise DataError("rle-decodes", where, f"expected run lengths, got the negative {_short(min(counts))}")
        total = sum(counts)
    else:
        message = f"expected counts as a list of whole numbers or a string, got {_short(counts)}"
        raise DataError("rle-type", where, message)
    if total != height * width:
        raise DataError("rle-sum", where, f"the runs cover {_short(total)} of {height * width} pixels")


def parse_counts(counts: str | bytes, where: str) -> np.ndarray:
    """Run lengths (R,) int64 of a compressed COCO string, which no C code has seen yet.

    Each number is a chain of characters from 48 on, 5 bits each, lowest first; bit 6 says that another
    character follows and the top bit of the last one is the sign. From the fourth number on, a number is
    the difference to the one before the last (run lengths of the same colour resemble each other).
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
    if values.min() < 0 or values.max() > MAX_PIXELS:
        raise DataError("rle-decodes", where, "the compressed counts hold a run of negative or absurd length")
    return values


def check_segmentation(segmentation: object, height: int, width: int, where: str) -> None:
    """A list of polygons (perhaps empty) or an RLE of the image's size."""
    if type(segmentation) is list:
        for polygon in segmentation:
            check_polygon(polygon, height, width, where)
    elif isinstance(segmentation, Mapping):
        check_rle(segmentation, height, width, where)
    else:
        message = f"expected a list of polygons or an RLE object, got {_short(segmentation)}"
        raise DataError("segmentation-type", where, message)


def check_crowd(flag: object, where: str) -> bool:
    """The ``iscrowd`` flag."""
    if type(flag) not in (int, bool) or flag not in (0, 1):
        raise DataError("crowd-flag", where, f"expected iscrowd 0 or 1, got {_short(flag)}")
    return bool(flag)


def _are_numbers(values: Sequence[object]) -> bool:
    return set(map(type, values)) <= {int, float}  # leaves out bool, str and None


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
