"""TODO docstring."""

import reprlib
from dataclasses import dataclass

# Pillow's own limit against decompression bombs: a quarter of a GiB of 24-bit pixels. It warns from here on and
# refuses twice as many, which no setting of ours can change.
MAX_PIXELS = 1024**3 // 4 // 3

# Polygons reach over the border by rounding or by design of a tool; pycocotools takes time and memory linear
# in the coordinate (1e7: 6.9 s and 1.2 GB), so what lies further out than this is an error.
MAX_OVERHANG = 10

# An outline may be this many times as long as height + width: its length is what pycocotools' time and memory are
# linear in (1e6 px: 0.7 s and 0.14 GB), and a zigzag makes it as long as it likes. Real sets reach 4.
MAX_OUTLINE = 100

# ... and no longer than this, however long and thin an image claims to be.
MAX_OUTLINE_PX = 1_000_000

# Those of one instance together.
MAX_OUTLINES_PX = 2 * MAX_OUTLINE_PX

# Parts of one instance; the most in COCO and in our real sets are a few dozen.
MAX_POLYGONS = 2000

# px over the border that a box may reach: rounding, and tools that count from one.
BOX_OVERHANG = 2.0

# A box or mask with a side below this is a stray click: COCO train2017 has two with a side of zero.
STRAY_CLICK = 2.0

# Boxes are drawn to 3 px in COCO; one COCO annotation in some 2000 of ours has an IoU below this.
BOX_SLACK, BOX_MASK_IOU = 3.0, 0.5

AREA_SLACK = 0.1  # of the mask; polygons are measured exactly or by their pixels, which differ along the border

MAX_DETS = 100  # detections of an image that COCO figures count

MAX_RUN = 2**32 - 1  # pycocotools keeps run lengths in 32 bits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one data set may cost: `data.max_pixels` and so on in a run, `--max-pixels` and so on of validate."""

    max_pixels: int = MAX_PIXELS  # of an image; at most 2 * MAX_PIXELS
    # of an image, crowds included; the densest aerial set we know (iSAID) has about 8000
    max_instances: int = 10_000
    # GiB that an annotation file may take, text and parsed: as estimated, COCO train2017 takes 6
    max_json_gib: float = 16.0


LIMITS = Limits()

# rule -> what the user can do about it; docs/reference/data_rules.md says what each one means
RULES: dict[str, str] = {
    "file-missing": "give an existing path",
    "file-read": "make it a plain file that may be read",
    "file-size": "split the file, or raise the cap (data.max_json_gib, --max-json-gib)",
    "file-json": "give a COCO file: an object with the lists images, annotations and categories",
    "key-missing": "add the key, see the COCO data format",
    "key-type": "write the value as the COCO data format has it",
    "id-type": "use whole numbers as ids",
    "id-duplicate": "give each entry its own id",
    "id-unknown": "remove the annotation or add the entry it refers to",
    "categories": "give both files the same `categories` list",
    "category-name": "merge the categories or rename one",
    "category-twin": "remove the category without annotations or rename it",
    "category-absent": "label examples of it, or draw another fold or a larger share",
    "image-path": "use names relative to the image folder, which must hold the files themselves",
    "image-missing": "put the file there, or give the folder the names are relative to (data.images)",
    "image-empty": "fetch the file again or remove it",
    "image-format": "convert it to JPEG, PNG or WebP, or remove it",
    "image-decodes": "fetch the file again or remove it",
    "image-mode": "convert it to 8-bit RGB or grayscale",
    "image-size": "write the upright height and width as positive whole numbers of pixels",
    "image-unlike": "give the annotations of this very file, in the frame of the upright picture",
    "image-pixels": "scale the image down, or raise the cap (data.max_pixels, --max-pixels)",
    "image-instances": "tile the image, or raise the cap (data.max_instances, --max-instances)",
    "image-crowded": "tile the image if more than that many objects matter: COCO figures count no more",
    "image-leak": "remove the picture from one of the two parts",
    "crowd-flag": "write iscrowd as 0 or 1",
    "crowd-rle": "write the crowd as RLE, or iscrowd 0 if it is one object: crowds are not learned",
    "area-type": "write the number of pixels of the mask, or leave it out",
    "area-mask": "recompute area from the mask (--fix does)",
    "box-type": "write bbox as four numbers: x, y, width, height in pixels",
    "box-finite": "write finite numbers",
    "box-size": "write width and height, which are not negative",
    "box-outside": "write bbox as x, y, width, height within the image (not as two corners, not at another scale)",
    "box-empty": "recompute bbox from the mask (--fix does)",
    "box-mask": "look which of the two is right; --fix recomputes bbox from the mask",
    "mask-empty": "draw the mask within the image or remove the annotation",
    "instance-empty": "remove the annotation; it is left out",
    "segmentation-type": "write a list of polygons, or RLE as an object with size and counts",
    "polygon-type": "write each polygon as a flat list of numbers: x1, y1, x2, y2, ...",
    "polygon-length": "give at least three points, as pairs x, y",
    "polygon-finite": "write finite numbers",
    "polygon-range": "write pixels of this image, not fractions of another one",
    "polygon-outline": "draw a simpler outline, or encode the mask as RLE",
    "polygon-count": "encode the mask as RLE",
    "rle-type": "write counts as a list of run lengths or as a compressed COCO string",
    "rle-size": "write size as [height, width] of the image",
    "rle-decodes": "encode the mask again, with pycocotools.mask.encode",
    "rle-sum": "encode the mask again at the size of its image",
    "score-range": "write score and iou as numbers from 0 to 1",
    "scored-empty": "nothing need be done; it is left out",
    "scored-images": "predict again, on the images as they are now",
    "data-layout": "name the parts yourself: data.train, data.val, data.unlabeled and data.images",
    "cityscapes-layout": (
        "arrange the files as ROOT/gtFine/PART/CITY/NAME_gtFine_instanceIds.png (or NAME_gtFine_polygons.json) and "
        "ROOT/leftImg8bit/PART/CITY/NAME_leftImg8bit.png, and give data.train=ROOT/gtFine/train"
    ),
    "cityscapes-label": "use the labels of Cityscapes, or remove the object",
    "cityscapes-ids": "give the instanceIds.png of the release (not labelIds, not train ids)",
    "shard-manifest": "give a folder that `pais-ray shard` has finished; the same command again completes it",
    "shard-truncated": "fetch the file again, or write the shards anew with `pais-ray shard` into an empty folder",
    "shard-damaged": "fetch the file again, or write the shards anew with `pais-ray shard` into an empty folder",
    "cityscapes-results": "write one NAME.txt an image with lines `mask.png label score`, masks beside it",
}

# Found and told, but nothing refuses the data: reading puts them right or leaves them out, or they are the user's call.
WARNINGS = frozenset(
    {
        *("category-twin", "category-absent", "image-crowded", "crowd-rle"),
        *("area-mask", "box-mask", "instance-empty", "scored-empty"),
    }
)


def severity(rule: str) -> str:
    """ "error" or "warning"."""
    return "warning" if rule in WARNINGS else "error"


class DataError(ValueError):
    """Data that breaks a rule of ``RULES``: ``where: what was expected, what came; remedy [rule]``."""

    def __init__(self, rule: str, where: str, message: str, remedy: str | None = None) -> None:
        self.rule, self.where, self.message = rule, where, message
        self.remedy = RULES[rule] if remedy is None else remedy
        super().__init__(rule, where, message, self.remedy)  # the arguments, so that it pickles

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy} [{self.rule}]"


def short(value: object) -> str:
    """The value as Python shows it, cut: whatever a file holds, a message stays one readable line."""
    try:
        return _repr.repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits
        return f"a huge {type(value).__name__}"


_repr = reprlib.Repr()

_repr.maxstring = _repr.maxother = _repr.maxlong = 60

_repr.maxlevel = 2
