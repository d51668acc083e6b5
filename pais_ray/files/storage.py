"""Files by path or URL: local disk, S3, Google Cloud and whatever else pyarrow or fsspec know. Torch-free.

A URL says where, never who: it ends up in logs, in a run's config.yaml and in the tracking store. Keys come from the
environment or from the machine's role. A read that fails is repeated, opened anew, with growing pauses.
"""

import hashlib
import io
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from pais_ray.files.atomic import partial_file

ATTEMPTS = 6  # of one read; S3's client has tried for some seconds before each of them counts as failed

FIRST_PAUSE_S = 0.5  # before the second attempt, twice as long before each further one: 15 s in all

QUERY = ("endpoint_override", "scheme", "region")  # of a URL: where the server is, nothing secret

KEYS = "keys come from the environment (of S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or from the machine's role"

REMEDY = f"look at the address, the connection and the rights to read; {KEYS}"

Item = TypeVar("Item")

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class StorageError(OSError):
    """A read that failed however often it was repeated."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)  # the arguments, so that it pickles

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {REMEDY}"


def is_url(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """The same place seen from any folder."""
    return path if is_url(path) else os.path.abspath(path)


def check_url(path: str) -> str:
    """The path or URL given, if it holds no secret. Raises ValueError, which does not repeat what it found."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    where = path.partition("?")[0]
    # the secret half of S3's keys may hold a slash, and then it is no part of what counts as a password
    if parts.password is not None or (parts.scheme == "s3" and ("@" in where or ":" in parts.netloc)):
        raise ValueError(f"{parts.scheme}://...: expected a URL without keys, which end up in logs; {KEYS}")
    names = [item.partition("=")[0] for item in parts.query.split("&") if item]
    if unknown := [name for name in names if name not in QUERY]:
        raise ValueError(f"{where}: expected no parameters but {', '.join(QUERY)}, got {unknown[0]!r}; {KEYS}")
    return path


def join(folder: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    if not is_url(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def list_files(folder: str) -> dict[str, int]:
    """Name within the folder -> bytes, of all files in it and below; none where it does not exist."""
    files, base = _locate(folder)
    selector = fs.FileSelector(base, allow_not_found=True, recursive=True)
    found = _repeated(folder, lambda: files.get_file_info(selector))
    start = len(base.rstrip("/")) + 1
    return {info.path[start:]: info.size for info in found if info.is_file}


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError if there is none, StorageError if it cannot be read."""
    with open_file(path) as file:
        return file.read()


def open_file(path: str) -> BinaryIO:
    """The file, to read from anywhere in it; a local one without further ado."""
    return _Repeating(path) if is_url(path) else open(path, "rb")  # type: ignore[return-value]


@contextmanager
def create(path: str) -> Iterator["Hashing"]:
    """A new file to write to. A local one appears under its name when it is whole; an object of S3 does by nature,
    but also where writing ends in an exception: whoever must know writes a second file behind it."""
    files, place = _locate(path)
    if not isinstance(files, fs.LocalFileSystem):
        with files.open_output_stream(place) as sink:
            yield Hashing(sink)
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with partial_file(Path(place)) as partial, partial.open("wb") as sink:
        yield Hashing(sink)


def delete(path: str) -> None:
    files, place = _locate(path)
    files.delete_file(place)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Iterator[Result]:
    """``function`` of every item, in their order, up to ``ahead`` of them computed before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Hashing(io.RawIOBase):
    """What is written, counted and hashed on its way."""

    def __init__(self, sink: Any) -> None:
        self.sink, self.size, self.sha256 = sink, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sink.write(view)
        self.sha256.update(view)
        self.size += len(view)
        return len(view)


class _Repeating(io.RawIOBase):
    """A remote file of which each read is repeated, on a new connection, until it succeeds."""

    def __init__(self, path: str) -> None:
        self.path, self.position = path, 0
        self.files, self.place = _locate(path)
        self.file = _repeated(path, self._open)
        self.length: int = self.file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.position))
        data = _repeated(self.path, lambda: self._read(wanted)) if wanted else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def readall(self) -> bytes:  # else it would come in pieces of 8 KiB
        return self.read(self.length - self.position) or b""

    def close(self) -> None:
        if not self.closed and self.file is not None:
            self.file.close()
        super().close()

    def _open(self) -> Any:
        return self.files.open_input_file(self.place)

    def _read(self, wanted: int) -> bytes:
        if self.file is None:
            self.file = self._open()
        try:
            data: bytes = self.file.read_at(wanted, self.position)
            if len(data) != wanted:
                raise OSError(f"{len(data)} of {wanted} bytes came")
        except OSError:
            self.file = None
            raise
        return data


def _repeated(path: str, action: Callable[[], Result]) -> Result:
    """What ``action`` returns, tried ``ATTEMPTS`` times with growing pauses; what is not there is not waited for."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = str(error).strip() or type(error).__name__
            if attempt == ATTEMPTS:
                raise StorageError(path, f"reading failed {ATTEMPTS} times, lastly with: {reason}") from error
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1)
            log.warning("%s: attempt %d of %d failed (%s); again in %g s", path, attempt, ATTEMPTS, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _locate(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URL, and the path within it."""
    if not is_url(path):
        return fs.LocalFileSystem(), os.path.abspath(path)
    parts = urlsplit(check_url(path))
    if parts.scheme == "file":
        return fs.LocalFileSystem(), unquote(parts.path)
    files, base = _file_system(urlunsplit((parts.scheme, parts.netloc, "", parts.query, "")))
    return files, base + unquote(parts.path)


@lru_cache(maxsize=32)
def _file_system(root: str) -> tuple[fs.FileSystem, str]:
    try:
        files, base = fs.FileSystem.from_uri(root)
        return files, base.rstrip("/")
    except (pa.ArrowInvalid, ImportError) as error:
        if "Unrecognized filesystem type" not in str(error):
            raise ValueError(f"{root}: {error}") from error
    try:
        import fsspec

        remote, base = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{root}: expected a scheme that pyarrow or fsspec know: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(remote)), base.rstrip("/")
