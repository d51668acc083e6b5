"""Atomic writes of local files: a reader sees the old content or the new content, never a part of it.

The new content is written to a hidden file in the same directory, which then replaces the destination. If the process
is killed in between, that file stays behind; its name ends in ``PARTIAL``.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PARTIAL = ".partial"  # suffix of a file that is being written


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yields an unused path beside ``path`` to write to; on success the file written there replaces ``path``.

    If the block raises, the partial file is removed and ``path`` is left unchanged. The directory must exist.
    """
    # The name of ``path`` is not part of it: together they could exceed the length limit of file names.
    partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Atomically writes a UTF-8 text file. Raises OSError, which always names ``path``: on a full disk the operating
    system reports no file name."""
    try:
        with partial_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_bytes(path: Path, data: bytes) -> None:
    """Atomically writes a binary file and creates its directory if needed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def create_text(path: str) -> Iterator[TextIO]:
    """Opens a UTF-8 text file for writing; it replaces ``path`` when the block ends without an exception.

    Creates the directory if needed and follows symbolic links. An existing path that is not a regular file, such as
    /dev/stdout, is written to directly.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(target) as partial, partial.open("x", encoding="utf-8") as file:
        yield file
