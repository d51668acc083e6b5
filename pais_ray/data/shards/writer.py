"""Write shards (see ``dataset``): one file after the other, each with a note of its content, and the manifest last.
After a kill, the same call continues with the missing files. Torch-free.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pais_ray.data import reading
from pais_ray.data.annotations.records import CocoDataset, LabeledRecord, Record
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.data.images.images import upright_size
from pais_ray.data.images.reader import LABELS, image_name
from pais_ray.data.shards.dataset import DRAFT, MANIFEST, SPLIT, TRUTH, File, Manifest, index_name, read_manifest
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import atomic, storage

SEED = 0  # seed of the order of rows
PARTS = ("train", "labeled", "unlabeled", "val")  # val keeps the order of the source
# Encoded images per row group. S3 delivers 50 to 100 MB/s per connection after 20 to 50 ms: with groups of this size,
# latency is the smaller part, and a reader that keeps one or two groups of each part needs little memory.
GROUP_BYTES = 5 * 2**20
MAX_ROWS_PER_GROUP = 32  # reached by the images of COCO (0.15 MB)
ROWS_PER_FILE = 1024  # for COCO, 100 files of 0.15 GB per part: copied in seconds, listed in one request
SAMPLE = 32  # images whose mean size determines the rows per group
THREADS, AHEAD = 8, 64  # for reading images, which mostly waits for the disk or the network
NOTE = ".note"  # suffix of the note of a complete file: its rows without the bytes, its size and hash

FIELDS = {"image_id": pa.int64(), "file_name": pa.string(), "height": pa.int32(), "width": pa.int32()}
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data to write as shards."""

    train: CocoDataset
    parts: Mapping[str, Sequence[Record]]  # keys: PARTS
    truth: dict[str, Any]  # COCO ground truth of val
    split: SplitManifest | None  # None: no split was drawn
    limits: Limits = LIMITS


def write_shards(
    out: str,
    source: Source,
    *,
    rows_per_group: int | None = None,
    rows_per_file: int = ROWS_PER_FILE,
    progress: Progress = lambda images, count: images,
) -> Manifest:
    """Write the missing files to the folder or URL ``out`` and return the manifest.

    ``progress(images, count)`` wraps the loop over the images to write. Raises DataError, also if ``out`` contains
    something else.
    """
    out = storage.absolute(storage.check_url(out))
    parts = {name: _ordered(name, records) for name, records in source.parts.items()}
    rows_per_group = rows_per_group or _rows_per_group(next(iter(parts.values())))
    truth = json.dumps(source.truth)
    draft = Manifest(
        made_of=_made_of(source, parts, truth, rows_per_group, rows_per_file),
        seed=SEED,
        rows_per_group=rows_per_group,
        rows_per_file=rows_per_file,
        source_sha256=source.train.sha256,
        num_crowd=source.train.num_crowd,
        num_dropped=source.train.num_dropped,
        categories=source.train.categories,
        files=(),
    )
    existing = storage.list_files(out)
    if _claim(out, existing, draft):
        files = _write_parts(out, existing, parts, source.limits, draft, progress)
        files.append(_write(out, TRUTH, truth.encode(), "val"))
        if source.split is not None:
            files.append(_write(out, SPLIT, source.split.to_json().encode()))
        _write(out, MANIFEST, replace(draft, files=tuple(files)).to_json().encode())
    manifest = read_manifest(out)
    for name in storage.list_files(out):
        if name.endswith((NOTE, atomic.PARTIAL)) or name == DRAFT:
            storage.delete(storage.join(out, name))
    return manifest


def _write_parts(
    out: str,
    existing: Mapping[str, int],
    parts: Mapping[str, Sequence[Record]],
    limits: Limits,
    draft: Manifest,
    progress: Progress,
) -> list[File]:
    """Write the files of all parts and their indices. Files that have a note are not written again."""
    cut = {
        (part, f"{part}-{start // draft.rows_per_file:05d}.parquet"): records[start : start + draft.rows_per_file]
        for part, records in parts.items()
        for start in range(0, len(records), draft.rows_per_file)
    }
    notes = {name: _read_note(out, name, existing) for _, name in cut}
    todo = [r for (_, name), records in cut.items() if notes[name] is None for r in records]
    images = iter(progress(storage.map_in_order(lambda r: _encoded(r, limits), todo, THREADS, AHEAD), len(todo)))
    tables: dict[str, list[pa.Table]] = {part: [] for part in parts}
    files = []
    for (part, name), records in cut.items():
        note = notes[name]
        if note is None:
            note = _write_file(out, name, part, islice(images, len(records)), draft.rows_per_group)
        tables[part].append(note.append_column("file", pa.array([name] * note.num_rows)))
        marks = {key.decode(): value.decode() for key, value in note.schema.metadata.items()}
        files.append(File(name=name, part=part, rows=note.num_rows, bytes=int(marks["bytes"]), sha256=marks["sha256"]))
    next(images, None)  # ends the progress bar
    for part, of_files in tables.items():
        index = pa.concat_tables([table.replace_schema_metadata() for table in of_files]).combine_chunks()
        files.append(_write(out, index_name(part), _parquet(index), part, index.num_rows))
    return files


def _write_file(out: str, name: str, part: str, images: Iterator[dict[str, Any]], rows_per_group: int) -> pa.Table:
    """Write a file of row groups, then its note, and return the note. A file with a note is complete."""
    labels = LABELS if part in ("train", "labeled") else {}
    # labels first: a reader reads either all columns or the contiguous ones behind the labels
    schema = pa.schema({**labels, **FIELDS, "bytes": pa.large_binary()})  # 32-bit offsets overflow at 2 GB
    kept = [*FIELDS, *(["labels"] if labels else [])]
    notes: list[pa.Table] = []
    with storage.create(storage.join(out, name)) as file:
        # JPEG and PNG do not compress further; statistics would put whole images into the footer
        options = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(file, schema, write_page_checksum=True, **options) as writer:
            while rows := list(islice(images, rows_per_group)):
                table = pa.Table.from_pylist(rows, schema=schema)
                writer.write_table(table, row_group_size=len(rows))
                places = {"group": pa.array([len(notes)] * len(rows), pa.int32()), "row": pa.array(range(len(rows)))}
                notes.append(pa.table({**{name: table[name] for name in kept}, **places}))
    marks = {"bytes": str(file.size), "sha256": file.sha256.hexdigest()}
    note = _parquet(pa.concat_tables(notes).replace_schema_metadata(marks))
    _write(out, name + NOTE, note)
    return pq.read_table(pa.BufferReader(note))  # read back, so that it equals what a later call reads


def _read_note(out: str, name: str, existing: Mapping[str, int]) -> pa.Table | None:
    """The note of a file, or None if the file or its note is missing or incomplete."""
    if name + NOTE not in existing or name not in existing:
        return None
    try:
        note = pq.read_table(pa.BufferReader(reading.read_bytes(storage.join(out, name + NOTE))))
    except pa.ArrowException:  # incomplete remote note
        return None
    return note if int(note.schema.metadata[b"bytes"]) == existing[name] else None


def _encoded(record: Record, limits: Limits) -> dict[str, Any]:
    """The row of an image, with the unchanged bytes of its file."""
    data = reading.read_bytes(record.path)
    height, width = record.height, record.width
    if height == 0:
        height, width = upright_size(data, record.path, limits.max_pixels)
    row = {"image_id": record.image_id, "file_name": image_name(record.path), "height": height, "width": width}
    if isinstance(record, LabeledRecord):
        row |= {"boxes": record.boxes.ravel(), "labels": record.labels, "rles": list(record.rles)}
    return {**row, "bytes": data}


def _ordered(part: str, records: Sequence[Record]) -> list[Record]:
    """The records in the order of writing: random, so that each row group is a random sample; val keeps its order."""
    if part == "val":
        return list(records)
    raw = np.random.PCG64(np.random.SeedSequence([SEED, PARTS.index(part)])).random_raw(len(records))
    return [records[i] for i in np.argsort(raw, kind="stable")]


def _rows_per_group(records: Sequence[Record]) -> int:
    some = records[:SAMPLE]
    size = sum(len(reading.read_bytes(record.path)) for record in some) / len(some)
    return int(min(max(GROUP_BYTES // max(size, 1), 1), MAX_ROWS_PER_GROUP))


def _made_of(source: Source, parts: Mapping[str, Sequence[Record]], truth: str, *layout: int) -> str:
    """A hash of all inputs of the shards except the pixels."""
    images = {part: [(r.image_id, image_name(r.path)) for r in records] for part, records in parts.items()}
    split = None if source.split is None else source.split.split.sha256
    tree = [SEED, layout, source.train.sha256, [asdict(c) for c in source.train.categories], truth, split, images]
    return sha256(json.dumps(tree).encode()).hexdigest()


def _claim(out: str, existing: Mapping[str, int], draft: Manifest) -> bool:
    """Mark the folder as being written; returns False if it is complete. Raises DataError if it has other content."""
    remedy = "use another folder, or the same data and options as before"
    if MANIFEST in existing:
        if read_manifest(out).made_of != draft.made_of:
            raise DataError("shard-manifest", out, "expected an empty folder, got shards of other data", remedy)
        return False
    if DRAFT in existing:
        if reading.read_bytes(storage.join(out, DRAFT)).decode(errors="replace") != draft.to_json():
            message = "expected an empty folder, got unfinished shards of other data"
            raise DataError("shard-manifest", out, message, remedy)
    elif others := sorted(name for name in existing if not name.endswith(atomic.PARTIAL)):
        raise DataError("shard-manifest", out, f"expected an empty folder, got {others[0]}", "use an empty folder")
    else:
        _write(out, DRAFT, draft.to_json().encode())
    return True


def _write(out: str, name: str, data: bytes, part: str | None = None, rows: int = 0) -> File:
    with storage.create(storage.join(out, name)) as file:
        file.write(data)
    return File(name=name, part=part, rows=rows, bytes=file.size, sha256=file.sha256.hexdigest())


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
