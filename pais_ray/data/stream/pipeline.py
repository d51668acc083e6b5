"""Stream step rows to one rank with Ray Data.

Only encoded bytes travel through the object store, at most ``READ_AHEAD_BYTES`` of them in advance; the worker decodes
them in its collate threads. Ray's reading tasks import this module, so it must not import torch, which takes seconds in
each of Ray's task processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import ray
from ray.data.collate_fn import ArrowBatchCollateFn

from pais_ray.cluster import ray_compat
from pais_ray.data.annotations.records import Record
from pais_ray.data.sources.scored_masks import ScoredMasks
from pais_ray.data.stream.plan import RankRows, StepPlan
from pais_ray.data.stream.rows import ROWS_PER_BLOCK, PartTables, build_tables, read_blocks
from pais_ray.data.validation.rules import MAX_PIXELS

BLOCK_BYTES = 8 * 2**20  # target size of a block: a reading task yields its rows block by block
# Row groups per reading task of the part that is drawn least often. Consecutive tasks share one group, which is read
# twice.
GROUPS_PER_TASK = 8
READ_AHEAD_BYTES = 256 * 2**20  # blocks of a stream in the object store that were read but not yet used
# A long run needs thousands of tasks, and Ray Data puts all tasks of a data set into the object store at its start.
TASKS_PER_DATASET = 256
MAX_READERS = 4  # concurrent reading tasks per stream; fewer on small machines, see count_readers()

Inputs: TypeAlias = "ray.ObjectRef[tuple[Feed, RankRows]]"
Collated = TypeVar("Collated")


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The data of a run in the object store."""

    plan: StepPlan
    tables: "ray.ObjectRef[PartTables]"
    max_pixels: int  # largest permitted image, in pixels


def make_feed(
    plan: StepPlan,
    labeled: Sequence[Record],
    unlabeled: Sequence[Record],
    scored: Sequence[ScoredMasks] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Feed:
    """Put the records into the object store; see ``rows.build_tables``."""
    return Feed(plan=plan, tables=ray.put(build_tables(labeled, unlabeled, scored)), max_pixels=max_pixels)


def stream_rows(
    feed: Feed, rows: RankRows, collate: Callable[[pa.Table], Collated], *, prefetch: int = 4
) -> Iterator[Collated]:
    """``collate`` of the images of each row, in the order of ``rows``. ``collate`` is called in several threads of this
    process at once."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # otherwise collate threads deliver batches as they finish
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=READ_AHEAD_BYTES
    )
    ray_compat.pause_execution_loop(context)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    inputs = ray.put((feed, rows))
    task_size = rows_per_task(feed.plan)
    for section, images_per_row in _sections(feed.plan, rows):
        for start in range(section.start, section.stop, task_size * TASKS_PER_DATASET):
            stop = min(start + task_size * TASKS_PER_DATASET, section.stop)
            tasks = [range(first, min(first + task_size, stop)) for first in range(start, stop, task_size)]
            stream = ray_compat.read_dataset(
                [ray_compat.Read(read=partial(_read, t, inputs), num_rows=len(t) * images_per_row) for t in tasks],
                concurrency=count_readers(rows.world),
            )
            yield from stream.iterator().iter_torch_batches(
                batch_size=images_per_row, prefetch_batches=prefetch, collate_fn=_Collate(collate), device="cpu"
            )


def rows_per_task(plan: StepPlan) -> int:
    """Step rows per reading task. For shards it is so large that two tasks share only few row groups."""
    parts = ((plan.labeled_groups, plan.labeled), (plan.unlabeled_groups, plan.unlabeled))
    rows_of_groups = (GROUPS_PER_TASK * max(groups) // count for groups, count in parts if groups and count)
    return max(ROWS_PER_BLOCK, *rows_of_groups, 0)


def count_readers(streams: int) -> int:
    """Concurrent reading tasks of each of ``streams`` streams: one per CPU of the cluster, within limits."""
    return max(1, min(MAX_READERS, int(ray.cluster_resources().get("CPU", 1.0)) // streams))


def _sections(plan: StepPlan, rows: RankRows) -> Iterator[tuple[range, int]]:
    """Consecutive indices of ``rows`` with the same number of images per row, and that number."""
    boundary = rows.num_labeled_only if plan.unlabeled else 0
    for section, images_per_row in (
        (range(boundary), plan.labeled),
        (range(boundary, len(rows)), plan.images_per_row),
    ):
        if section and images_per_row:
            yield section, images_per_row


def _read(indices: range, inputs: Inputs) -> Iterator[pa.Table]:
    """Runs in a Ray task: one output row per image."""
    feed, rows = ray.get(inputs)
    return read_blocks(feed.plan, ray.get(feed.tables), rows, indices)


class _Collate(ArrowBatchCollateFn):
    """A function as a collate function of Ray Data."""

    def __init__(self, function: Callable[[pa.Table], Any]) -> None:
        self.function = function

    def __call__(self, batch: pa.Table) -> Any:
        return self.function(batch)
