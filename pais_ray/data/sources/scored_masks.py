"""Scored masks as pseudo-labels: COCO results of another model or of a labeling tool. Torch-free.

Legend: N masks per image; boxes are (N, 4) XYXY px of the upright image.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pais_ray.data.annotations.records import Category, Record
from pais_ray.data.annotations.rle import decode_rle, measure, to_rles
from pais_ray.data.images.reader import image_name
from pais_ray.data.validation import entries, values
from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short_repr

if TYPE_CHECKING:
    from pais_ray.structures.batch import Predictions

# Keys of the predicted mask IoU; the first one present counts: ours, `pais-ray predict`'s, Segment Anything's.
# The default is 1, as for a segmentor that predicts no IoU.
IOU_KEYS = ("iou", "mask_iou", "predicted_iou")
LISTING = "images.json"  # written by `pais-ray predict` beside its results: the file name of each image id
# Side of a mask in its own box, in cells: twice the 28 of Mask R-CNN's targets. On COCO the mean IoU with the full-size
# mask is .996 (28 cells: .987, 112: .999). In half precision, 100 masks take 0.6 MB.
SIDE = 56

# The type of the feed's column with the masks of an image; null: the teacher makes the pseudo-labels.
SCORED = pa.struct(
    [
        ("boxes", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("ious", pa.list_(pa.float32())),
        ("rles", pa.list_(pa.large_binary())),  # 32-bit offsets overflow at 2 GB
    ]
)

Json = Mapping[str, Any]


class ImageInfo(NamedTuple):
    """The properties of an image that scored masks are checked against."""

    size: tuple[int, int] | None  # upright (height, width) px; None: invalid, which is reported elsewhere
    name: str | None  # of the image file


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredMasks:
    """The masks of one image, best first."""

    boxes: np.ndarray  # (N, 4) float32, inside the image
    labels: np.ndarray  # (N,) int64, Category.index
    scores: np.ndarray  # (N,) float32 in [0, 1]
    ious: np.ndarray  # (N,) float32 in [0, 1]
    rles: tuple[bytes, ...]  # N compressed COCO run lengths of the image's size


@dataclass(frozen=True, kw_only=True)
class ScoredFile:
    """The masks of a results file for the unlabeled images of a run."""

    path: str
    sha256: str  # of the image file
    images: tuple[ScoredMasks, ...]  # one per unlabeled image, in their order
    below: int  # number of entries left out because the score is below the method's threshold
    empty: int  # number of entries left out because the mask is empty
    elsewhere: int  # number of entries left out because their image is not unlabeled

    def summary(self) -> str:
        """Returns two lines for the start of a run."""
        scores = np.concatenate([np.zeros(0), *(image.scores for image in self.images)])
        without = sum(len(image.scores) == 0 for image in self.images)
        low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9)) if len(scores) else (math.nan,) * 3
        return (
            f"pseudo-labels from {self.path}: {len(scores)} scored masks in {len(self.images) - without} of "
            f"{len(self.images)} unlabeled images, none in {without}\n"
            f"  score {low:.2f} / {middle:.2f} / {high:.2f} (10th / 50th / 90th percentile); left out: {self.below} "
            f"below the method's threshold, {self.empty} empty, {self.elsewhere} of images that are not unlabeled"
        )


def read_scored(
    path: str,
    unlabeled: Sequence[Record],
    others: Collection[int],
    categories: Sequence[Category],
    above: float,
    limits: Limits = LIMITS,
) -> ScoredFile:
    """Reads the masks of the results file ``path`` with a score of at least ``above``.

    ``others`` are ids of images of the same source that are not unlabeled. Their entries are left out, so that one file
    can be used for several splits. Images without entries have no masks. Raises DataError for the first broken rule.
    """
    with entries.no_collection():
        listed, sha256 = _read(path, limits)
        known = {r.image_id: ImageInfo((r.height, r.width), image_name(r.path)) for r in unlabeled}
        index = {category.id: category.index for category in categories}
        check_listing(path, known)
        own: dict[int, list[tuple[Json, str]]] = {image_id: [] for image_id in known}
        below = elsewhere = 0
        for entry, where in _placed(listed, path):
            image_id = check_entry(entry, known, others, index, where)
            if image_id not in own:
                elsewhere += 1
            elif entry["score"] < above:
                below += 1
            else:
                own[image_id].append((entry, where))
        images = tuple(_masks_of(record, own.pop(record.image_id), index, path, limits) for record in unlabeled)
    kept = sum(len(image.scores) for image in images)
    empty = len(listed) - below - elsewhere - kept
    return ScoredFile(path=path, sha256=sha256, images=images, below=below, empty=empty, elsewhere=elsewhere)


def inspect_scored(
    path: str,
    known: Mapping[int, ImageInfo],
    categories: Collection[int],
    limits: Limits,
    report: Report,
) -> None:
    """Adds the findings of a results file to ``report``: the first broken rule of each entry."""
    read = report.check(_read, path, limits)
    if read is None:
        return
    report.check(check_listing, path, known)
    own: dict[int, list[tuple[Json, str]]] = {}
    for entry, where in _placed(read[0], path):
        report.annotations += 1
        image_id = report.check(check_entry, entry, known, (), categories, where)
        if image_id is not None and known[image_id].size is not None:
            own.setdefault(image_id, []).append((entry, where))
    for image_id, here in own.items():
        report.check(values.check_count, len(here), f"{path}: image {image_id}", limits)
        size = known[image_id].size
        assert size is not None  # else it is not in `own`
        _, areas, mask_boxes = _measured(here, size)
        for (entry, where), area, mask_box in zip(here, areas, mask_boxes, strict=True):
            has_pixels = report.check(_has_pixels, entry, mask_box, area, size, where)
            if has_pixels:
                report.check(values.check_box_mask, entry.get("bbox", mask_box), mask_box, where)
            elif has_pixels is False:
                report.add(DataError("scored-empty", where, "expected a mask within the image, got no pixel"))


def check_entry(
    entry: Any, known: Mapping[int, ImageInfo], others: Collection[int], categories: Collection[int], where: str
) -> int:
    """Checks each value of an entry and returns its image id; for ids in ``others`` only the id is checked."""
    if not isinstance(entry, dict):
        raise DataError("key-type", where, f"expected an object, got {short_repr(entry)}")
    value = entry.get("image_id")
    if type(value) is int and value in others:
        return value
    image_id = entries.check_reference(entry, "image", known, where)
    where = f"{where} (image {image_id})"
    entries.check_reference(entry, "category", categories, where)
    for key in ("score", *IOU_KEYS):
        number = entries.check_value(entry, key, where) if key == "score" else entry.get(key, 1.0)
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise DataError("score-range", where, f"expected a number from 0 to 1 as {key!r}, got {short_repr(number)}")
    segmentation = entries.check_value(entry, "segmentation", where)
    size = known[image_id].size
    if size is not None:
        values.check_segmentation(segmentation, *size, where)
    if "bbox" in entry:
        values.check_box(entry["bbox"], where)
    return image_id


def check_listing(path: str, known: Mapping[int, ImageInfo]) -> None:
    """Compares image ids and file names with the list that `pais-ray predict` writes, if it exists.

    The ids are positions in a folder, so other files would get the masks if the folder has changed. Raises DataError.
    """
    beside = os.path.join(os.path.dirname(path), LISTING)
    try:
        listed = entries.check_list(entries.read_tree(beside)[0], "images", beside)
    except DataError:  # no list, or a file of another tool
        return
    for entry in listed:
        if isinstance(entry, dict) and type(entry.get("id")) is int and entry["id"] in known:
            there, here = os.path.basename(str(entry.get("file_name"))), known[entry["id"]].name
            if here is not None and there != here:
                message = f"expected the file {short_repr(there)} of the prediction, got {short_repr(here)}"
                raise DataError("scored-images", f"{beside}: image {entry['id']}", message)


def to_table(images: Sequence[ScoredMasks]) -> pa.Table:
    """Returns a table with one row per image and the column ``scored`` of type ``SCORED``."""
    rows = [{name: getattr(image, name) for name in SCORED.names} | {"boxes": image.boxes.ravel()} for image in images]
    return pa.table({"scored": pa.array(rows, SCORED)})


def to_predictions(row: Json, height: int, width: int) -> "Predictions":
    """Converts a value of type ``SCORED`` to predictions in the image of (height, width) px.

    Masks are decoded one by one to ``SIDE`` cells. Imports torch: called in the collate threads of a worker.
    """
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    from pais_ray.structures.batch import Predictions
    from pais_ray.structures.masks import Masks

    num = len(row["rles"])
    grids, windows = torch.zeros(num, SIDE, SIDE, dtype=torch.float16), torch.zeros(num, 4)
    for i, counts in enumerate(row["rles"]):
        mask = decode_rle([counts], height, width)[0]
        (top, bottom), (left, right) = (_ends(mask.any(axis=axis)) for axis in (1, 0))
        crop = torch.from_numpy(mask[top:bottom, left:right]).float()
        grids[i] = adaptive_avg_pool2d(crop[None], SIDE)[0]
        windows[i] = torch.tensor([left, top, right, bottom])
    return Predictions(
        boxes=torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(row["labels"], dtype=torch.int64),
        scores=torch.tensor(row["scores"], dtype=torch.float32),
        ious=torch.tensor(row["ious"], dtype=torch.float32),
        masks=Masks.in_boxes(grids, windows),
    )


def _ends(line: np.ndarray) -> tuple[int, int]:
    """Returns the index of the first true cell and one more than that of the last."""
    where = line.nonzero()[0]
    return int(where[0]), int(where[-1]) + 1


def _read(path: str, limits: Limits) -> tuple[list[Any], str]:
    listed, sha256 = entries.read_json(path, limits)
    if not isinstance(listed, list):
        remedy = "give COCO results: image_id, category_id, segmentation and score of each mask"
        raise DataError("file-json", path, f"expected a list of scored masks, got a {type(listed).__name__}", remedy)
    return listed, sha256


def _placed(listed: Iterable[Any], path: str) -> Iterable[tuple[Any, str]]:
    return ((entry, f"{path}: entry {place}") for place, entry in enumerate(listed))


def _measured(
    own: Sequence[tuple[Json, str]], size: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[float], list[Any]]:
    """Returns RLEs, areas and boxes (XYWH px) of the checked entries of an image."""
    rles = to_rles([entry["segmentation"] for entry, _ in own], *size)
    areas, boxes = measure(rles)
    return rles, areas.tolist(), boxes.tolist()


def _has_pixels(entry: Json, mask_box: Sequence[float], area: float, size: tuple[int, int], where: str) -> bool:
    """Returns whether an entry has something to learn from. An empty mask is valid: models predict some."""
    return area > 0 and values.check_instance(entry.get("bbox", mask_box), mask_box, area, *size, where)


def _masks_of(
    record: Record, own: list[tuple[Json, str]], index: Mapping[int, int], path: str, limits: Limits
) -> ScoredMasks:
    """Returns the masks of an image that have pixels, best first."""
    values.check_count(len(own), f"{path}: image {record.image_id}", limits)
    own.sort(key=lambda item: -item[0]["score"])
    size = (record.height, record.width)
    rles, areas, mask_boxes = _measured(own, size)
    given = [entry.get("bbox", box) for (entry, _), box in zip(own, mask_boxes, strict=True)]
    xyxy = np.array(given, dtype=np.float64).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    xyxy = np.clip(xyxy, 0, [record.width, record.height] * 2).astype(np.float32)
    measured = zip(own, mask_boxes, areas, strict=True)
    keep = np.array([_has_pixels(entry, box, area, size, where) for (entry, where), box, area in measured], dtype=bool)
    keep &= (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
    ious = [next((entry[key] for key in IOU_KEYS if key in entry), 1.0) for entry, _ in own]
    return ScoredMasks(
        boxes=xyxy[keep],
        labels=np.array([index[entry["category_id"]] for entry, _ in own], dtype=np.int64)[keep],
        scores=np.array([entry["score"] for entry, _ in own], dtype=np.float32)[keep],
        ious=np.array(ious, dtype=np.float32)[keep],
        rles=tuple(rle["counts"] for rle, kept in zip(rles, keep, strict=True) if kept),
    )
