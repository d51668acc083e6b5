"""What lies in a folder: the settings of `data:` that its layout implies, and what to tell of them. Torch-free.

Names and a few searches through the bytes of JSON files decide; nothing is parsed whole, and no image is opened.
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

HOLDOUT = 0.2  # of the labeled images, where no JSON is for validation; of 100 images 20, which is little already
ROBOFLOW = "_annotations.coco.json"  # one in each part's folder
UNLABELED_CITYSCAPES = "leftImg8bit/train_extra"  # of the release: images without fine annotations
MOST_FILES = 64  # JSON files looked into, the largest: other formats have one an image
PROBED = 8  # file names that tell whether a folder is that of a JSON's images

PARTS = {  # words of names; the first one counts: `instances_train2017-unlabeled.json` is unlabeled
    "unlabeled": ("unlabeled", "unlabeled"),
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True, kw_only=True)
class Found:
    """Settings of `data:`, None where the layout has nothing for one, and a few lines for people."""

    settings: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True, kw_only=True)
class JsonFile:
    """What a look at a JSON file tells."""

    path: str
    kind: Literal["labels", "images", "results", "other"]
    part: str | None  # of PARTS, by its name or its folder's
    names: tuple[str, ...] = ()  # of its images, relative to their folder
    cut: bool = False  # empty, unreadable, or it ends too early: reading will refuse it

    @property
    def instances(self) -> bool:
        """Whether COCO's own naming says that it is the one with the masks of objects (not of stuff)."""
        return "instances" in _words(self.path)


def detect(source: str, given: Mapping[str, Any]) -> Found:
    """What ``source``, a folder, a COCO file or a URL of shards, holds; ``given`` are settings of `data:` that the
    user decides. Raises DataError where nothing, or more than one thing, is recognized."""
    if dataset.is_shards(storage.check_url(source)):
        return _found(f"shards in {source}", {"train": source}, {}, [])
    if os.path.isfile(source):
        return _coco(os.path.dirname(source) or ".", given, source)
    if not os.path.isdir(source):
        raise DataError("file-missing", source, "there is no such file or folder")
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
        ["views and intervals as in the paper: add the word cityscapes"],
    )


def _coco(root: str, given: Mapping[str, Any], source: str | None = None) -> Found:
    """A COCO layout of any naming: which JSON is which part, where its images are, what is unlabeled. ``source`` is
    the JSON to learn from, where it is known."""
    source = given.get("train", source)
    files = [sniff(path, root) for path in _json_files(root, (source, given.get("val")))]
    labels = [file for file in files if file.kind == "labels"]
    train = _train(root, files, source)
    settings: dict[str, Any] = {"train": train.path}
    notes = {"train": _count(train)}
    val = None
    if "val" in given:
        val = next((file for file in files if file.path == given["val"]), None)
    elif given.get("holdout") is None:
        val = _one([file for file in labels if file.part == "val" and file != train], "val", "evaluate on")
        if val is not None:
            settings["val"] = val.path
        elif given.get("split") is None:  # else the manifest says what is held out
            settings["holdout"], notes["holdout"] = HOLDOUT, "no JSON is named as validation"
    folders = {"train_images": _images(train, root, given, "train_images")}
    if val is not None:
        folders["val_images"] = _images(val, root, given, "val_images")
        notes["val"] = _count(val)
    if "unlabeled" not in given:
        settings |= _unlabeled(root, files, train, val, folders, given, notes)
    settings |= {key: folder for key, folder in folders.items() if key not in given and "images" not in given}
    used = {settings.get("unlabeled"), *(file.path for file in (train, val) if file is not None)}
    idle = [
        file.path + " (scored masks: data.pseudo_labels takes such)" * (file.kind == "results")
        for file in files
        if file.path not in used and file.kind != "other"
    ]
    kept = {key: value for key, value in settings.items() if key not in given}
    return _found(f"a COCO data set in {root}", kept, notes, [f"not used: {path}" for path in idle])


def _found(what: str, settings: dict[str, Any], notes: Mapping[str, str], more: list[str]) -> Found:
    """With None for every source that the layout lacks: a word before it may have named one."""
    lines = [f"found {what}:"]
    for key, value in settings.items():
        lines.append(f"  data.{key}={value}" + (f"  ({notes[key]})" if key in notes else ""))
    sources = ("train", "train_images", "val", "val_images", "unlabeled", "unlabeled_images", "images", "holdout")
    return Found(settings=dict.fromkeys(sources) | settings, lines=[*lines, *(f"  {line}" for line in more)])


def sniff(path: str, root: str) -> JsonFile:
    """What kind of JSON a file is, by the keys that occur in its bytes.

    A file that is cut is for labels as far as it can tell: COCO writes the categories last, and if it were passed over,
    a run would go on without it."""
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
            return JsonFile(path=path, kind=kind, part=part, names=tuple(_names(match[1] for match in found)), cut=cut)
    except (OSError, ValueError):  # empty, or it may not be read: reading will say so
        return JsonFile(path=path, kind="labels" if named else "other", part=part, cut=True)


BLANK = b" \t\r\n\0"  # zeros: what a download that broke off leaves, and half a character of UTF-16
KEYS = ("images", "annotations", "categories", "keypoints", "segments_info", "score", "segmentation")


def _kind(first: bytes, keys: set[str]) -> Literal["labels", "images", "results", "other"]:
    if first == b"[":
        return "results" if {"score", "segmentation"} <= keys else "other"
    if "images" not in keys or keys & {"keypoints", "segments_info"}:  # COCO's keypoints and panoptic files
        return "other"
    if {"annotations", "categories"} <= keys:
        return "labels"
    if "annotations" in keys:  # captions have no masks; a file without categories may end where an object does
        return "labels" if "segmentation" in keys else "other"
    return "images"


def _count(file: JsonFile) -> str:
    return f"{len(file.names)} images" + ", and the file is cut short" * file.cut


def _names(found: Iterable[bytes]) -> Iterable[str]:
    for text in found:
        try:
            yield os.path.normpath(json.loads(text))
        except ValueError:
            continue


def _json_files(root: str, known: Sequence[Any]) -> list[str]:
    """Those of the folder, of its `annotations`, Roboflow's of each part, and those that are known."""
    folders = [root, os.path.join(root, "annotations")]
    paths = [os.path.join(folder, name) for folder in folders for name in _listed(folder) if name.endswith(".json")]
    paths += [os.path.join(root, name, ROBOFLOW) for name in _listed(root)]
    paths += [path for path in known if isinstance(path, str)]
    unique = {os.path.abspath(path): path for path in paths if os.path.isfile(path)}
    largest = sorted(unique.values(), key=os.path.getsize, reverse=True)[:MOST_FILES]
    return sorted(path if path in known else os.path.normpath(path) for path in largest)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != ".") if os.path.isdir(folder) else []
    except OSError as error:
        raise DataError("file-read", folder, f"the folder cannot be read ({error.strerror})", "allow it") from error


def _words(path: str) -> list[str]:
    return re.findall("[a-z]+", os.path.basename(path).lower())


def _part(name: str) -> str | None:
    return next((part for part, words in PARTS.items() if set(words) & set(_words(name))), None)


def _train(root: str, files: Sequence[JsonFile], source: str | None) -> JsonFile:
    if source is not None:
        known = next((file for file in files if file.path == source), None)
        if known is None:
            raise DataError("file-missing", source, "there is no such COCO file")
        return known
    labels = [file for file in files if file.kind == "labels"]
    named = [file for file in labels if file.part == "train"]
    train = _one(named or [file for file in labels if file.part is None], "train", "learn from")
    if train is not None:
        return train
    images = sum(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(root) for name in names)
    jsons = f"; {', '.join(file.path for file in files[:3])} is none" if files else ""
    remedy = (
        "label some of the images, export them as COCO JSON with masks and put it beside them; or take these as the "
        f"unlabeled ones of other data: data.train=... data.unlabeled={root}"
    )
    raise DataError("data-layout", root, f"{images} images and no COCO JSON to learn from{jsons}", remedy)


def _one(files: Sequence[JsonFile], setting: str, what: str) -> JsonFile | None:
    """The only candidate, or the only one named as COCO names its instances."""
    if len(files) > 1:
        files = [file for file in files if file.instances] if any(file.instances for file in files) else files
    if len(files) > 1:
        listed = ", ".join(file.path for file in files)
        raise _ambiguous(os.path.dirname(files[0].path), f"several JSON files to {what}: {listed}", setting)
    return files[0] if files else None


def _images(file: JsonFile, root: str, given: Mapping[str, Any], setting: str) -> str:
    """The folder of a JSON's images: one named as its part, `images`, its own, the root, or another one."""
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
            raise _ambiguous(file.path, f"its images lie in several folders: {', '.join(holding)}", setting)
        if holding:
            return holding[0]
    if file.cut:  # reading says what is wrong
        return root
    names = f"images such as {file.names[0]!r}" if file.names else "no image"
    raise DataError(
        "data-layout", file.path, f"it names {names}, and no folder of {root} holds them", f"set data.{setting}"
    )


def _holds(folder: str, file: JsonFile) -> bool:
    """Whether most of a few images are there: reading tells which are missing."""
    step = max(1, len(file.names) // PROBED)
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
    """Settings of the layout's own unlabeled images: a JSON or folder named so, or what no JSON lists."""
    listing = _one(
        [file for file in files if file.part == "unlabeled" and (file.names or file.cut)],
        "unlabeled",
        "take as unlabeled",
    )
    if listing is not None:
        notes["unlabeled"] = _count(listing)
        images = _images(listing, root, given, "unlabeled_images")
        return {"unlabeled": listing.path, "unlabeled_images": images, "labeled": 1.0}
    named = [os.path.join(root, name) for name in _listed(root) if _part(name) == "unlabeled"]
    named = [os.path.normpath(folder) for folder in named if os.path.isdir(folder)]
    if len(named) > 1:
        raise _ambiguous(root, f"several folders of unlabeled images: {', '.join(named)}", "unlabeled")
    if named:
        notes["unlabeled"] = f"{len(list_folder(named[0]))} images"
        return {"unlabeled": named[0], "labeled": 1.0}
    if train.cut or (val is not None and val.cut):  # who knows what else they would list
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
        notes["train_images"] = f"{len(claimed)} images listed by other JSON files are not taken as unlabeled ones"
        return {}
    deeper = {os.path.dirname(path) for path in rest} - {os.path.dirname(path) for path in listed}
    if deeper and os.path.abspath(folder) == os.path.abspath(
        root
    ):  # where other things may lie, pictures of a run, say
        places = ", ".join(sorted(os.path.relpath(place, folder) for place in deeper)[:3])
        raise _ambiguous(
            folder, f"images that no JSON lists lie in other folders than the labeled ones: {places}", "unlabeled"
        )
    notes["unlabeled"] = f"{len(rest)} images that no JSON lists"
    return {"unlabeled": folder, "labeled": 1.0}


def _ambiguous(where: str, message: str, setting: str) -> DataError:
    return DataError("data-layout", where, message, f"say which: data.{setting}=...")
