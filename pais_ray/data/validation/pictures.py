"""Image files looked at in processes of their own: a decoder that dies or eats memory takes nothing else with it."""

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
from pais_ray.data.validation.rules import DataError, short
from pais_ray.data.validation.values import check_upright

CHUNK = 16  # files a task
BYTES_PER_PIXEL = 8  # of the largest uncompressed picture that decodes: 16 bits, four channels


@dataclass(frozen=True, slots=True)
class Job:
    """A file, the name of it in findings, and the upright (height, width) its annotations say, if any."""

    path: str
    where: str
    size: tuple[int, int] | None
    image_id: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen: the SHA-256 of the file where it could be read, and the rule it breaks, if any."""

    sha256: str | None
    error: DataError | None


def look(job: Job, max_pixels: int) -> Look:
    """Reads and decodes one file, whole: headers do not tell a truncated picture."""
    sha256 = None
    try:
        size = os.stat(job.path).st_size
        if size > BYTES_PER_PIXEL * max_pixels:
            message = f"a file of {size} bytes cannot hold a picture of at most max_pixels = {max_pixels}"
            raise DataError("image-pixels", job.where, message)
        with open(job.path, "rb") as file:
            data = file.read()
        sha256 = hashlib.sha256(data).hexdigest()
        height, width = decode(data, job.where, max_pixels).shape[:2]
        if job.size is not None:
            check_upright(height, width, job.size, job.where)
    except DataError as error:
        return Look(sha256, error)
    except (OSError, MemoryError) as error:
        return Look(sha256, DataError("image-decodes", job.where, f"the file cannot be read ({short(error)})"))
    return Look(sha256, None)


def look_at_all(jobs: Iterable[Job], max_pixels: int, processes: int | None = None) -> Iterator[tuple[Job, Look]]:
    """Every job with what was seen, in order; ``processes`` defaults to the CPUs this one may use."""
    count = processes or _cpus()
    waiting: Iterator[tuple[Job, ...]] = _batched(jobs)
    while True:
        ahead: deque[tuple[tuple[Job, ...], Future[list[Look]]]] = deque()
        with _pool(count) as pool:
            try:
                for chunk in waiting:
                    try:
                        ahead.append((chunk, pool.submit(_looks, chunk, max_pixels)))
                    except BrokenProcessPool:
                        waiting = itertools.chain([chunk], waiting)
                        raise
                    if len(ahead) > 2 * count:
                        yield from _taken(ahead)
                while ahead:
                    yield from _taken(ahead)
                return
            except BrokenProcessPool:
                pass
        lost = [chunk for chunk, _ in ahead]
        for job in (
            lost[0] if lost else ()
        ):  # one of these, or of those that ran beside them: each in a process of its own
            yield job, _alone(job, max_pixels)
        waiting = itertools.chain(lost[1:], waiting)


def _taken(ahead: deque[tuple[tuple[Job, ...], Future[list[Look]]]]) -> Iterator[tuple[Job, Look]]:
    """The results of the oldest chunk, which stays in ``ahead`` until they are there."""
    chunk, future = ahead[0]
    looks = future.result()
    ahead.popleft()
    yield from zip(chunk, looks, strict=True)


def _alone(job: Job, max_pixels: int) -> Look:
    with _pool(1) as pool:
        try:
            return pool.submit(look, job, max_pixels).result()
        except BrokenProcessPool:
            return Look(None, DataError("image-decodes", job.where, "decoding it ended the process"))


def _looks(jobs: Sequence[Job], max_pixels: int) -> list[Look]:
    return [look(job, max_pixels) for job in jobs]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    warnings.simplefilter("ignore")  # Pillow's words on odd metadata, of a picture that decodes


def _batched(jobs: Iterable[Job]) -> Iterator[tuple[Job, ...]]:
    rest = iter(jobs)
    while chunk := tuple(itertools.islice(rest, CHUNK)):
        yield chunk
