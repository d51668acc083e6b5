"""Decode encoded images to samples: the same steps for training, evaluation and prediction."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.sampling import view_seed
from pais_ray.data.annotations.records import Record
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.images.images import decode
from pais_ray.data.images.reader import Reader
from pais_ray.data.sources.scored_masks import to_predictions
from pais_ray.data.validation.rules import MAX_PIXELS
from pais_ray.data.validation.values import check_upright
from pais_ray.files import storage

AHEAD, THREADS = 4, 2  # images that are decoded in advance, and the threads that decode them

Item = TypeVar("Item")
Result = TypeVar("Result")

# Changes the colors of an image (H, W, 3) uint8 RGB with a seed.
PixelAugmentation = Callable[[np.ndarray, int], np.ndarray]


def decode_image(
    image: Mapping[str, Any], max_pixels: int, seed: int = 0, augment: PixelAugmentation | None = None
) -> Sample:
    """The sample of one image of a block (``rows.BLOCK_SCHEMA``) as a mapping.

    ``augment`` is applied to labeled images, with a seed from the run's ``seed``. Raises DataError if the image does
    not decode, or if its annotations are for another size.
    """
    pixels = decode(image["bytes"], image["path"], max_pixels)
    height, width = image["height"], image["width"]
    position = {"image_id": image["image_id"], "row": image["g"], "slot": image["slot"]}
    if image["labeled"] or image["scored"] is not None:
        check_upright(pixels.shape[0], pixels.shape[1], (height, width), image["path"])
    if not image["labeled"]:
        scored = None if image["scored"] is None else to_predictions(image["scored"], height, width)
        return Sample.of(pixels, **position, scored=scored)
    if augment is not None:
        pixels = augment(pixels, view_seed(seed, image["g"], image["slot"], "photometric"))
    return Sample.of(
        pixels,
        **position,
        boxes=np.array(image["boxes"], dtype=np.float32).reshape(-1, 4),
        labels=np.array(image["labels"], dtype=np.int64),
        masks=decode_rle(image["rles"], height, width),
    )


def read_image(record: Record, reader: Reader | None = None, max_pixels: int | None = None) -> np.ndarray:
    """Read and decode the image of one record: (H, W, 3) uint8 RGB, upright.

    Pass the same ``reader`` for consecutive images. ``max_pixels`` defaults to a limit that the record's own size does
    not exceed: it was checked when the record was made. Raises DataError if the image is missing or damaged, OSError if
    it cannot be read.
    """
    data = (reader or Reader()).read(record.path, record.image_id)["bytes"]
    limit = max(MAX_PIXELS, record.height * record.width) if max_pixels is None else max_pixels
    return decode(data, record.path, limit)


def read_sample(record: Record, reader: Reader | None = None, max_pixels: int | None = None) -> Sample:
    """The image of one record as a sample without annotations. Arguments and errors as for ``read_image``."""
    return Sample.of(read_image(record, reader, max_pixels), image_id=record.image_id)


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``read`` of each item, in order; two threads compute a few results in advance."""
    return storage.map_in_order(read, items, THREADS, AHEAD)


def read_samples(records: Iterable[Record]) -> Iterator[Sample]:
    """``read_sample`` of each record in order, read in advance."""
    reader = Reader()
    return read_ahead(lambda record: read_sample(record, reader), records)
