"""Files by path or URL: local disk, S3, Google Cloud and other schemes of pyarrow or fsspec. Torch-free.

A URL must not contain credentials, because it is stored in logs, in a run's config.yaml and in the tracking store.
Credentials come from the environment or from the machine's role. A failed read is retried on a new connection with
growing pauses.
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

ATTEMPTS = 6  # per read; the S3 client itself retries for some seconds before an attempt fails
FIRST_PAUSE_S = 0.5  # before the second attempt; doubled before each further one: 15 s in total
URL_PARAMETERS = ("endpoint_override", "scheme", "region")  # the allowed ones: they locate the server
CREDENTIALS = (
    "credentials come from the environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the machine's role"
)
REMEDY = f"check the address, the connection and the read permission; {CREDENTIALS}"

Item = TypeVar("Item")

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class StorageError(OSError):
    """A read that failed in every attempt."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)  # all arguments: the error is pickled

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {REMEDY}"


def is_url(path: str) -> bool:
    """Returns whether ``path`` is a URL and not a local path."""
    return "://" in path


def absolute(path: str) -> str:
    """Returns an absolute local path; a URL is returned unchanged."""
    return path if is_url(path) else os.path.abspath(path)


def check_url(path: str) -> str:
    """Returns the path or URL if it contains no credentials. Raises ValueError with a message that does not repeat
    them."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    address = path.partition("?")[0]
    # a secret key of S3 can contain a slash, and urlsplit then does not recognize it as a password
    if parts.password is not None or (parts.scheme == "s3" and ("@" in address or ":" in parts.netloc)):
        raise ValueError(f"{parts.scheme}://...: expected a URL without credentials, got some; {CREDENTIALS}")
    names = [item.partition("=")[0] for item in parts.query.split("&") if item]
    if unknown := [name for name in names if name not in URL_PARAMETERS]:
        allowed = ", ".join(URL_PARAMETERS)
        raise ValueError(f"{address}: expected only the URL parameters {allowed}, got {unknown[0]!r}; {CREDENTIALS}")
    return path


def join(folder: str, name: str) -> str:
    """Returns the path or URL of the file ``name`` in a folder."""
    if not is_url(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def list_files(folder: str) -> dict[str, int]:
    """Returns the size in bytes of every file in a folder and below, by name relative to the folder.

    Returns an empty dict if the folder does not exist. Raises StorageError if it cannot be read.
    """
    files, base = _locate(folder)
    selector = fs.FileSelector(base, allow_not_found=True, recursive=True)
    found = _retry(folder, lambda: files.get_file_info(selector))
    start = len(base.rstrip("/")) + 1
    return {info.path[start:]: info.size for info in found if info.is_file}


def read_bytes(path: str) -> bytes:
    """Reads a whole file. Raises FileNotFoundError if there is none, StorageError if it cannot be read."""
    with open_file(path) as file:
        return file.read()


def open_file(path: str) -> BinaryIO:
    """Opens a file for random access; reads of a remote file are retried."""
    return _RetryingFile(path) if is_url(path) else open(path, "rb")  # type: ignore[return-value]


@contextmanager
def create(path: str) -> Iterator["HashingWriter"]:
    """Opens a new file for writing. A local file appears under its name when the block ends without an exception.

    An object of S3 also appears as a whole, but even if the block raises: to mark complete output, write a second file
    after it.
    """
    files, place = _locate(path)
    if not isinstance(files, fs.LocalFileSystem):
        with files.open_output_stream(place) as sink:
            yield HashingWriter(sink)
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with partial_file(Path(place)) as partial, partial.open("wb") as sink:
        yield HashingWriter(sink)


def delete(path: str) -> None:
    """Deletes a file. Raises OSError."""
    files, place = _locate(path)
    files.delete_file(place)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Iterator[Result]:
    """Yields ``function(item)`` of every item in order, computed in ``threads`` threads, up to ``ahead`` in advance."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class HashingWriter(io.RawIOBase):
    """A writer that counts and hashes the bytes written."""

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


class _RetryingFile(io.RawIOBase):
    """A remote file whose reads are retried on a new connection."""

    def __init__(self, path: str) -> None:
        self.path, self.position = path, 0
        self.files, self.place = _locate(path)
        self.file = _retry(path, self._open)
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
        data = _retry(self.path, lambda: self._read(wanted)) if wanted else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def readall(self) -> bytes:  # the inherited method reads pieces of 8 KiB
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
                raise OSError(f"expected {wanted} bytes, got {len(data)}")
        except OSError:
            self.file = None
            raise
        return data


def _retry(path: str, action: Callable[[], Result]) -> Result:
    """Returns the result of ``action``, retried up to ``ATTEMPTS`` times with growing pauses.

    Raises FileNotFoundError immediately, and StorageError after the last attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = str(error).strip() or type(error).__name__
            if attempt == ATTEMPTS:
                raise StorageError(
                    path, f"expected a readable file, but reading failed {ATTEMPTS} times, the last time with: {reason}"
                ) from error
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1)
            log.warning("%s: attempt %d of %d failed (%s); retrying in %g s", path, attempt, ATTEMPTS, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _locate(path: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a path or URL, and the path within it. Raises ValueError for an unknown scheme."""
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
            raise ValueError(f"{root}: expected a valid URL, got an error: {error}") from error
    try:
        import fsspec

        remote, base = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{root}: expected a scheme of pyarrow or fsspec, got an error: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(remote)), base.rstrip("/")
