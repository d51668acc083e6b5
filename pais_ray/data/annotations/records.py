"""TODO docstring."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Category:
    id: int  # as in the JSON
    name: str
    index: int  # contiguous 0..C-1, by ascending id


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One image. It has no field for labels, so labels cannot leak through it."""

    image_id: int
    path: str  # a file, a URL, or a row of a shard (shards.place_of)
    height: int  # px of the upright image; 0 where nobody has looked yet
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledRecord(Record):
    """One image with the instances to learn."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px, inside the image
    labels: np.ndarray  # (N,) int64, Category.index
    rles: tuple[bytes, ...]  # N compressed COCO run lengths of size (height, width)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardRecord(Record):
    """One image whose instances lie in its shard, beside its bytes; their classes are known."""

    labels: np.ndarray  # (N,) int64, Category.index


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoDataset:
    path: str  # of the annotations
    categories: tuple[Category, ...]
    records: tuple[LabeledRecord | ShardRecord, ...]  # in the order of the file
    sha256: str  # of the annotations' content
    truth: str | dict[str, Any]  # to score against, with crowds: the COCO file, or its content where there is none
    num_crowd: int  # annotations left out because they are crowds
    num_dropped: int  # annotations left out because box or mask is empty within the image


def annotated(dataset: CocoDataset) -> list[LabeledRecord]:
    """The images whose instances are at hand: all but those that lie in shards."""
    return [record for record in dataset.records if isinstance(record, LabeledRecord)]


def unlabel(record: Record) -> Record:
    """The image alone: a new record without the annotations."""
    return Record(image_id=record.image_id, path=record.path, height=record.height, width=record.width)
