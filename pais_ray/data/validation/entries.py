"""The COCO file around its masks: JSON within memory, lists, keys, ids, names, references. Torch-free.

Like `validate`, each check raises the first rule that is broken.
"""

import gc
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short

GIB = 1024**3
# Bytes that CPython 3.11-3.13 takes, measured from above, for what these characters stand for, beside the text itself.
PARSED_BYTES = {b"{": 256, b"[": 96, b",": 40, b":": 96, b'"': 32}


def read_json(path: str, limits: Limits = LIMITS) -> tuple[Any, str]:
    """(what the file holds, its SHA-256), within ``limits.max_json_gib`` of memory, estimated before parsing."""
    data = _read_bytes(path, limits)
    _check_memory(parsed_bytes(data), path, limits)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # the text alone is as large again
        with no_collection():
            return json.loads(text.removeprefix("\ufeff")), sha256
    except (ValueError, RecursionError) as error:
        raise DataError("file-json", path, f"expected JSON, got {str(error)[:200]}") from error
    except MemoryError as error:
        raise DataError("file-size", path, "does not fit into the memory of this machine") from error


def parsed_bytes(data: bytes) -> int:
    """What JSON takes in memory at most while it is parsed: bytes, text and objects."""
    text = (2 if data.isascii() else 5) * len(data)  # one character beyond 16 bits makes all of them 32 bits wide
    return text + sum(data.count(mark) * size for mark, size in PARSED_BYTES.items())


def read_tree(path: str, limits: Limits = LIMITS) -> tuple[dict[str, Any], str]:
    """(COCO object, SHA-256 of the file)."""
    tree, sha256 = read_json(path, limits)
    if not isinstance(tree, dict):
        hint = " (a results file?)" if isinstance(tree, list) else ""
        raise DataError("file-json", path, f"expected a JSON object, got a {type(tree).__name__}{hint}")
    return tree, sha256


def check_list(tree: Mapping[str, Any], key: str, path: str) -> list[Any]:
    """The list called ``key``."""
    if key not in tree:
        raise DataError("key-missing", path, f"expected the key {key!r}, got {_keys(tree)}")
    if not isinstance(tree[key], list):
        raise DataError("key-type", path, f"expected {key!r} to be a list, got a {type(tree[key]).__name__}")
    return tree[key]


def check_value(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key that must be there."""
    if key not in entry:
        raise DataError("key-missing", where, f"expected the key {key!r}, got {_keys(entry)}")
    return entry[key]


def check_text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """A text that is not empty."""
    value = check_value(entry, key, where)
    if not isinstance(value, str) or not value:
        raise DataError("key-type", where, f"expected {key!r} to be a text, got {short(value)}")
    return value


def check_id(entry: object, kind: str, path: str, seen: Collection[int]) -> int:
    """The id of an entry, which must not be in ``seen``; 0 is an id like any other."""
    if not isinstance(entry, dict):
        raise DataError("key-type", f"{path}: {kind}", f"expected an object, got a {type(entry).__name__}")
    if "id" not in entry:
        check_value(entry, "id", f"{path}: {kind} {short(entry)}")
    value = entry["id"]
    if type(value) is not int or not -(2**63) <= value < 2**63:
        where = f"{path}: {kind} {short(value)}"
        raise DataError("id-type", where, f"expected a whole number of 64 bits, got a {type(value).__name__}")
    if value in seen:
        raise DataError("id-duplicate", f"{path}: {kind} {value}", "this id occurs twice")
    return value


def check_reference(entry: Mapping[str, Any], kind: str, known: Collection[int], where: str) -> int:
    """The id of the image or category (``kind``) that an annotation refers to."""
    value = check_value(entry, f"{kind}_id", where)
    if type(value) is not int or value not in known:
        message = f"there is no {kind} {short(value)}"
        if kind == "category":
            message += f", only {', '.join(map(str, sorted(known)[:20]))}" + (" ..." if len(known) > 20 else "")
        raise DataError("id-unknown", where, message)
    return value


def check_some_images(listed: Collection[object], path: str) -> None:
    """There is something to learn from, or to evaluate on."""
    if not listed:
        raise DataError("key-type", path, "expected at least one image, got none")


def check_some_categories(names: Collection[object], path: str) -> None:
    """There is something to tell apart."""
    if not names:
        raise DataError("key-type", path, "expected at least one category, got none")


def check_category_names(names: Mapping[int, str], used: Iterable[int], path: str) -> None:
    """Two categories that both have annotations need different names; ``names`` is id -> name."""
    owner: dict[str, int] = {}
    for key in sorted(used):
        other = owner.setdefault(names[key], key)
        if other != key:
            message = f"is called {short(names[key])} like category {other}, and both have annotations"
            raise DataError("category-name", f"{path}: category {key}", message)


def check_same_categories(one: Mapping[int, str], path: str, other: Mapping[int, str], other_path: str) -> None:
    """Two files of one data set, their categories as id -> name."""
    if one != other:
        raise DataError("categories", path, f"has other categories than {other_path}")


def check_name(name: str, where: str) -> str:
    """A file name that does not lead out of its folder by what it says."""
    outside = os.path.isabs(name) or "://" in name or os.path.normpath(name).split(os.sep)[0] == os.pardir
    if "\0" in name or outside:
        raise DataError("image-path", where, f"expected a file name relative to the images' folder, got {short(name)}")
    return name


def find_image(folder: str, name: str, where: str) -> str:
    """The path of an existing file that lies inside ``folder``, links followed; not itself resolved, because
    another machine may mount the folder elsewhere."""
    path = os.path.join(folder, check_name(name, where))
    try:
        if os.path.basename(name) != name or os.path.islink(path):  # else it cannot lead elsewhere
            root = os.path.realpath(folder)
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                message = f"expected a file inside {folder}, got {short(name)}, which is not"
                raise DataError("image-path", where, message)
        found = os.path.isfile(path)
    except UnicodeError:  # half a character of UTF-16, which no file name holds
        found = False
    if not found:
        raise DataError("image-missing", where, f"there is no file {short(name)} in {folder}")
    return path


def check_folder(folder: str | None, path: str) -> str:
    """The absolute path of the folder of the images of the file ``path``."""
    if folder is None:
        raise DataError("file-missing", path, "its images need a folder", "give data.unlabeled_images or data.images")
    if not os.path.isdir(folder):
        raise DataError("file-missing", folder, f"expected the folder of the images of {path}, got no folder")
    return os.path.abspath(folder)  # a task of another process may run in another folder


def _read_bytes(path: str, limits: Limits) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end
            raise DataError("file-read", path, "expected a COCO annotation file, got no plain file")
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
        raise DataError("file-size", path, "does not fit into the memory of this machine") from error


def _check_memory(size: int, path: str, limits: Limits) -> None:
    if size > limits.max_json_gib * GIB:
        message = f"takes {size / GIB:.3g} GiB once parsed, more than max_json_gib = {limits.max_json_gib:g}"
        raise DataError("file-size", path, message)


def _keys(entry: Mapping[str, Any]) -> str:
    return short(list(entry)) if entry else "none"


@contextmanager
def no_collection() -> Iterator[None]:
    """The cyclic garbage collector would walk a large tree again and again: without, parsing takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
