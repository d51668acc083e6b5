"""Lists the images of plain folders and URL prefixes, and reads image sizes from headers. Torch-free."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pais_ray.data import reading
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.images import upright_size
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage

HEADER = 64 * 1024  # bytes per read of a remote image: the size is stored near the start
THREADS = 16  # remote images read at the same time
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def read_folder(folder: str, limits: Limits = LIMITS) -> tuple[Record, ...]:
    """Returns every image under ``folder``, ordered by relative path; the image id is the position in this order.

    Hidden files and folders are skipped. Sizes are read from the headers. Raises DataError, also for broken images.
    """
    records = []
    for position, path in enumerate(list_folder(folder)):
        height, width = upright_size(path, max_pixels=limits.max_pixels)
        records.append(Record(image_id=position, path=path, height=height, width=width))
    return tuple(records)


def list_folder(folder: str) -> list[str]:
    """Returns the paths of all image files under ``folder``, ordered by relative path. Raises DataError."""
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
        if not os.path.isfile(path):  # opening a pipe could block forever
            message = "expected an image file, got a pipe, a device or a broken link"
            raise DataError("image-missing", path, message, "remove it, or replace it with the image")
    return paths


def list_prefix(url: str) -> tuple[Record, ...]:
    """Returns every image under a URL prefix, in the order of ``list_folder``. Headers are not read: sizes are 0.

    Raises DataError.
    """
    paths = (storage.join(url, name) for name in list_prefix_names(url))
    return tuple(Record(image_id=i, path=path, height=0, width=0) for i, path in enumerate(paths))


def list_prefix_names(url: str) -> list[str]:
    """Returns the names of all image files under a URL prefix, in the order of ``list_folder``. Raises DataError."""
    try:
        files = storage.list_files(url)
    except storage.StorageError as error:
        raise DataError("file-read", url, error.reason, storage.REMEDY) from error
    shown = [name.split("/") for name in files if name.lower().endswith(SUFFIXES)]
    names = ["/".join(parts) for parts in sorted(shown) if not any(part.startswith(".") for part in parts)]
    if not names:
        raise DataError("image-missing", url, f"expected images ({' '.join(SUFFIXES)}), got none")
    return names


def read_sizes(records: Sequence[Record], limits: Limits = LIMITS) -> Iterator[tuple[int, int] | DataError]:
    """Yields the upright (height, width) of each image, px, or the error in its header, in order.

    Unless every record has its size, the headers are read, with one or two requests per image.
    """
    if all(record.height for record in records):
        return ((record.height, record.width) for record in records)

    def read_size(record: Record) -> tuple[int, int] | DataError:
        try:
            with reading.open_file(record.path) as opened, io.BufferedReader(opened, HEADER) as file:  # type: ignore[type-var]
                return upright_size(file, record.path, limits.max_pixels)
        except storage.StorageError as error:
            return DataError("file-read", record.path, error.reason, storage.REMEDY)
        except DataError as error:
            return error

    return storage.map_in_order(read_size, records, THREADS, 8 * THREADS)


def with_sizes(records: Sequence[Record], limits: Limits = LIMITS) -> tuple[Record, ...]:
    """Returns the records with their sizes, see ``read_sizes``. Raises DataError."""
    found = []
    for record, size in zip(records, read_sizes(records, limits), strict=True):
        if isinstance(size, DataError):
            raise size
        found.append(replace(record, height=size[0], width=size[1]))
    return tuple(found)
