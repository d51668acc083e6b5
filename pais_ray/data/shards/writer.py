"""Records -> shards (`shards.py`): files one after the other, each with a note of what it holds beside it, the manifest
last. What was killed goes on where it stopped, by the same call. Torch-free.
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
from pais_ray.data.images.reader import LABELS, name_of
from pais_ray.data.shards.dataset import DRAFT, MANIFEST, SPLIT, TRUTH, File, Manifest, index_name, read_manifest
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import atomic, storage

SEED = 0  # of the order of rows
PARTS = ("train", "labeled", "unlabeled", "val")  # the last one keeps its order
# Of encoded images a row group. S3 gives 50 to 100 MB/s a connection after 20 to 50 ms: this much and the wait is the
# smaller part; and a reader that holds a group or two of each part holds little.
GROUP_BYTES = 5 * 2**20
MAX_ROWS_PER_GROUP = 32  # COCO's images (0.15 MB) make groups of that size
ROWS_PER_FILE = 1024  # COCO's images make files of 0.15 GB, a hundred a part: copied in seconds, listed in one request
SAMPLE = 32  # images whose sizes say how many make a row group
THREADS, AHEAD = 8, 64  # reading images: what takes the time is waiting for the disk or the network
NOTE = ".note"  # behind the name of a file that is whole: its rows without the bytes, its size and hash

FIELDS = {"image_id": pa.int64(), "file_name": pa.string(), "height": pa.int32(), "width": pa.int32()}
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What becomes shards."""

    train: CocoDataset
    parts: Mapping[str, Sequence[Record]]  # by the names of PARTS
    truth: dict[str, Any]  # of val
    split: SplitManifest | None  # where one was chosen
    limits: Limits = LIMITS


def write_shards(
    out: str,
    source: Source,
    *,
    rows_per_group: int | None = None,
    rows_per_file: int = ROWS_PER_FILE,
    progress: Progress = lambda images, count: images,
) -> Manifest:
    """Writes to the folder or URL ``out`` what is not there yet, and returns the manifest.

    ``progress(images, count)`` wraps the loop over the images to write. Raises DataError, also where ``out`` holds
    anything else.
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
    there = storage.list_files(out)
    if _claim(out, there, draft):
        files = _write_parts(out, there, parts, source.limits, draft, progress)
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
    there: Mapping[str, int],
    parts: Mapping[str, Sequence[Record]],
    limits: Limits,
    draft: Manifest,
    progress: Progress,
) -> list[File]:
    """The files of all parts and their indices; those of which there is a note are not written again."""
    cut = {
        (part, f"{part}-{start // draft.rows_per_file:05d}.parquet"): records[start : start + draft.rows_per_file]
        for part, records in parts.items()
        for start in range(0, len(records), draft.rows_per_file)
    }
    notes = {name: _read_note(out, name, there) for _, name in cut}
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
    next(images, None)  # the bar's end
    for part, of_files in tables.items():
        index = pa.concat_tables([table.replace_schema_metadata() for table in of_files]).combine_chunks()
        files.append(_write(out, index_name(part), _parquet(index), part, index.num_rows))
    return files


def _write_file(out: str, name: str, part: str, images: Iterator[dict[str, Any]], rows_per_group: int) -> pa.Table:
    """One file of row groups, then its note, which is returned: the file is whole if there is one."""
    labels = LABELS if part in ("train", "labeled") else {}
    # what one reader wants lies together: with labels everything, without them all behind them
    schema = pa.schema({**labels, **FIELDS, "bytes": pa.large_binary()})  # 32-bit offsets end at 2 GB
    kept = [*FIELDS, *(["labels"] if labels else [])]
    notes: list[pa.Table] = []
    with storage.create(storage.join(out, name)) as file:
        # JPEG and PNG do not compress again; statistics of images would fill the footer with images
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
    return pq.read_table(pa.BufferReader(note))  # not as it was put together: as a later call would find it


def _read_note(out: str, name: str, there: Mapping[str, int]) -> pa.Table | None:
    """The note of a file that is there and whole."""
    if name + NOTE not in there or name not in there:
        return None
    try:
        note = pq.read_table(pa.BufferReader(reading.read_bytes(storage.join(out, name + NOTE))))
    except pa.ArrowException:  # a remote note that was being written
        return None
    return note if int(note.schema.metadata[b"bytes"]) == there[name] else None


def _encoded(record: Record, limits: Limits) -> dict[str, Any]:
    """The row of an image: its file as it is."""
    data = reading.read_bytes(record.path)
    height, width = record.height, record.width
    if height == 0:
        height, width = upright_size(data, record.path, limits.max_pixels)
    row = {"image_id": record.image_id, "file_name": name_of(record.path), "height": height, "width": width}
    if isinstance(record, LabeledRecord):
        row |= {"boxes": record.boxes.ravel(), "labels": record.labels, "rles": list(record.rles)}
    return {**row, "bytes": data}


def _ordered(part: str, records: Sequence[Record]) -> list[Record]:
    """The records as they are to be written: at random, so that each row group is a random sample."""
    if part == "val":
        return list(records)
    raw = np.random.PCG64(np.random.SeedSequence([SEED, PARTS.index(part)])).random_raw(len(records))
    return [records[i] for i in np.argsort(raw, kind="stable")]


def _rows_per_group(records: Sequence[Record]) -> int:
    some = records[:SAMPLE]
    size = sum(len(reading.read_bytes(record.path)) for record in some) / len(some)
    return int(min(max(GROUP_BYTES // max(size, 1), 1), MAX_ROWS_PER_GROUP))


def _made_of(source: Source, parts: Mapping[str, Sequence[Record]], truth: str, *layout: int) -> str:
    """A hash over all that these shards are made of but the pixels."""
    images = {part: [(r.image_id, name_of(r.path)) for r in records] for part, records in parts.items()}
    split = None if source.split is None else source.split.split.sha256
    tree = [SEED, layout, source.train.sha256, [asdict(c) for c in source.train.categories], truth, split, images]
    return sha256(json.dumps(tree).encode()).hexdigest()


def _claim(out: str, there: Mapping[str, int], draft: Manifest) -> bool:
    """Whether there is anything to write into the folder, which becomes ours. Raises DataError where it is not."""
    remedy = "give another folder, or the same data and options as before"
    if MANIFEST in there:
        if read_manifest(out).made_of != draft.made_of:
            raise DataError("shard-manifest", out, "expected an empty folder, got shards of other data", remedy)
        return False
    if DRAFT in there:
        if reading.read_bytes(storage.join(out, DRAFT)).decode(errors="replace") != draft.to_json():
            message = "expected an empty folder, got unfinished shards of other data"
            raise DataError("shard-manifest", out, message, remedy)
    elif others := sorted(name for name in there if not name.endswith(atomic.PARTIAL)):
        raise DataError("shard-manifest", out, f"expected an empty folder, got {others[0]}", "give an empty folder")
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
