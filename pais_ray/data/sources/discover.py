"""Detects the data set in a folder: the `data:` settings that its layout implies, with explanations. Torch-free.

Detection uses file names and searches for keys in JSON files. It parses no complete file and opens no image.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pais_ray.data.annotations import cityscapes
from pais_ray.data.annotations.folders import SUFFIXES, list_folder
from pais_ray.data.shards import dataset
from pais_ray.data.validation.rules import DataError
from pais_ray.files import storage

HOLDOUT = 0.2  # fraction of the labeled images that is held out if no JSON file is for validation
ROBOFLOW = "_annotations.coco.json"  # the annotation file in the folder of each part
UNLABELED_CITYSCAPES = "leftImg8bit/train_extra"  # in the release: images without fine annotations
MAX_FILES = 64  # JSON files that are searched, the largest ones: other formats have one file per image
NUM_PROBES = 8  # file names that decide whether a folder holds the images of a JSON file

PARTS = {  # words in file names; the first match counts: `instances_train2017-unlabeled.json` is unlabeled
    "unlabeled": ("unlabeled", "unlabelled"),  # either spelling
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True, kw_only=True)
class Found:
    """The detected data set."""

    settings: dict[str, Any]  # of the section `data:`; None if the layout has no value for a setting
    lines: list[str]  # explanations for the user


@dataclass(frozen=True, kw_only=True)
class JsonFile:
    """The properties of a JSON file that detection uses."""

    path: str
    kind: Literal["labels", "images", "results", "other"]
    part: str | None  # of PARTS, by the name of the file or its folder
    names: tuple[str, ...] = ()  # of its images, relative to the image folder
    is_truncated: bool = False  # whether it is empty, unreadable or truncated: reading will raise an error

    @property
    def has_instances_name(self) -> bool:
        """Whether it is named like COCO's files with masks of objects, for example not of stuff."""
        return "instances" in _words_of(self.path)


def detect(source: str, given: Mapping[str, Any]) -> Found:
    """Detects the data set in ``source``: a folder, a COCO file, or the folder or URL of shards.

    ``given`` are the `data:` settings of the user. Raises DataError if no layout or more than one is recognized.
    """
    if dataset.is_shard_folder(storage.check_url(source)):
        return _found(f"shards in {source}", {"train": source}, {}, [])
    if os.path.isfile(source):
        return _coco(os.path.dirname(source) or ".", given, source)
    if not os.path.isdir(source):
        raise DataError("file-missing", source, "expected a data set, got no such file or folder")
    if os.path.isdir(os.path.join(source, "gtFine")):
        return _cityscapes(source, given)
    return _coco(source, given)


def _cityscapes(root: str, given: Mapping[str, Any]) -> Found:
    settings: dict[str, Any] = {"train": os.path.join(root, "gtFine", "train")}
    val, more = (os.path.join(root, *name.split("/")) for name in ("gtFine/val", UNLABELED_CITYSCAPES))
    settings |= {"val": val} if os.path.isdir(val) else {"holdout": HOLDOUT}
    if os.path.isdir(more):
        settings |= {"unlabeled": more, "labeled": 1.0}
    images = cityscapes.images_beside(settings["train"])
    return _found(
        f"Cityscapes in {root}",
        {key: value for key, value in settings.items() if key not in given},
        {"train": f"images in {images}"},
        ["for the views and intervals of the paper, add the config cityscapes"],
    )


def _coco(root: str, given: Mapping[str, Any], source: str | None = None) -> Found:
    """Detects a COCO layout: the JSON file of each part, the folders of images, and the unlabeled images.

    ``source`` is the JSON file for training if it is known.
    """
    source = given.get("train", source)
    files = [inspect_json(path, root) for path in _json_files(root, (source, given.get("val")))]
    labels = [file for file in files if file.kind == "labels"]
    train = _train(root, files, source)
    settings: dict[str, Any] = {"train": train.path}
    notes = {"train": _count(train)}
    val = None
    if "val" in given:
        val = next((file for file in files if file.path == given["val"]), None)
    elif given.get("holdout") is None:
        val = _one([file for file in labels if file.part == "val" and file != train], "val", "validation")
        if val is not None:
            settings["val"] = val.path
        elif given.get("split") is None:  # otherwise the manifest defines what is held out
            settings["holdout"], notes["holdout"] = HOLDOUT, "no JSON file is named as validation"
    folders = {"train_images": _images(train, root, given, "train_images")}
    if val is not None:
        folders["val_images"] = _images(val, root, given, "val_images")
        notes["val"] = _count(val)
    if "unlabeled" not in given:
        settings |= _unlabeled(root, files, train, val, folders, given, notes)
    settings |= {key: folder for key, folder in folders.items() if key not in given and "images" not in given}
    used = {settings.get("unlabeled"), *(file.path for file in (train, val) if file is not None)}
    unused = [
        file.path + " (scored masks: usable as data.pseudo_labels)" * (file.kind == "results")
        for file in files
        if file.path not in used and file.kind != "other"
    ]
    kept = {key: value for key, value in settings.items() if key not in given}
    return _found(f"a COCO data set in {root}", kept, notes, [f"not used: {path}" for path in unused])


def _found(what: str, settings: dict[str, Any], notes: Mapping[str, str], more: list[str]) -> Found:
    """Adds None for every source that the layout does not have, to override a config that sets one."""
    lines = [f"found {what}:"]
    for key, value in settings.items():
        lines.append(f"  data.{key}={value}" + (f"  ({notes[key]})" if key in notes else ""))
    sources = ("train", "train_images", "val", "val_images", "unlabeled", "unlabeled_images", "images", "holdout")
    return Found(settings=dict.fromkeys(sources) | settings, lines=[*lines, *(f"  {line}" for line in more)])


def inspect_json(path: str, root: str) -> JsonFile:
    """Determines the kind of a JSON file by the keys that occur in its bytes.

    A truncated file counts as labels if nothing excludes it: COCO writes the categories last, and a run must not ignore
    such a file.
    """
    part = _part(os.path.splitext(os.path.basename(path))[0])
    folder = os.path.dirname(path)
    if part is None and os.path.abspath(folder) != os.path.abspath(root):
        part = _part(os.path.basename(folder))
    named = part in ("train", "val", "unlabeled") or os.path.basename(path) == ROBOFLOW
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            keys = {key for key in KEYS if data.find(b'"%s"' % key.encode()) >= 0}
            first, last = data[:64].lstrip()[:1], data[-4096:].rstrip(BLANK)[-1:]
            cut = last != (b"]" if first == b"[" else b"}")
            kind = _kind(first, keys | ({"annotations", "categories"} if cut else set()))
            kind = "labels" if cut and named and not keys and first != b"[" else kind
            found = FILE_NAME.finditer(data) if kind in ("labels", "images") else ()
            return JsonFile(
                path=path, kind=kind, part=part, names=tuple(_names(match[1] for match in found)), is_truncated=cut
            )
    except (OSError, ValueError):  # empty or not readable: reading raises the error
        return JsonFile(path=path, kind="labels" if named else "other", part=part, is_truncated=True)


BLANK = b" \t\r\n\0"  # zeros: of an interrupted download, or half a character of UTF-16
KEYS = ("images", "annotations", "categories", "keypoints", "segments_info", "score", "segmentation")


def _kind(first: bytes, keys: set[str]) -> Literal["labels", "images", "results", "other"]:
    if first == b"[":
        return "results" if {"score", "segmentation"} <= keys else "other"
    if "images" not in keys or keys & {"keypoints", "segments_info"}:  # COCO keypoint and panoptic files
        return "other"
    if {"annotations", "categories"} <= keys:
        return "labels"
    if "annotations" in keys:  # captions have no masks; a truncated file may lack categories
        return "labels" if "segmentation" in keys else "other"
    return "images"


def _count(file: JsonFile) -> str:
    return f"{len(file.names)} images" + ", and the file is truncated" * file.is_truncated


def _names(found: Iterable[bytes]) -> Iterable[str]:
    for text in found:
        try:
            yield os.path.normpath(json.loads(text))
        except ValueError:
            continue


def _json_files(root: str, known: Sequence[Any]) -> list[str]:
    """Returns the JSON files in the folder, in its `annotations`, of Roboflow's parts, and the ``known`` ones."""
    folders = [root, os.path.join(root, "annotations")]
    paths = [os.path.join(folder, name) for folder in folders for name in _listed(folder) if name.endswith(".json")]
    paths += [os.path.join(root, name, ROBOFLOW) for name in _listed(root)]
    paths += [path for path in known if isinstance(path, str)]
    unique = {os.path.abspath(path): path for path in paths if os.path.isfile(path)}
    largest = sorted(unique.values(), key=os.path.getsize, reverse=True)[:MAX_FILES]
    return sorted(path if path in known else os.path.normpath(path) for path in largest)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != ".") if os.path.isdir(folder) else []
    except OSError as error:
        raise DataError(
            "file-read", folder, f"expected a readable folder, got {error.strerror}", "grant read permission"
        ) from error


def _words_of(path: str) -> list[str]:
    return re.findall("[a-z]+", os.path.basename(path).lower())


def _part(name: str) -> str | None:
    return next((part for part, words in PARTS.items() if set(words) & set(_words_of(name))), None)


def _train(root: str, files: Sequence[JsonFile], source: str | None) -> JsonFile:
    if source is not None:
        known = next((file for file in files if file.path == source), None)
        if known is None:
            raise DataError("file-missing", source, "expected a COCO file, got no such file")
        return known
    labels = [file for file in files if file.kind == "labels"]
    named = [file for file in labels if file.part == "train"]
    train = _one(named or [file for file in labels if file.part is None], "train", "training")
    if train is not None:
        return train
    images = sum(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(root) for name in names)
    jsons = f" (not usable: {', '.join(file.path for file in files[:3])})" if files else ""
    remedy = "check the path; the folder must contain images and their annotations"
    if images:
        remedy = (
            "label some of the images and save them here as COCO JSON with masks; or use these as the unlabeled images "
            f"of another data set: data.train=... data.unlabeled={root}"
        )
    raise DataError(
        "data-layout",
        root,
        f"expected a COCO JSON file for training, got {images} images and no such file{jsons}",
        remedy,
    )


def _one(files: Sequence[JsonFile], setting: str, what: str) -> JsonFile | None:
    """Returns the only candidate, or the only one with a name like COCO's instances, or None. Raises DataError."""
    if len(files) > 1:
        files = (
            [file for file in files if file.has_instances_name]
            if any(file.has_instances_name for file in files)
            else files
        )
    if len(files) > 1:
        listed = ", ".join(file.path for file in files)
        raise _ambiguous(os.path.dirname(files[0].path), f"expected one JSON file for {what}, got {listed}", setting)
    return files[0] if files else None


def _images(file: JsonFile, root: str, given: Mapping[str, Any], setting: str) -> str:
    """Returns the folder of a file's images: one named like its part, `images`, its own, the root, or another one."""
    chosen = given.get(setting) or given.get("images")
    if isinstance(chosen, str):
        return chosen
    images = os.path.join(root, "images")
    inner = [os.path.join(base, name) for base in (root, images) for name in _listed(base)]
    inner = [folder for folder in inner if os.path.isdir(folder)]
    named = [folder for folder in inner if file.part is not None and _part(os.path.basename(folder)) == file.part]
    for candidates in (named, [images], [os.path.dirname(file.path) or "."], [root], inner):
        holding = list(dict.fromkeys(os.path.normpath(folder) for folder in candidates if _holds(folder, file)))
        if len(holding) > 1:
            raise _ambiguous(file.path, f"expected its images in one folder, got {', '.join(holding)}", setting)
        if holding:
            return holding[0]
    if file.is_truncated:  # reading raises the error
        return root
    names = f"images such as {file.names[0]!r}" if file.names else "no image"
    raise DataError(
        "data-layout", file.path, f"expected a folder with {names} in {root}, got none", f"set data.{setting}"
    )


def _holds(folder: str, file: JsonFile) -> bool:
    """Returns whether at least half of a few images exist; reading reports the missing ones."""
    step = max(1, len(file.names) // NUM_PROBES)
    probed = file.names[::step]
    there = sum(os.path.isfile(os.path.join(folder, name)) for name in probed)
    return bool(probed) and 2 * there >= len(probed)


def _unlabeled(
    root: str,
    files: Sequence[JsonFile],
    train: JsonFile,
    val: JsonFile | None,
    folders: Mapping[str, str],
    given: Mapping[str, Any],
    notes: dict[str, str],
) -> dict[str, Any]:
    """Returns the settings of unlabeled images: a JSON file or folder with that name, or images that no file lists."""
    listing = _one(
        [file for file in files if file.part == "unlabeled" and (file.names or file.is_truncated)],
        "unlabeled",
        "the unlabeled images",
    )
    if listing is not None:
        notes["unlabeled"] = _count(listing)
        images = _images(listing, root, given, "unlabeled_images")
        return {"unlabeled": listing.path, "unlabeled_images": images, "labeled": 1.0}
    named = [os.path.join(root, name) for name in _listed(root) if _part(name) == "unlabeled"]
    named = [os.path.normpath(folder) for folder in named if os.path.isdir(folder)]
    if len(named) > 1:
        raise _ambiguous(root, f"expected one folder of unlabeled images, got {', '.join(named)}", "unlabeled")
    if named:
        notes["unlabeled"] = f"{len(list_folder(named[0]))} images"
        return {"unlabeled": named[0], "labeled": 1.0}
    if train.is_truncated or (val is not None and val.is_truncated):  # the missing part may list more images
        return {}
    folder = folders["train_images"]
    listed = {os.path.abspath(os.path.join(folder, name)) for name in train.names}
    if val is not None:
        listed |= {os.path.abspath(os.path.join(folders["val_images"], name)) for name in val.names}
    rest = [path for path in list_folder(folder) if path not in listed]
    if not rest:
        return {}
    theirs = {os.path.basename(name) for file in files if file not in (train, val) for name in file.names}
    claimed = [path for path in rest if os.path.basename(path) in theirs]
    if claimed:
        notes["train_images"] = f"{len(claimed)} images listed by other JSON files are not used as unlabeled images"
        return {}
    deeper = {os.path.dirname(path) for path in rest} - {os.path.dirname(path) for path in listed}
    if deeper and os.path.abspath(folder) == os.path.abspath(root):  # other images may be there, such as figures
        places = ", ".join(sorted(os.path.relpath(place, folder) for place in deeper)[:3])
        raise _ambiguous(
            folder, f"expected unlabeled images in the folders of labeled ones, got some in {places}", "unlabeled"
        )
    notes["unlabeled"] = f"{len(rest)} images that no JSON file lists"
    return {"unlabeled": folder, "labeled": 1.0}


def _ambiguous(where: str, message: str, setting: str) -> DataError:
    return DataError("data-layout", where, message, f"choose with data.{setting}=...")
