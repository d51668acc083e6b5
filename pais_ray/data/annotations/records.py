"""Records of images and their instances: paths, sizes and run lengths, no pixels. Torch-free."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Category:
    """A class of the data set."""

    id: int  # as in the annotation file
    name: str
    index: int  # contiguous 0..C-1, by ascending id


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One image. It has no field for labels, so code that gets a Record cannot use labels by mistake."""

    image_id: int
    path: str  # a file, a URL, or a row of a shard (images.reader.ShardLocation)
    height: int  # px of the upright image; 0: not read yet
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledRecord(Record):
    """One image with the instances to learn from."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px, inside the image
    labels: np.ndarray  # (N,) int64, Category.index
    rles: tuple[bytes, ...]  # N compressed COCO run lengths of size (height, width)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardRecord(Record):
    """One image whose instances are stored in its shard, together with the image; only their classes are read."""

    labels: np.ndarray  # (N,) int64, Category.index


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoDataset:
    """The annotated images of a COCO file, of the Cityscapes layout, or of shards."""

    path: str  # of the annotations
    categories: tuple[Category, ...]
    records: tuple[LabeledRecord | ShardRecord, ...]  # in the order of the file
    sha256: str  # of the annotations
    # ground truth for scoring, with crowds: the path of the COCO file, or its content if there is no file
    truth: str | dict[str, Any]
    num_crowd: int  # annotations that are left out because they are crowds
    num_dropped: int  # annotations that are left out because box or mask is empty within the image


def annotated(dataset: CocoDataset) -> list[LabeledRecord]:
    """Returns the images whose instances are in memory: all except those in shards."""
    return [record for record in dataset.records if isinstance(record, LabeledRecord)]


def unlabel(record: Record) -> Record:
    """Returns a new record of the image without its annotations."""
    return Record(image_id=record.image_id, path=record.path, height=record.height, width=record.width)
