"""The rules that a data set is checked against, their limits and remedies, and the error that names a rule."""

import reprlib
from dataclasses import dataclass

# Pillow's limit against decompression bombs: a quarter of a GiB of 24-bit pixels. Pillow warns above this number and
# refuses to decode more than twice as many, whatever our settings are.
MAX_PIXELS = 1024**3 // 4 // 3

# In image sizes. Polygons may cross the border because of rounding or the labeling tool, but the time and memory that
# pycocotools needs are linear in the coordinate (1e7: 6.9 s and 1.2 GB), so coordinates further away are an error.
MAX_OVERHANG = 10

# Longest outline of a polygon, as a multiple of height + width. The time and memory that pycocotools needs are linear
# in the length (1e6 px: 0.7 s and 0.14 GB), and a zigzag can have any length. Real data sets reach 4.
MAX_OUTLINE = 100

# Longest outline of a polygon in px, for images that are very long and thin.
MAX_OUTLINE_PX = 1_000_000

# Longest outlines of one instance in total, px.
MAX_OUTLINES_PX = 2 * MAX_OUTLINE_PX

# Polygons per instance. COCO and the other real data sets that we tested have at most a few dozen.
MAX_POLYGONS = 2000

# Number of px that a box may reach over the border, because of rounding or tools that count from one.
BOX_OVERHANG = 2.0

# A box or mask with a side below this number of px is an accidental click. COCO train2017 has two with a side of zero.
STRAY_CLICK = 2.0

# The boxes in COCO are drawn with a precision of 3 px. About one of 2000 COCO annotations has an IoU below this.
BOX_SLACK, BOX_MASK_IOU = 3.0, 0.5

# Accepted difference of areas, as a fraction of the mask: the area of a polygon and of its pixels differ at the border.
AREA_SLACK = 0.1

MAX_DETS = 100  # detections per image that COCO metrics count

MAX_RUN = 2**32 - 1  # pycocotools stores run lengths in 32 bits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a data set: `data.max_pixels` etc. of a run, `--max-pixels` etc. of validate."""

    max_pixels: int = MAX_PIXELS  # per image; at most 2 * MAX_PIXELS
    # per image, crowds included; iSAID, a dense aerial data set, has about 8000
    max_instances: int = 10_000
    # estimated memory of an annotation file, text and parsed, in GiB; COCO train2017 takes 6
    max_json_gib: float = 16.0


LIMITS = Limits()

# Rule id -> remedy. docs/reference/data_rules.md explains each rule.
RULES: dict[str, str] = {
    "file-missing": "give an existing path",
    "file-read": "give a regular file with read permission",
    "file-size": "split the file, or raise the limit (data.max_json_gib, --max-json-gib)",
    "file-json": "give a COCO file: an object with the lists images, annotations and categories",
    "key-missing": "add the key, see the COCO data format",
    "key-type": "write the value as the COCO data format defines it",
    "id-type": "use integers as ids",
    "id-duplicate": "give each entry its own id",
    "id-unknown": "remove the annotation or add the entry that it refers to",
    "categories": "give both files the same `categories` list",
    "category-name": "merge the categories or rename one",
    "category-twin": "remove the category without annotations or rename it",
    "category-absent": "label examples of it, or draw another fold or a larger fraction",
    "image-path": "use names relative to the image folder, which must contain the files themselves",
    "image-missing": "add the file, or give the folder that the names are relative to (data.images)",
    "image-empty": "download the file again or remove it",
    "image-format": "convert it to JPEG, PNG or WebP, or remove it",
    "image-decodes": "download the file again or remove it",
    "image-mode": "convert it to 8-bit RGB or grayscale",
    "image-size": "write height and width of the upright image as positive integers",
    "image-unlike": "use the annotations of this file, in the coordinates of the upright image",
    "image-pixels": "scale the image down, or raise the limit (data.max_pixels, --max-pixels)",
    "image-instances": "tile the image, or raise the limit (data.max_instances, --max-instances)",
    "image-crowded": "tile the image if all objects matter: COCO metrics count at most 100 per image",
    "image-leak": "remove the image from one of the two parts",
    "crowd-flag": "write iscrowd as 0 or 1",
    "crowd-rle": "write the crowd as RLE, or set iscrowd to 0 if it is one object: crowds are not trained on",
    "area-type": "write the number of pixels of the mask, or omit area",
    "area-mask": "recompute area from the mask (--fix does)",
    "box-type": "write bbox as four numbers: x, y, width, height in pixels",
    "box-finite": "write finite numbers",
    "box-size": "write a non-negative width and height",
    "box-outside": "write bbox as x, y, width, height in pixels within the image, not as two corners",
    "box-empty": "recompute bbox from the mask (--fix does)",
    "box-mask": "check which of the two is correct; --fix recomputes bbox from the mask",
    "mask-empty": "draw the mask within the image or remove the annotation",
    "instance-empty": "remove the annotation; training skips it",
    "segmentation-type": "write a list of polygons, or an RLE object with size and counts",
    "polygon-type": "write each polygon as a flat list of numbers: x1, y1, x2, y2, ...",
    "polygon-length": "give at least three points, as pairs of x and y",
    "polygon-finite": "write finite numbers",
    "polygon-range": "write coordinates in pixels of this image",
    "polygon-outline": "draw a simpler outline, or encode the mask as RLE",
    "polygon-count": "encode the mask as RLE",
    "rle-type": "write counts as a list of run lengths or as a compressed COCO string",
    "rle-size": "write size as [height, width] of the image",
    "rle-decodes": "encode the mask again with pycocotools.mask.encode",
    "rle-sum": "encode the mask again in the size of its image",
    "score-range": "write score and iou as numbers from 0 to 1",
    "scored-empty": "no action is needed; the mask is left out",
    "scored-images": "predict again on the current images",
    "data-layout": "set the parts explicitly: data.train, data.val, data.unlabeled and data.images",
    "cityscapes-layout": (
        "arrange the files as ROOT/gtFine/PART/CITY/NAME_gtFine_instanceIds.png (or NAME_gtFine_polygons.json) and "
        "ROOT/leftImg8bit/PART/CITY/NAME_leftImg8bit.png, and give data.train=ROOT/gtFine/train"
    ),
    "cityscapes-label": "use the labels of Cityscapes, or remove the object",
    "cityscapes-ids": "use the instanceIds.png files of the release, not labelIds or train ids",
    "shard-manifest": "give a folder that `pais-ray shard` has finished; repeat the command to complete it",
    "shard-truncated": "download the file again, or write the shards again with `pais-ray shard` into an empty folder",
    "shard-damaged": "download the file again, or write the shards again with `pais-ray shard` into an empty folder",
    "cityscapes-results": "write one NAME.txt per image with lines `mask.png label score`, masks in the same folder",
}

# Rules that are reported and do not make the data invalid: reading corrects or skips the entry, or the user decides.
WARNINGS = frozenset(
    {
        *("category-twin", "category-absent", "image-crowded", "crowd-rle"),
        *("area-mask", "box-mask", "instance-empty", "scored-empty"),
    }
)


def severity(rule: str) -> str:
    """Returns the severity of a rule, "error" or "warning"."""
    return "warning" if rule in WARNINGS else "error"


class DataError(ValueError):
    """Data that breaks a rule of ``RULES``. Message: ``where: what was expected, what was found; remedy [rule]``."""

    def __init__(self, rule: str, where: str, message: str, remedy: str | None = None) -> None:
        self.rule, self.where, self.message = rule, where, message
        self.remedy = RULES[rule] if remedy is None else remedy
        super().__init__(rule, where, message, self.remedy)  # all arguments: the error is pickled

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy} [{self.rule}]"


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
SHORT.maxlevel = 2


def short_repr(value: object) -> str:
    """Returns the ``repr`` of a value of untrusted data, truncated to fit into a message."""
    try:
        return SHORT.repr(value)
    except (ValueError, RecursionError):  # for example an int with thousands of digits
        return f"a huge {type(value).__name__}"
