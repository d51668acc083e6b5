"""Checks of COCO files apart from masks: JSON within the memory limit, lists, keys, ids, names, references. Torch-free.

Each check raises DataError for the first broken rule.
"""

import gc
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short_repr

GIB = 1024**3
# Upper bounds, measured with CPython 3.11-3.13: bytes in memory per character of JSON, in addition to the text itself.
PARSED_BYTES = {b"{": 256, b"[": 96, b",": 40, b":": 96, b'"': 32}


def read_json(path: str, limits: Limits = LIMITS) -> tuple[Any, str]:
    """Parses a JSON file and returns (content, SHA-256 of the file).

    Raises DataError, for example if parsing is estimated to take more memory than ``limits.max_json_gib``.
    """
    data = _read_bytes(path, limits)
    _check_memory(parsed_bytes(data), path, limits)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # the decoded text needs as much memory again
        with no_collection():
            return json.loads(text.removeprefix("\ufeff")), sha256
    except (ValueError, RecursionError) as error:
        raise DataError("file-json", path, f"expected JSON, got an error: {str(error)[:200]}") from error
    except MemoryError as error:
        raise DataError("file-size", path, "expected a file that can be parsed in memory, got a MemoryError") from error


def parsed_bytes(data: bytes) -> int:
    """Estimates the most memory that JSON takes while it is parsed: bytes, text and objects."""
    text = (2 if data.isascii() else 5) * len(data)  # a str with one character beyond 16 bits takes 4 bytes for each
    return text + sum(data.count(mark) * size for mark, size in PARSED_BYTES.items())


def read_tree(path: str, limits: Limits = LIMITS) -> tuple[dict[str, Any], str]:
    """Parses a COCO file and returns (JSON object, SHA-256 of the file). Raises DataError."""
    tree, sha256 = read_json(path, limits)
    if not isinstance(tree, dict):
        hint = " (a results file?)" if isinstance(tree, list) else ""
        raise DataError("file-json", path, f"expected a JSON object, got a {type(tree).__name__}{hint}")
    return tree, sha256


def check_list(tree: Mapping[str, Any], key: str, path: str) -> list[Any]:
    """Returns the list ``tree[key]``."""
    if key not in tree:
        raise DataError("key-missing", path, f"expected the key {key!r}, got {_keys(tree)}")
    if not isinstance(tree[key], list):
        raise DataError("key-type", path, f"expected a list as {key!r}, got a {type(tree[key]).__name__}")
    return tree[key]


def check_value(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns the value of a required key."""
    if key not in entry:
        raise DataError("key-missing", where, f"expected the key {key!r}, got {_keys(entry)}")
    return entry[key]


def check_text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """Returns the value of a required key, a string that is not empty."""
    value = check_value(entry, key, where)
    if not isinstance(value, str) or not value:
        raise DataError("key-type", where, f"expected a non-empty string as {key!r}, got {short_repr(value)}")
    return value


def check_id(entry: object, kind: str, path: str, seen: Collection[int]) -> int:
    """Returns the id of an entry, a 64-bit integer that is not in ``seen``; 0 is valid."""
    if not isinstance(entry, dict):
        raise DataError("key-type", f"{path}: {kind}", f"expected an object, got a {type(entry).__name__}")
    if "id" not in entry:
        check_value(entry, "id", f"{path}: {kind} {short_repr(entry)}")
    value = entry["id"]
    if type(value) is not int or not -(2**63) <= value < 2**63:
        where = f"{path}: {kind} {short_repr(value)}"
        raise DataError("id-type", where, f"expected a 64-bit integer, got {short_repr(value)}")
    if value in seen:
        raise DataError("id-duplicate", f"{path}: {kind} {value}", "expected a unique id, got one that occurs twice")
    return value


def check_reference(entry: Mapping[str, Any], kind: str, known: Collection[int], where: str) -> int:
    """Returns the id of the image or category (``kind``) that an annotation refers to, one of ``known``."""
    value = check_value(entry, f"{kind}_id", where)
    if type(value) is not int or value not in known:
        ids = ""
        if kind == "category":
            ids = f" ({', '.join(map(str, sorted(known)[:20]))}{', ...' if len(known) > 20 else ''})"
        message = f"expected the id of a listed {kind}{ids}, got {short_repr(value)}"
        raise DataError("id-unknown", where, message)
    return value


def check_some_images(listed: Collection[object], path: str) -> None:
    """Requires at least one image."""
    if not listed:
        raise DataError("key-type", path, "expected at least one image, got none")


def check_some_categories(names: Collection[object], path: str) -> None:
    """Requires at least one category."""
    if not names:
        raise DataError("key-type", path, "expected at least one category, got none")


def check_category_names(names: Mapping[int, str], used: Iterable[int], path: str) -> None:
    """Requires different names for all categories in ``used``, those with annotations. ``names``: id -> name."""
    owner: dict[str, int] = {}
    for key in sorted(used):
        other = owner.setdefault(names[key], key)
        if other != key:
            message = f"has the same name as category {other}, {short_repr(names[key])}, and both have annotations"
            raise DataError("category-name", f"{path}: category {key}", message)


def check_same_categories(one: Mapping[int, str], path: str, other: Mapping[int, str], other_path: str) -> None:
    """Requires the same categories (id -> name) in two files of one data set."""
    if one != other:
        raise DataError("categories", path, f"expected the categories of {other_path}, got others")


def check_name(name: str, where: str) -> str:
    """Returns a file name that is relative and has no parent directory (..) that leads out of its folder."""
    outside = os.path.isabs(name) or "://" in name or os.path.normpath(name).split(os.sep)[0] == os.pardir
    if "\0" in name or outside:
        raise DataError(
            "image-path", where, f"expected a file name relative to the image folder, got {short_repr(name)}"
        )
    return name


def find_image(folder: str, name: str, where: str) -> str:
    """Returns the path of an existing file, which must lie inside ``folder`` also after resolving links.

    The path returned is not resolved: other machines may mount the folder at another place.
    """
    path = os.path.join(folder, check_name(name, where))
    try:
        if os.path.basename(name) != name or os.path.islink(path):  # a plain name of no link cannot lead outside
            root = os.path.realpath(folder)
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                message = f"expected a file inside {folder}, got {short_repr(name)}, which lies outside"
                raise DataError("image-path", where, message)
        found = os.path.isfile(path)
    except UnicodeError:  # half a character of UTF-16: no file has such a name
        found = False
    if not found:
        raise DataError("image-missing", where, f"expected the file {short_repr(name)} in {folder}, got no such file")
    return path


def check_folder(folder: str | None, path: str) -> str:
    """Returns the absolute path of ``folder``, which holds the images of the file ``path``."""
    if folder is None:
        raise DataError(
            "file-missing",
            path,
            "expected the folder of its images, got none",
            "set data.unlabeled_images or data.images",
        )
    if not os.path.isdir(folder):
        raise DataError("file-missing", folder, f"expected the folder of the images of {path}, got no folder")
    return os.path.abspath(folder)  # other processes may have another working directory


def _read_bytes(path: str, limits: Limits) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
            raise DataError(
                "file-read", path, "expected a COCO annotation file, got something that is not a regular file"
            )
        _check_memory(2 * status.st_size, path, limits)
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise DataError("file-missing", path, f"expected a COCO annotation file, got {error.strerror}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("file-read", path, f"expected a COCO annotation file, got {error}") from error
    except MemoryError as error:
        raise DataError("file-size", path, "expected a file that can be parsed in memory, got a MemoryError") from error


def _check_memory(size: int, path: str, limits: Limits) -> None:
    if size > limits.max_json_gib * GIB:
        message = f"expected at most max_json_gib = {limits.max_json_gib:g} GiB once parsed, got {size / GIB:.3g} GiB"
        raise DataError("file-size", path, message)


def _keys(entry: Mapping[str, Any]) -> str:
    return short_repr(list(entry)) if entry else "none"


@contextmanager
def no_collection() -> Iterator[None]:
    """Disables the cyclic garbage collector, which would scan a large tree many times: parsing takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
