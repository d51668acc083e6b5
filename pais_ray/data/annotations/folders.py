"""TODO docstring."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pais_ray.data import reading
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.images import upright_size
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage

HEADER = 64 * 1024  # bytes of a remote image read at a time: sizes stand near the start

THREADS = 16  # remote images looked at together

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def read_folder(folder: str, limits: Limits = LIMITS) -> tuple[Record, ...]:
    """Every image under ``folder``, by relative path; the image id is the position in this order.

    Hidden files and folders are skipped. Sizes come from the headers; broken files raise DataError.
    """
    records = []
    for position, path in enumerate(list_folder(folder)):
        height, width = upright_size(path, max_pixels=limits.max_pixels)
        records.append(Record(image_id=position, path=path, height=height, width=width))
    return tuple(records)


def list_folder(folder: str) -> list[str]:
    """The paths of all image files under ``folder``, in the order of their relative paths."""
    if not os.path.isdir(folder):
        raise DataError("file-missing", folder, "expected a folder of images, got no folder")
    folder = os.path.abspath(folder)
    names: list[str] = []
    for base, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        names.extend(os.path.relpath(os.path.join(base, name), folder) for name in shown)
    if not names:
        raise DataError("image-missing", folder, f"expected images ({' '.join(SUFFIXES)}), got none")
    names.sort(key=lambda name: name.split(os.sep))
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.isfile(path):  # opening a pipe may wait for ever
            message = "expected an image file, got a pipe, a device or a link that leads nowhere"
            raise DataError("image-missing", path, message, "remove it, or put the image there")
    return paths


def list_prefix(url: str) -> tuple[Record, ...]:
    """Every image under the prefix of an object store, in the order of ``list_folder``. Headers are not read: sizes
    are unknown."""
    try:
        files = storage.list_files(url)
    except storage.StorageError as error:
        raise DataError("file-read", url, error.reason, storage.REMEDY) from error
    shown = [name.split("/") for name in files if name.lower().endswith(SUFFIXES)]
    names = ["/".join(parts) for parts in sorted(shown) if not any(part.startswith(".") for part in parts)]
    if not names:
        raise DataError("image-missing", url, f"expected images ({' '.join(SUFFIXES)}), got none")
    paths = (storage.join(url, name) for name in names)
    return tuple(Record(image_id=i, path=path, height=0, width=0) for i, path in enumerate(paths))


def look_up(records: Sequence[Record], limits: Limits = LIMITS) -> Iterator[tuple[int, int] | DataError]:
    """The upright (height, width) of each image, or what is wrong with it, in order: where nobody has looked yet, by
    its header, at a request or two each."""
    if all(record.height for record in records):
        return ((record.height, record.width) for record in records)

    def look(record: Record) -> tuple[int, int] | DataError:
        try:
            with reading.open_file(record.path) as opened, io.BufferedReader(opened, HEADER) as file:  # type: ignore[type-var]
                return upright_size(file, record.path, limits.max_pixels)
        except storage.StorageError as error:
            return DataError("file-read", record.path, error.reason, storage.REMEDY)
        except DataError as error:
            return error

    return storage.in_order(look, records, THREADS, 8 * THREADS)


def sized(records: Sequence[Record], limits: Limits = LIMITS) -> tuple[Record, ...]:
    """The images with their sizes, see ``look_up``. Raises DataError."""
    found = []
    for record, size in zip(records, look_up(records, limits), strict=True):
        if isinstance(size, DataError):
            raise size
        found.append(replace(record, height=size[0], width=size[1]))
    return tuple(found)
