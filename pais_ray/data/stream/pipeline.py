"""Records -> Ray Data -> one stream of step rows per rank.

Encoded bytes travel through the object store, at most ``READ_AHEAD_BYTES`` of them ahead; pixels exist only in the
worker, decoded in its collate threads. The tasks that read bytes import this module, so it must not import torch at
the top: that costs seconds in every one of Ray's task processes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.data.datasource import Datasource, ReadTask

from pais_ray.data.annotations.records import LabeledRecord, Record
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.images.images import decode
from pais_ray.data.images.reader import Reader
from pais_ray.data.sources.scored_masks import SCORED, ScoredMasks, to_predictions, to_table
from pais_ray.data.stream.plan import RankRows, StepPlan
from pais_ray.data.validation.rules import MAX_PIXELS
from pais_ray.data.validation.values import check_upright

if TYPE_CHECKING:
    import torch

    from pais_ray.augmentation.photometric import Photometric
    from pais_ray.augmentation.sample import Sample

ROWS_PER_BLOCK = 16  # a block of 16 rows x 4 images x ~0.15 MB is ~10 MB: a few MB are best (docs/architecture.md)
BLOCK_BYTES = 8 * 2**20  # from which on a task's rows make a block
# Row groups that a task reads of the part drawn least: the last one is shared with the next task, and read twice.
GROUPS_PER_TASK = 8
READ_AHEAD_BYTES = 256 * 2**20  # a stream's blocks in the object store, read but not yet used
LOOP_PAUSE_S = 0.05  # between two rounds of Ray Data's scheduling loop
# Of thousands in a long run: Ray Data puts every task of a data set into the object store when it starts.
TASKS_PER_DATASET = 256
MOST_READERS = 4  # tasks that a stream has reading at once; on small machines fewer, see readers()


Given: TypeAlias = "ray.ObjectRef[tuple[Feed, RankRows]]"


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A run's data in the object store: one table a part. The unlabeled table *has no* label columns."""

    plan: StepPlan
    labeled: "ray.ObjectRef[pa.Table]"
    unlabeled: "ray.ObjectRef[pa.Table]"
    max_pixels: int  # of an image
    scored: "ray.ObjectRef[pa.Table] | None" = None  # masks from elsewhere, a row an unlabeled image


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step row as a rank receives it: decoded, on the CPU."""

    g: int
    labeled: list["Sample"]
    unlabeled: list["Sample"]


def make_feed(
    plan: StepPlan,
    labeled: Sequence[Record],
    unlabeled: Sequence[Record],
    scored: Sequence[ScoredMasks] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Feed:
    """Puts the records (paths, sizes, RLE; no pixels) into the object store; ``scored`` has one item an unlabeled.
    Labels of shards stay in the shards."""
    return Feed(
        plan=plan,
        labeled=ray.put(_table(labeled)),
        unlabeled=ray.put(_table(unlabeled)),
        max_pixels=max_pixels,
        scored=None if scored is None else ray.put(to_table(scored)),
    )


def step_rows(
    feed: Feed,
    rows: RankRows,
    *,
    prefetch: int = 4,
    photometric: "Photometric | None" = None,
) -> Iterator[Row]:
    """The ``rows`` of the plan, in order.

    ``photometric`` (seeded image -> image) is applied to labeled images where they are decoded.
    """
    if len(rows) == 0:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # else collate threads deliver batches as they finish
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=READ_AHEAD_BYTES
    )
    context.custom_execution_callback_classes = [_Pause]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES  # a task gives its rows away block by block, as it reads on
    collate = _Collate(seed=feed.plan.seed, photometric=photometric, max_pixels=feed.max_pixels)
    given = ray.put((feed, rows))
    size = task_rows(feed.plan)
    for start in range(0, len(rows), size * TASKS_PER_DATASET):
        source = _StepRows(given, range(start, min(start + size * TASKS_PER_DATASET, len(rows))), size, feed.plan)
        stream = ray.data.read_datasource(
            source,
            override_num_blocks=len(source.parts),
            num_cpus=0,  # else streams that wait for each other in a collective can also wait for each other's CPUs
            concurrency=min(readers(rows.world), len(source.parts)),
        )
        yield from stream.iterator().iter_torch_batches(
            batch_size=feed.plan.images_per_row, prefetch_batches=prefetch, collate_fn=collate, device="cpu"
        )


def task_rows(plan: StepPlan) -> int:
    """Step rows of a reading task: of shards so many that few row groups are needed by two tasks."""
    parts = ((plan.labeled_groups, plan.labeled), (plan.unlabeled_groups, plan.unlabeled))
    whole = (GROUPS_PER_TASK * max(groups) // count for groups, count in parts if groups and count)
    return max(ROWS_PER_BLOCK, *whole, 0)


def readers(streams: int) -> int:
    """Reading tasks at once of each of so many streams: one a CPU of the cluster, within bounds."""
    return max(1, min(MOST_READERS, int(ray.cluster_resources().get("CPU", 1.0)) // streams))


class _StepRows(Datasource):
    """A stretch of one rank's rows, as tasks of Ray Data of ``size`` rows each."""

    def __init__(self, given: Given, rows: range, size: int, plan: StepPlan) -> None:
        super().__init__()
        self.given = given
        self.parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.images = plan.images_per_row

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read_rows, part, self.given),
                BlockMetadata(num_rows=len(part) * self.images, size_bytes=None, exec_stats=None),
            )
            for part in self.parts
        ]


class _Pause:
    """An execution callback of Ray Data that lets its scheduling loop rest.

    The loop (Ray 2.60) waits only while tasks run. Without a free CPU or with its output full it spins, in a thread
    of the training process: steps took three times as long.
    """

    def before_execution_starts(self, executor: object) -> None: ...
    def on_execution_step(self, executor: object) -> None:
        time.sleep(LOOP_PAUSE_S)

    def after_execution_succeeds(self, executor: object) -> None: ...
    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


def _table(records: Sequence[Record]) -> pa.Table:
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


_SCHEMA = pa.schema(
    [
        ("g", pa.int64()),
        ("slot", pa.int32()),
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bytes", pa.large_binary()),  # 32-bit offsets overflow at 2 GB (ray#29492)
        ("boxes", pa.list_(pa.float32())),  # null in unlabeled rows, as the next two
        ("labels", pa.list_(pa.int64())),
        ("rles", pa.list_(pa.binary())),
        ("scored", SCORED),
    ]
)


def _read_rows(indices: range, given: Given) -> Iterator[pa.Table]:
    """In a Ray task: one output row an image, ``images_per_row`` of them a step row, labeled ones first."""
    feed, rows = ray.get(given)
    labeled, unlabeled = ray.get([feed.labeled, feed.unlabeled])
    if feed.scored is not None:
        unlabeled = unlabeled.append_column("scored", ray.get(feed.scored)["scored"])
    walked = [rows[index] for index in indices]
    lanes = {g % feed.plan.lanes for g in walked}  # in each of them lies a row group that is being read
    parts: list[tuple[Reader, Iterator[dict[str, Any]]]] = []  # and what each reads, in order
    for table, drawn in zip((labeled, unlabeled), zip(*map(feed.plan.row, walked), strict=True), strict=True):
        # the labels of shards lie in the shards, and are read of the labeled part alone
        reader = Reader(labels=table is labeled and "rles" not in table.column_names, keep=len(lanes) + 1)
        parts.append((reader, iter(table.take(np.concatenate(drawn)).to_pylist())))
    counts = (feed.plan.labeled, feed.plan.unlabeled)
    for start in range(0, len(walked), ROWS_PER_BLOCK):
        out: list[dict[str, Any]] = []
        for g in walked[start : start + ROWS_PER_BLOCK]:
            picked = [part for part, count in zip(parts, counts, strict=True) for _ in range(count)]
            for slot, (reader, records) in enumerate(picked):
                record = next(records)
                out.append({"g": g, "slot": slot, **record, **reader.read(record["path"], record["image_id"])})
        yield pa.Table.from_pylist(out, schema=_SCHEMA)


class _Collate(ArrowBatchCollateFn):
    """Decodes one step row. Runs in several threads at once, so it keeps no state."""

    def __init__(self, *, seed: int, photometric: "Photometric | None", max_pixels: int) -> None:
        self.seed = seed
        self.photometric = photometric
        self.max_pixels = max_pixels

    def __call__(self, batch: pa.Table) -> Row:
        labeled: list[Sample] = []
        unlabeled: list[Sample] = []
        g = batch["g"][0].as_py()
        for i in range(batch.num_rows):
            is_labeled = batch["boxes"][i].is_valid
            (labeled if is_labeled else unlabeled).append(self._sample(batch, i))
        return Row(g=g, labeled=labeled, unlabeled=unlabeled)

    def _sample(self, batch: pa.Table, i: int) -> "Sample":
        import torch

        from pais_ray.augmentation.sample import Sample
        from pais_ray.augmentation.sampling import view_seed

        g, slot, image_id = (batch[name][i].as_py() for name in ("g", "slot", "image_id"))
        path, height, width = (batch[name][i].as_py() for name in ("path", "height", "width"))
        image = decode(batch["bytes"][i].as_buffer(), path, self.max_pixels)
        if not batch["boxes"][i].is_valid:
            masks, scored = batch["scored"][i].as_py(), None
            if masks is not None:
                check_upright(image.shape[0], image.shape[1], (height, width), path)
                scored = to_predictions(masks, height, width)
            return Sample(image=_planes(image), image_id=image_id, row=g, slot=slot, scored=scored)
        check_upright(image.shape[0], image.shape[1], (height, width), path)
        if self.photometric is not None:
            image = self.photometric.apply(image, view_seed(self.seed, g, slot, "photometric"))
        return Sample(
            image=_planes(image),
            image_id=image_id,
            row=g,
            slot=slot,
            boxes=torch.tensor(batch["boxes"][i].as_py(), dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(batch["labels"][i].as_py(), dtype=torch.int64),
            masks=torch.from_numpy(decode_rle(batch["rles"][i].as_py(), height, width)),
        )


def _planes(image: "np.ndarray") -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
