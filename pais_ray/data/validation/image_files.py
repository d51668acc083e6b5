"""Checks image files in separate processes, so that a decoder that crashes or runs out of memory does no other harm."""

import hashlib
import itertools
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pais_ray.data.images.images import decode
from pais_ray.data.validation.rules import DataError, short_repr
from pais_ray.data.validation.values import check_upright

CHUNK = 16  # files per task
BYTES_PER_PIXEL = 8  # of the largest uncompressed image that can be decoded: four channels of 16 bits


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file to check."""

    path: str
    where: str  # its place in messages
    size: tuple[int, int] | None  # upright (height, width) px in the annotations, if there are any
    image_id: int | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of checking an image file."""

    sha256: str | None  # of the file; None if it could not be read
    error: DataError | None  # the rule that it breaks


def check_image(file: ImageFile, max_pixels: int) -> Checked:
    """Reads a file and decodes it completely: the header does not show whether an image is truncated."""
    sha256 = None
    try:
        size = os.stat(file.path).st_size
        if size > BYTES_PER_PIXEL * max_pixels:
            message = f"expected an image of at most max_pixels = {max_pixels}, got a file of {size} bytes"
            raise DataError("image-pixels", file.where, message)
        with open(file.path, "rb") as opened:
            data = opened.read()
        sha256 = hashlib.sha256(data).hexdigest()
        height, width = decode(data, file.where, max_pixels).shape[:2]
        if file.size is not None:
            check_upright(height, width, file.size, file.where)
    except DataError as error:
        return Checked(sha256, error)
    except (OSError, MemoryError) as error:
        message = f"expected a readable image file, got {short_repr(error)}"
        return Checked(sha256, DataError("image-decodes", file.where, message))
    return Checked(sha256, None)


def check_images(
    files: Iterable[ImageFile], max_pixels: int, processes: int | None = None
) -> Iterator[tuple[ImageFile, Checked]]:
    """Yields every file with its result, in order. ``processes`` defaults to the number of CPUs available."""
    count = processes or _num_cpus()
    chunks: Iterator[tuple[ImageFile, ...]] = _batched(files)
    while True:
        pending: deque[tuple[tuple[ImageFile, ...], Future[list[Checked]]]] = deque()
        with _pool(count) as pool:
            try:
                for chunk in chunks:
                    try:
                        pending.append((chunk, pool.submit(_check_chunk, chunk, max_pixels)))
                    except BrokenProcessPool:
                        chunks = itertools.chain([chunk], chunks)
                        raise
                    if len(pending) > 2 * count:
                        yield from _oldest(pending)
                while pending:
                    yield from _oldest(pending)
                return
            except BrokenProcessPool:
                pass
        # A process died. The cause is in the oldest chunk or in one that ran at the same time: check the oldest chunk
        # file by file, each in a new process, and submit the others again.
        lost = [chunk for chunk, _ in pending]
        for file in lost[0] if lost else ():
            yield file, _check_alone(file, max_pixels)
        chunks = itertools.chain(lost[1:], chunks)


def _oldest(
    pending: deque[tuple[tuple[ImageFile, ...], Future[list[Checked]]]],
) -> Iterator[tuple[ImageFile, Checked]]:
    """Yields the results of the oldest chunk, which stays in ``pending`` until its task has succeeded."""
    chunk, future = pending[0]
    results = future.result()
    pending.popleft()
    yield from zip(chunk, results, strict=True)


def _check_alone(file: ImageFile, max_pixels: int) -> Checked:
    with _pool(1) as pool:
        try:
            return pool.submit(check_image, file, max_pixels).result()
        except BrokenProcessPool:
            message = "expected an image that decodes, got one that ended the decoding process"
            return Checked(None, DataError("image-decodes", file.where, message))


def _check_chunk(files: Sequence[ImageFile], max_pixels: int) -> list[Checked]:
    return [check_image(file, max_pixels) for file in files]


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_pillow_warnings
    )


def _ignore_pillow_warnings() -> None:
    warnings.simplefilter("ignore")  # about unusual metadata of images that decode


def _batched(files: Iterable[ImageFile]) -> Iterator[tuple[ImageFile, ...]]:
    rest = iter(files)
    while chunk := tuple(itertools.islice(rest, CHUNK)):
        yield chunk
