"""Step rows to the batches of the training step: decode the images and make their views on the training device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch

from pais_ray.augmentation.presets import ViewSet
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_batch
from pais_ray.data.stream.pipeline import Feed, stream_rows
from pais_ray.data.stream.plan import RankRows, StepPlan
from pais_ray.data.stream.rows import ROWS_PER_BLOCK, PartTables, read_blocks
from pais_ray.data.stream.samples import PixelAugmentation, decode_image
from pais_ray.data.validation.rules import MAX_PIXELS
from pais_ray.structures.batch import Batch


@dataclass(frozen=True, kw_only=True)
class DecodedRow:
    """The images of one step row on the CPU."""

    g: int  # global row
    labeled: list[Sample]
    unlabeled: list[Sample]


def stream_batches(
    feed: Feed, rows: RankRows, views: ViewSet, device: torch.device | str
) -> Iterator[list[Batch | None]]:
    """The micro-batches of each step of one rank, read with Ray Data.

    If the ranks do not divide the rows of a step evenly, the first micro-batch of some ranks is None.
    """
    decoded = stream_decoded(feed, rows, views)
    return _step_batches(decoded, rows, views, feed.plan.seed, device)


def stream_decoded(
    feed: Feed, rows: RankRows, views: ViewSet | None = None, *, prefetch: int = 4
) -> Iterator[DecodedRow]:
    """The decoded images of each row, read with Ray Data; without ``views`` there is no photometric augmentation."""
    decode = row_decoder(feed.plan, views, feed.max_pixels)
    return stream_rows(feed, rows, decode, prefetch=prefetch)


def load_batches(
    plan: StepPlan, tables: PartTables, rows: RankRows, views: ViewSet, device: torch.device | str = "cpu"
) -> Iterator[list[Batch | None]]:
    """The batches of ``stream_batches``, read in this process without Ray; for notebooks and tests."""

    def decoded() -> Iterator[DecodedRow]:
        decode = row_decoder(plan, views, MAX_PIXELS)
        boundary = rows.num_labeled_only
        for section in (range(boundary), range(boundary, len(rows))):
            for start in range(section.start, section.stop, ROWS_PER_BLOCK):
                indices = range(start, min(start + ROWS_PER_BLOCK, section.stop))
                for block in read_blocks(plan, tables, rows, indices):
                    size = block.num_rows // len(indices)
                    yield from (decode(block.slice(i * size, size)) for i in range(len(indices)))

    return _step_batches(decoded(), rows, views, plan.seed, device)


def row_decoder(plan: StepPlan, views: ViewSet | None, max_pixels: int) -> Callable[[pa.Table], DecodedRow]:
    """A function that decodes the images of one step row. It has no state, so that several threads may call it."""
    augment = _pixel_augmentation(views)

    def decode(block: pa.Table) -> DecodedRow:
        images = block.to_pylist()
        samples = [decode_image(image, max_pixels, plan.seed, augment) for image in images]
        labeled = [sample for sample, image in zip(samples, images, strict=True) if image["labeled"]]
        return DecodedRow(g=images[0]["g"], labeled=labeled, unlabeled=samples[len(labeled) :])

    return decode


def _step_batches(
    decoded: Iterator[DecodedRow], rows: RankRows, views: ViewSet, seed: int, device: torch.device | str
) -> Iterator[list[Batch | None]]:
    missing: list[Batch | None] = [None] * (rows.rounds - rows.per_step_and_rank)
    for _ in range(rows.steps):
        own = [next(decoded) for _ in range(rows.per_step_and_rank)]
        yield missing + [make_batch(row.labeled, row.unlabeled, views, seed, device) for row in own]


def _pixel_augmentation(views: ViewSet | None) -> PixelAugmentation | None:
    """The photometric augmentation of labeled images, if the configuration has one."""
    preset = None if views is None else views["labeled"].photometric
    if preset is None:
        return None
    from pais_ray.augmentation.photometric import Photometric  # importing albumentations takes seconds

    return Photometric(preset).apply
