"""Read the encoded images of step rows. Neither torch nor Ray is imported: Ray's data tasks run this module.

A block is an Arrow table with one row per image: the images of consecutive step rows, the labeled images of each step
row first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pais_ray.data.annotations.records import LabeledRecord, Record
from pais_ray.data.images.reader import Reader
from pais_ray.data.sources.scored_masks import SCORED, ScoredMasks, to_table
from pais_ray.data.stream.plan import RankRows, StepPlan

ROWS_PER_BLOCK = 16  # a block of 16 rows x 4 images x ~0.15 MB is ~10 MB: a few MB are best (docs/architecture.md)

BLOCK_SCHEMA = pa.schema(
    [
        ("g", pa.int64()),  # the global step row
        ("slot", pa.int32()),  # position of the image in its step row
        ("labeled", pa.bool_()),
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bytes", pa.large_binary()),  # 32-bit offsets overflow at 2 GB (ray#29492)
        ("boxes", pa.list_(pa.float32())),  # this column and the next two are null for unlabeled images
        ("labels", pa.list_(pa.int64())),
        ("rles", pa.list_(pa.binary())),
        ("scored", SCORED),  # null for labeled images, and without data.pseudo_labels
    ]
)


@dataclass(frozen=True, kw_only=True)
class PartTables:
    """Labeled and unlabeled records as tables. The unlabeled table has no label columns."""

    labeled: pa.Table
    unlabeled: pa.Table


def build_tables(
    labeled: Sequence[Record], unlabeled: Sequence[Record], scored: Sequence[ScoredMasks] | None = None
) -> PartTables:
    """Convert the records (paths, sizes and RLEs, no pixels) to tables; ``scored`` has one item per unlabeled image.

    The labels of records in shards are not in the tables; they are read from the shards together with the images.
    """
    unlabeled_table = _record_table(unlabeled)
    if scored is not None:
        unlabeled_table = unlabeled_table.append_column("scored", to_table(scored)["scored"])
    return PartTables(labeled=_record_table(labeled), unlabeled=unlabeled_table)


def read_blocks(plan: StepPlan, tables: PartTables, rows: RankRows, indices: range) -> Iterator[pa.Table]:
    """The images of ``rows[i]`` for i in ``indices``, as blocks of up to ``ROWS_PER_BLOCK`` step rows.

    ``indices`` must not cross ``rows.num_labeled_only``: rows before it have no unlabeled images.
    """
    global_rows = [rows[index] for index in indices]
    lanes = {g % plan.lanes for g in global_rows}  # the reader is inside one row group of each lane
    parts: list[tuple[Reader, Iterator[dict[str, Any]], int]] = []  # reader, records in order, images per step row
    drawn = list(zip(*map(plan.row, global_rows), strict=True))
    counts = (plan.labeled, 0 if indices.start < rows.num_labeled_only else plan.unlabeled)
    for table, positions, count in zip((tables.labeled, tables.unlabeled), drawn, counts, strict=True):
        if count == 0:
            continue
        # The labels of shards are read from the shards, for the labeled part only.
        labels_in_shards = table is tables.labeled and "rles" not in table.column_names
        reader = Reader(labels=labels_in_shards, keep=len(lanes) + 1)
        parts.append((reader, iter(table.take(np.concatenate(positions)).to_pylist()), count))
    for start in range(0, len(global_rows), ROWS_PER_BLOCK):
        images: list[dict[str, Any]] = []
        for g in global_rows[start : start + ROWS_PER_BLOCK]:
            picked = [(reader, records) for reader, records, count in parts for _ in range(count)]
            for slot, (reader, records) in enumerate(picked):
                record = next(records)
                position = {"g": g, "slot": slot, "labeled": slot < plan.labeled}
                images.append({**position, **record, **reader.read(record["path"], record["image_id"])})
        yield pa.Table.from_pylist(images, schema=BLOCK_SCHEMA)


def _record_table(records: Sequence[Record]) -> pa.Table:
    columns = {
        "image_id": pa.array([r.image_id for r in records], pa.int64()),
        "path": pa.array([r.path for r in records], pa.string()),
        "height": pa.array([r.height for r in records], pa.int32()),
        "width": pa.array([r.width for r in records], pa.int32()),
    }
    labeled = [r for r in records if isinstance(r, LabeledRecord)]
    if labeled:
        columns["boxes"] = pa.array([r.boxes.ravel().tolist() for r in labeled], pa.list_(pa.float32()))
        columns["labels"] = pa.array([r.labels.tolist() for r in labeled], pa.list_(pa.int64()))
        columns["rles"] = pa.array([list(r.rles) for r in labeled], pa.list_(pa.binary()))
    return pa.table(columns)
