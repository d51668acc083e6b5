"""Opens and reads files of a data set; a missing file raises DataError."""

from typing import BinaryIO

from pais_ray.data.validation.rules import DataError
from pais_ray.files import storage


def open_file(path: str) -> BinaryIO:
    """Opens a local path or URL for random access. Raises DataError if there is no such file."""
    try:
        return storage.open_file(path)
    except FileNotFoundError as error:
        raise _missing(path) from error


def read_bytes(path: str) -> bytes:
    """Reads a whole file. Raises DataError if there is no such file, StorageError if it cannot be read."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise _missing(path) from error


def _missing(path: str) -> DataError:
    return DataError(
        "image-missing", path, "expected a file, got no such file", "restore it, or remove it from the data set"
    )
