"""TODO docstring."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PARTIAL = ".partial"  # ends the name of a file that is being written


def replace_text(path: Path, text: str) -> None:
    """Writes a local file whole or not at all. Raises OSError, with the path also where the system names none, as on a
    full disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a local file completely or not at all, and creates its directory. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def create_text(path: str) -> Iterator[TextIO]:
    """A local text file, which takes the place of ``path`` when it is whole. It is written under a name that nothing
    has; a link is followed, and what is there and no plain file, such as /dev/stdout, is written to directly."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    place = os.path.realpath(path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    aside = os.path.join(os.path.dirname(place), f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        with open(aside, "x", encoding="utf-8") as file:
            yield file
        os.replace(aside, place)
    finally:
        if os.path.exists(aside):
            os.remove(aside)
