"""Read shards: a data set as a folder of Parquet files on disk or in an object store, made for streaming. Torch-free.

    PART-00000.parquet ...   unchanged encoded images in row groups; in labeled parts also their instances
    PART-index.parquet       location and size of each image; in labeled parts also the classes of its instances
    truth.json               COCO ground truth of PART `val`, with crowds
    split.json               manifest of the split, if one was drawn
    manifest.json            files of the folder with sizes and SHA-256; written last

Parts are `train` (every image with its labels) or `labeled` and `unlabeled`, and `val`. The unlabeled part has no
columns for labels. ``writer`` writes shards.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import groupby
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pais_ray.data import reading
from pais_ray.data.annotations.coco import build_dataset
from pais_ray.data.annotations.records import Category, CocoDataset, Record, ShardRecord
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.data.images.reader import ShardLocation, parse_shard_location
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage

FORMAT, VERSION = "pais-ray shards", 1
MARK = re.compile('"format": *"pais[-_]ray shards"')  # in MANIFEST and DRAFT
DRAFT = "writing.json"  # the manifest without files, until all files are written
MANIFEST, TRUTH, SPLIT = "manifest.json", "truth.json", "split.json"
CHUNK = 8 * 2**20  # bytes per read when a whole file is hashed

Result = TypeVar("Result")
AnyRecord = TypeVar("AnyRecord", bound=Record)


def is_shard_folder(path: str | None) -> bool:
    """Whether the path is a folder of shards, complete or not. Annotations at a URL are always shards, so that a URL is
    not read."""
    if path is None or storage.is_url(path):
        return path is not None
    for name in (MANIFEST, DRAFT):
        try:
            with open(os.path.join(path, name), encoding="utf-8") as file:
                if MARK.search(file.read(4096)):
                    return True
        except (OSError, ValueError):
            continue
    return False


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a folder of shards."""

    name: str
    part: str | None  # None: belongs to no single part
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a folder of shards."""

    made_of: str  # SHA-256 of sources and layout
    seed: int  # of the order of rows in train, labeled and unlabeled
    rows_per_group: int
    rows_per_file: int
    source_sha256: str  # of the annotations of the source
    num_crowd: int
    num_dropped: int
    categories: tuple[Category, ...]
    files: tuple[File, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Part -> number of images."""
        return {f.part: f.rows for f in self.files if f.part is not None and f.name == index_name(f.part)}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes, place: str) -> "Manifest":
        try:
            tree: dict[str, Any] = json.loads(data)
            if tree.pop("format") != FORMAT:
                raise ValueError("a different format")
            if (version := tree.pop("version")) != VERSION:
                message = f"expected version {VERSION} of the format, got version {version}"
                raise DataError("shard-manifest", place, message)
            tree["categories"] = tuple(Category(**c) for c in tree["categories"])
            tree["files"] = tuple(File(**f) for f in tree["files"])
            return cls(**tree)
        except DataError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            raise DataError("shard-manifest", place, f"expected a manifest of shards, got {got}") from error


def index_name(part: str) -> str:
    return f"{part}-index.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardDataset(CocoDataset):
    """The part of shards with labels, and its split and unlabeled part."""

    manifest_sha256: str
    split: SplitManifest | None  # None: no split was drawn
    unlabeled: tuple[Record, ...] | None  # None: no unlabeled part


def read_manifest(folder: str) -> Manifest:
    """The manifest of a folder of shards. Raises DataError if a file is missing or has another size."""
    return _manifest(folder)[0]


def read_shards(folder: str, part: Literal["train", "val"], limits: Limits = LIMITS) -> ShardDataset:
    """The images of shards: those of ``val`` with their instances, those of ``train`` with the classes of instances.

    Reads the manifest and the indices, but no image. Raises DataError.
    """
    folder = storage.absolute(folder)
    manifest, digest = _manifest(folder)
    if part == "val":
        truth = json.loads(_read(folder, manifest, TRUTH))
        read = build_dataset(truth, storage.join(folder, TRUTH), None, manifest.source_sha256, truth, limits)
        paths = {record.image_id: record.path for record in _records(folder, manifest, "val")}
        if paths.keys() != {record.image_id for record in read.records}:
            raise DataError("shard-manifest", folder, f"{TRUTH} and the index of val have different images")
        records = tuple(replace(record, path=paths[record.image_id]) for record in read.records)
        own: dict[str, Any] = {"path": folder, "records": records, "manifest_sha256": digest}
        return ShardDataset(**{**vars(read), **own}, split=None, unlabeled=None)
    name = "labeled" if "labeled" in manifest.parts else "train"
    split = None
    if name == "labeled":
        split = SplitManifest.from_json(_read(folder, manifest, SPLIT).decode(), storage.join(folder, SPLIT))
    unlabeled = _records(folder, manifest, "unlabeled") if "unlabeled" in manifest.parts else None
    records = tuple(r for r in _records(folder, manifest, name) if isinstance(r, ShardRecord))
    if split is not None and {r.image_id for r in records} != set(split.split.labeled_ids):
        raise DataError("shard-manifest", folder, f"{SPLIT} and the index of {name} have different images")
    return ShardDataset(
        path=folder,
        sha256=manifest.source_sha256,
        manifest_sha256=digest,
        split=split,
        categories=manifest.categories,
        records=records,
        truth=folder,
        num_crowd=manifest.num_crowd,
        num_dropped=manifest.num_dropped,
        unlabeled=unlabeled,
    )


def read_truth(folder: str) -> dict[str, Any]:
    """The COCO ground truth of the part val. Raises DataError."""
    truth: dict[str, Any] = json.loads(_read(folder, read_manifest(folder), TRUTH))
    return truth


def verify(folder: str, file: File) -> None:
    """Reads and hashes a file of shards. Raises DataError."""
    path, digest = storage.join(storage.absolute(folder), file.name), sha256()

    def read() -> None:
        with reading.open_file(path) as opened:
            while data := opened.read(CHUNK):
                digest.update(data)

    _fetched(read, path)
    if digest.hexdigest() != file.sha256:
        raise DataError("shard-damaged", path, "its SHA-256 differs from that in the manifest")


def sort_by_group(records: Sequence[AnyRecord]) -> tuple[tuple[AnyRecord, ...], tuple[int, ...] | None]:
    """The records in file order and the number of them in each row group. Records that are not in shards keep their
    order and have no groups."""
    locations = [(parse_shard_location(record.path), record) for record in records]
    inside = [(location, record) for location, record in locations if location is not None]
    if len(inside) < len(locations) or not inside:
        return tuple(records), None
    inside.sort(key=lambda item: item[0])
    sizes = tuple(len(list(group)) for _, group in groupby(inside, key=lambda item: item[0][:2]))
    return tuple(record for _, record in inside), sizes


def _manifest(folder: str) -> tuple[Manifest, str]:
    place = storage.join(folder, MANIFEST)
    data = _fetched(lambda: reading.read_bytes(place), place)
    manifest = Manifest.from_json(data, place)
    sizes = _fetched(lambda: storage.list_files(folder), folder)
    for file in manifest.files:
        if sizes.get(file.name) != file.bytes:
            got = f"got {sizes[file.name]}" if file.name in sizes else "got no such file"
            message = f"expected {file.bytes} bytes (manifest), {got}"
            raise DataError("shard-truncated", storage.join(folder, file.name), message)
    return manifest, sha256(data).hexdigest()


def _fetched(action: Callable[[], Result], place: str) -> Result:
    """The result of ``action``, which reads ``place`` before a run starts. An error is raised as DataError."""
    try:
        return action()
    except DataError as error:
        raise DataError("shard-manifest", place, error.message) from error
    except storage.StorageError as error:
        raise DataError("file-read", place, error.reason, storage.REMEDY) from error


def _read(folder: str, manifest: Manifest, name: str) -> bytes:
    """The content of a small file of the folder, checked against the manifest. Raises DataError."""
    place = storage.join(folder, name)
    file = next((file for file in manifest.files if file.name == name), None)
    if file is None:
        raise DataError("shard-manifest", folder, f"expected the file {name}, got none")
    data = _fetched(lambda: reading.read_bytes(place), place)
    if sha256(data).hexdigest() != file.sha256:
        raise DataError("shard-damaged", place, "its SHA-256 differs from that in the manifest")
    return data


def _records(folder: str, manifest: Manifest, part: str) -> tuple[Record, ...]:
    """The images of a part in file order, with the classes of their instances if it is labeled."""
    place = storage.join(folder, index_name(part))
    table = pq.read_table(pa.BufferReader(_read(folder, manifest, index_name(part))))
    files = {name: storage.join(folder, name) for name in table["file"].unique().to_pylist()}
    columns = (table[name].to_pylist() for name in ("image_id", "file", "group", "row", "file_name", "height", "width"))
    plain = [
        Record(image_id=image_id, path=str(ShardLocation(files[file], group, row, name)), height=height, width=width)
        for image_id, file, group, row, name, height, width in zip(*columns, strict=True)
    ]
    if "labels" not in table.column_names:
        return tuple(plain)
    labels = [np.array(item, dtype=np.int64) for item in table["labels"].to_pylist()]
    if not set(np.concatenate(labels).tolist()) <= {category.index for category in manifest.categories}:
        raise DataError("shard-manifest", place, "expected labels of the categories, got another label")
    return tuple(ShardRecord(**vars(r), labels=own) for r, own in zip(plain, labels, strict=True))
