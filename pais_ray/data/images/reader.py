"""Encoded images, wherever records say that they lie: a file, a URL, or a row of a shard. Torch-free."""

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

# The columns of a shard that a reader asks for.
PIXELS = {"image_id": pa.int64(), "bytes": pa.large_binary()}
LABELS = {"boxes": pa.list_(pa.float32()), "labels": pa.list_(pa.int64()), "rles": pa.list_(pa.binary())}


class Place(NamedTuple):
    """A row of a shard, where the bytes of an image lie. As a path: FILE#GROUP/ROW/NAME."""

    file: str  # path or URL
    group: int  # row group of the file
    row: int  # within the group
    name: str  # of the image, for people

    def __str__(self) -> str:
        return f"{self.file}#{self.group}/{self.row}/{self.name}"


_PLACE = re.compile(r"(.*\.parquet(?:\?[^#]*)?)#(\d+)/(\d+)/(.*)", re.DOTALL)


def place_of(path: str) -> Place | None:
    """The place in a shard that a record's path names, if it names one."""
    found = _PLACE.fullmatch(path)
    return Place(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def name_of(path: str) -> str:
    """The name of an image, without the folder, the query or the shard that it lies in."""
    if place := place_of(path):
        return place.name
    return os.path.basename(unquote(urlsplit(path).path) if storage.is_url(path) else path)


class Reader:
    """Encoded images of records, wherever they lie, read one after the other. Of shards it keeps the last ``keep``
    row groups, so that walking along them fetches each once. Serves several threads.

    With ``labels`` each row of a shard comes with its instances; without, their columns are not read.
    """

    def __init__(self, *, labels: bool = False, keep: int = 2) -> None:
        self._columns = [*PIXELS, *(LABELS if labels else ())]
        self._keep = keep
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()

    def read(self, path: str, image_id: int) -> dict[str, Any]:
        """``bytes`` of the image, and its ``boxes``, ``labels`` and ``rles`` if asked for and there.

        Raises DataError where the image is missing or damaged, StorageError where it cannot be reached."""
        place = place_of(path)
        if place is None:
            return {"bytes": reading.read_bytes(path)}
        with self._lock:
            table = self._group(place)
        rows: list[dict[str, Any]] = table.slice(place.row, 1).to_pylist()
        if not rows or rows[0].pop("image_id") != image_id:
            raise _damaged(place, f"does not hold image {image_id} at row {place.row}; were the shards written anew?")
        return rows[0]

    def _group(self, place: Place) -> pa.Table:
        key = (place.file, place.group)
        if key not in self._groups:
            self._groups[key] = self._fetch(place)
            if len(self._groups) > self._keep:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _fetch(self, place: Place) -> pa.Table:
        with reading.open_file(place.file) as file:
            try:
                parquet = pq.ParquetFile(
                    pa.PythonFile(file, mode="r"),
                    metadata=self._footers.get(place.file),
                    pre_buffer=True,
                    page_checksum_verification=True,
                )
                self._footers[place.file] = parquet.metadata
                table = parquet.read_row_group(place.group, columns=self._columns, use_threads=False)
            except (storage.StorageError, DataError):
                raise
            except Exception as error:  # on broken files the reader raises whatever it meets
                raise _damaged(place, f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
        if missing := set(self._columns) - set(table.column_names):
            raise _damaged(place, f"has no column {min(missing)}")
        return table


def _damaged(place: Place, message: str) -> DataError:
    return DataError("shard-damaged", f"{place.file}: row group {place.group}", message)
