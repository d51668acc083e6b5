"""Read encoded images from a file, a URL, or a row of a shard. Torch-free."""

import os
import re
import threading
from collections import OrderedDict
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pais_ray.data import reading
from pais_ray.data.validation.rules import DataError
from pais_ray.files import storage

# Columns of a shard.
PIXELS = {"image_id": pa.int64(), "bytes": pa.large_binary()}
LABELS = {"boxes": pa.list_(pa.float32()), "labels": pa.list_(pa.int64()), "rles": pa.list_(pa.binary())}


class ShardLocation(NamedTuple):
    """The row of a shard that has the bytes of an image. Written as a path: FILE#GROUP/ROW/NAME."""

    file: str  # path or URL
    group: int  # row group of the file
    row: int  # row within the group
    name: str  # name of the image, for messages

    def __str__(self) -> str:
        return f"{self.file}#{self.group}/{self.row}/{self.name}"


_LOCATION = re.compile(r"(.*\.parquet(?:\?[^#]*)?)#(\d+)/(\d+)/(.*)", re.DOTALL)


def parse_shard_location(path: str) -> ShardLocation | None:
    """The location in a shard that the path of a record denotes, or None if it denotes a file."""
    found = _LOCATION.fullmatch(path)
    return ShardLocation(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def image_name(path: str) -> str:
    """The name of an image, without its folder, URL query or shard."""
    if location := parse_shard_location(path):
        return location.name
    return os.path.basename(unquote(urlsplit(path).path) if storage.is_url(path) else path)


class Reader:
    """Reads the encoded images of records. Safe to use from several threads.

    The last ``keep`` row groups of shards stay in memory, so that reading in order fetches each group once. With
    ``labels``, rows of shards include their instances; otherwise those columns are not read.
    """

    def __init__(self, *, labels: bool = False, keep: int = 2) -> None:
        self._columns = [*PIXELS, *(LABELS if labels else ())]
        self._keep = keep
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()

    def read(self, path: str, image_id: int) -> dict[str, Any]:
        """``bytes`` of the image, and its ``boxes``, ``labels`` and ``rles`` if they are requested and in a shard.

        Raises DataError if the image is missing or damaged, OSError (StorageError for a URL) if it cannot be read.
        """
        location = parse_shard_location(path)
        if location is None:
            return {"bytes": reading.read_bytes(path)}
        with self._lock:
            table = self._get_group(location)
        rows: list[dict[str, Any]] = table.slice(location.row, 1).to_pylist()
        if not rows or rows[0].pop("image_id") != image_id:
            message = f"expected image {image_id} at row {location.row}; have the shards been rewritten?"
            raise _damaged(location, message)
        return rows[0]

    def _get_group(self, location: ShardLocation) -> pa.Table:
        key = (location.file, location.group)
        if key not in self._groups:
            self._groups[key] = self._fetch(location)
            if len(self._groups) > self._keep:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _fetch(self, location: ShardLocation) -> pa.Table:
        with reading.open_file(location.file) as file:
            try:
                parquet = pq.ParquetFile(
                    pa.PythonFile(file, mode="r"),
                    metadata=self._footers.get(location.file),
                    pre_buffer=True,
                    page_checksum_verification=True,
                )
                self._footers[location.file] = parquet.metadata
                table = parquet.read_row_group(location.group, columns=self._columns, use_threads=False)
            except (storage.StorageError, DataError):
                raise
            except Exception as error:  # for broken files, pyarrow raises various exceptions
                message = f"cannot be read ({type(error).__name__}: {str(error)[:200]})"
                raise _damaged(location, message) from error
        if missing := set(self._columns) - set(table.column_names):
            raise _damaged(location, f"has no column {min(missing)}")
        return table


def _damaged(location: ShardLocation, message: str) -> DataError:
    return DataError("shard-damaged", f"{location.file}: row group {location.group}", message)
