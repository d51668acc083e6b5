"""Laws of `pais-ray validate`: every malformed input ends in its rule and exit code, in the report and in reading."""

import copy
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.data.entries import parsed_bytes
from pais_ray.data.report import Part, examine
from pais_ray.data.sources import encode_masks, read_coco
from pais_ray.data.validate import RULES, WARNINGS, DataError, Limits, severity

ROOT = Path(__file__).resolve().parents[1]
H, W = 40, 60
NAN, INF = float("nan"), float("inf")
SQUARE = [10, 10, 30, 10, 30, 25, 10, 25]
AREA = 20 * 15
RLE = {"size": [H, W], "counts": encode_masks(np.pad(np.ones((1, 5, 6), bool), ((0, 0), (3, H - 8), (4, W - 10))))[0]}
RLE["counts"] = RLE["counts"].decode()


def tree() -> dict:
    """Two images, three instances and a crowd, without a fault."""
    common = {"category_id": 1, "iscrowd": 0}
    return {
        "info": {"year": 2024},
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            common | {"id": 1, "image_id": 0, "bbox": [10, 10, 20, 15], "segmentation": [SQUARE], "area": AREA},
            common | {"id": 2, "image_id": 0, "bbox": [4, 3, 6, 5], "segmentation": RLE, "area": 30, "category_id": 3},
            common | {"id": 3, "image_id": 1, "bbox": [10, 10, 20, 15], "segmentation": [SQUARE], "area": AREA},
            common | {"id": 4, "image_id": 1, "bbox": [4, 3, 6, 5], "segmentation": RLE, "iscrowd": 1, "area": 30},
        ],
    }


def annotation(**values) -> dict:
    changed = tree()
    changed["annotations"][0] |= values
    return changed


def image(**values) -> dict:
    changed = tree()
    changed["images"][0] |= values
    return changed


def without(part: str, key: str) -> dict:
    changed = tree()
    del changed[part][0][key]
    return changed


def repeated(part: str) -> dict:
    changed = tree()
    changed[part].append(copy.deepcopy(changed[part][0]))
    return changed


def rle(counts, size=(H, W), **values) -> dict:
    return annotation(segmentation={"size": list(size), "counts": counts}, **values)


def many(count: int) -> dict:
    changed = tree()
    changed["annotations"] = [changed["annotations"][0] | {"id": i} for i in range(count)]
    changed["annotations"].append(tree()["annotations"][1] | {"id": count})
    return changed


def same_name(used: bool) -> dict:
    changed = tree()
    changed["categories"][1]["name"] = "cat"
    if not used:
        changed["annotations"][1]["category_id"] = 1
    return changed


NO_RULE = ""
CORPUS = {  # what the file holds, as a tree or as bytes -> the rule it ends in; a warning's exit code is 0
    "sound": (tree(), NO_RULE),
    "sound without area and iscrowd": (without("annotations", "area"), NO_RULE),
    "unknown keys": (annotation(attributes={"occluded": [1, {"x": NAN}]}), NO_RULE),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(tree()).encode(), NO_RULE),
    "utf-16": (json.dumps(tree()).encode("utf-16"), NO_RULE),
    "box and polygon a pixel over the border": (
        annotation(bbox=[-1, 10, 31, 15], segmentation=[[-1, 10, 30, 10, 30, 25, -1, 25]], area=450),
        NO_RULE,
    ),
    "area null": (annotation(area=None), NO_RULE),
    # the file
    "empty file": (b"", "file-json"),
    "truncated": (json.dumps(tree()).encode()[:-40], "file-json"),
    "cut within a number": (b'{"images": [{"id": 1', "file-json"),
    "not JSON": (b"\x89PNG\r\n\x1a\n\x00\x00", "file-json"),
    "not UTF-8": (json.dumps(tree()).encode().replace(b"cat", b"c\xff\xfe"), "file-json"),
    "two objects": (b"{} {}", "file-json"),
    "a list": (b"[]", "file-json"),
    "null": (b"null", "file-json"),
    "nested deeply": (b"[" * 200_000, "file-json"),
    "an object nested deeply": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "file-json"),
    "an endless number": (b'{"images": ' + b"9" * 10_000 + b"}", "file-json"),
    # lists and entries
    "no images": ({k: v for k, v in tree().items() if k != "images"}, "key-missing"),
    "no categories": ({k: v for k, v in tree().items() if k != "categories"}, "key-missing"),
    "no annotations": ({k: v for k, v in tree().items() if k != "annotations"}, "key-missing"),
    "images as an object": (tree() | {"images": {"0": {}}}, "key-type"),
    "annotations as null": (tree() | {"annotations": None}, "key-type"),
    "an empty list of categories": (tree() | {"categories": [], "annotations": []}, "key-type"),
    "an image that is a name": (tree() | {"images": ["0.png", "1.png"]}, "key-type"),
    "an annotation that is null": (tree() | {"annotations": [None]}, "key-type"),
    "a category that is a name": (tree() | {"categories": ["cat"]}, "key-type"),
    **{f"an image without {k}": (without("images", k), "key-missing") for k in ("id", "file_name", "height", "width")},
    **{f"a category without {k}": (without("categories", k), "key-missing") for k in ("id", "name")},
    **{
        f"an annotation without {k}": (without("annotations", k), "key-missing")
        for k in ("id", "image_id", "category_id", "bbox", "segmentation")
    },
    # ids
    "image id as text": (image(id="0"), "id-type"),
    "image id as a list": (image(id=[0]), "id-type"),
    "annotation id as a fraction": (annotation(id=1.5), "id-type"),
    "annotation id as null": (annotation(id=None), "id-type"),
    "annotation id beyond 64 bits": (annotation(id=2**64), "id-type"),
    "category id as true": (tree() | {"categories": [{"id": True, "name": "cat"}]}, "id-type"),
    "image twice": (repeated("images"), "id-duplicate"),
    "category twice": (repeated("categories"), "id-duplicate"),
    "annotation twice": (repeated("annotations"), "id-duplicate"),
    "annotation without its image": (annotation(image_id=99), "id-unknown"),
    "annotation without its category": (annotation(category_id=2), "id-unknown"),
    "image_id as text": (annotation(image_id="0"), "id-unknown"),
    "category_id as an object": (annotation(category_id={"id": 1}), "id-unknown"),
    # categories
    "two used categories of one name": (same_name(used=True), "category-name"),
    "an unused category of the same name": (same_name(used=False), "category-twin"),
    "a category without instances": (
        tree() | {"categories": [*tree()["categories"], {"id": 9, "name": "owl"}]},
        "category-absent",
    ),
    "category name as a number": (tree() | {"categories": [{"id": 1, "name": 5}, {"id": 3, "name": "x"}]}, "key-type"),
    # images
    "height of zero": (image(height=0), "image-size"),
    "height below zero": (image(height=-40), "image-size"),
    "width as text": (image(width="60"), "image-size"),
    "width as a fraction": (image(width=60.0), "image-size"),
    "a decompression bomb": (image(height=60_000, width=60_000), "image-pixels"),
    "a size of hundreds of digits": (image(height=10**400), "image-pixels"),
    "an absolute name": (image(file_name="/etc/hostname"), "image-path"),
    "a name that climbs out": (image(file_name="../0.png"), "image-path"),
    "a name that climbs out later": (image(file_name="a/../../0.png"), "image-path"),
    "a URL": (image(file_name="http://localhost/0.png"), "image-path"),
    "a zero byte in the name": (image(file_name="0.png\0"), "image-path"),
    "an empty name": (image(file_name=""), "key-type"),
    "a name that is a list": (image(file_name=["0.png"]), "key-type"),
    "more objects than figures count": (many(101), "image-crowded"),
    "more annotations than the cap": (many(10_001), "image-instances"),
    # flags, areas, boxes
    "iscrowd as text": (annotation(iscrowd="0"), "crowd-flag"),
    "iscrowd of two": (annotation(iscrowd=2), "crowd-flag"),
    "iscrowd as null": (annotation(iscrowd=None), "crowd-flag"),
    "a crowd of polygons": (annotation(iscrowd=1), "crowd-rle"),
    "area as text": (annotation(area="300"), "area-type"),
    "area NaN": (annotation(area=NAN), "area-type"),
    "area below zero": (annotation(area=-1), "area-type"),
    "area of the box": (
        annotation(segmentation=[[10, 10, 30, 25, 10, 25]], area=AREA),
        "area-mask",
    ),
    "box as texts": (annotation(bbox=["10", "10", "20", "15"]), "box-type"),
    "box as a text": (annotation(bbox="10,10,20,15"), "box-type"),
    "box of three": (annotation(bbox=[10, 10, 20]), "box-type"),
    "box with null": (annotation(bbox=[10, 10, 20, None]), "box-type"),
    "box NaN": (annotation(bbox=[10, NAN, 20, 15]), "box-finite"),
    "box infinite": (annotation(bbox=[10, 10, INF, 15]), "box-finite"),
    "box of 400 digits": (annotation(bbox=[10, 10, 10**400, 15]), "box-finite"),
    "box of negative width": (annotation(bbox=[30, 10, -20, 15]), "box-size"),
    "box out of the image": (annotation(bbox=[200, 200, 20, 15]), "box-outside"),
    "box as two corners": (annotation(bbox=[35, 20, 55, 35], segmentation=[[35, 20, 55, 20, 55, 35]]), "box-outside"),
    "box of no area": (annotation(bbox=[10, 10, 0, 15]), "box-empty"),
    "box unlike the mask": (annotation(bbox=[40, 30, 10, 8]), "box-mask"),
    # masks
    "no polygon": (annotation(segmentation=[]), "mask-empty"),
    "polygon out of the image": (annotation(segmentation=[[100, 100, 120, 100, 120, 120]]), "mask-empty"),
    "RLE of background": (rle([H * W]), "mask-empty"),
    "a stray click": (annotation(bbox=[10, 10, 1, 0], segmentation=[[10, 10, 10, 10, 11, 10]]), "instance-empty"),
    "mask as null": (annotation(segmentation=None), "segmentation-type"),
    "mask as text": (annotation(segmentation="RLE"), "segmentation-type"),
    "a flat polygon": (annotation(segmentation=SQUARE), "polygon-type"),
    "polygon of points": (annotation(segmentation=[[[10, 10], [30, 10], [30, 25]]]), "polygon-type"),
    "polygon of texts": (annotation(segmentation=[["10", "10", "30", "10", "30", "25"]]), "polygon-type"),
    "polygon with null": (annotation(segmentation=[[10, 10, 30, None, 30, 25]]), "polygon-type"),
    "polygon of odd length": (annotation(segmentation=[[*SQUARE, 10]]), "polygon-length"),
    "polygon of two points": (annotation(segmentation=[SQUARE[:4]]), "polygon-length"),
    "polygon of nothing": (annotation(segmentation=[[]]), "polygon-length"),
    "polygon with NaN": (annotation(segmentation=[[NAN, 10, *SQUARE]]), "polygon-finite"),
    "polygon with infinity": (annotation(segmentation=[[INF, 10, *SQUARE]]), "polygon-finite"),
    "polygon far out": (annotation(segmentation=[[1e9, 10, *SQUARE]]), "polygon-range"),
    "polygon of 400 digits": (annotation(segmentation=[[10**400, 10, *SQUARE]]), "polygon-range"),
    "polygon that zigzags": (annotation(segmentation=[[-500, -500, 500, 500] * 1000]), "polygon-outline"),
    "polygons without end": (annotation(segmentation=[SQUARE] * 5000), "polygon-count"),
    "RLE too short": (rle([100, 50]), "rle-sum"),
    "RLE too long": (rle([0, 1_000_000]), "rle-sum"),
    "RLE of no runs": (rle([]), "rle-sum"),
    "RLE of an empty text": (rle(""), "rle-sum"),
    "RLE of negative runs": (rle([H * W + 10, -10]), "rle-decodes"),
    "RLE of fractions": (rle([H * W / 2, H * W / 2]), "rle-type"),
    "RLE without counts": (annotation(segmentation={"size": [H, W]}), "rle-type"),
    "RLE without size": (annotation(segmentation={"counts": [H * W]}), "rle-size"),
    "RLE of another size": (rle([H * W], size=(W, H)), "rle-size"),
    "RLE bomb": (rle("PPPPPPPP", size=(60_000, 60_000)), "rle-size"),
    "RLE of foreign characters": (rle("1\x7f"), "rle-decodes"),
    "RLE of half characters": (rle("1\ud800"), "rle-decodes"),
    "RLE that ends within a number": (rle(RLE["counts"] + "P"), "rle-decodes"),
    "RLE of a number without end": (rle("o" * 60 + "0"), "rle-decodes"),
    "RLE with a tail": (rle(RLE["counts"] + "111"), "rle-sum"),
}


def call(*arguments: object):
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def rules(path: Path) -> list[str]:
    return [finding["rule"] for finding in json.loads(path.read_text())["findings"]]


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(2):
        Image.new("RGB", (W, H), (40 * i, 90, 200)).save(tmp_path / f"{i}.png")
    return tmp_path


def written(folder: Path, content: object) -> Path:
    path = folder / "set.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_the_corpus_is_large():
    assert sum(rule != NO_RULE for _, rule in CORPUS.values()) >= 100


@pytest.mark.parametrize("name", CORPUS)
def test_each_malformed_file_ends_in_its_rule_and_exit_code(folder, name):
    content, rule = CORPUS[name]
    path, out = written(folder, content), folder / "out.json"
    done = call("--annotations", path, "--json", out)
    assert done.exit_code == (1 if rule and severity(rule) == "error" else 0), done.output
    assert isinstance(done.exception, SystemExit | None)
    found = json.loads(out.read_text())
    assert rule in rules(out) if rule else rules(out) == []
    assert found["errors"] + found["warnings"] == len(found["findings"]) == sum(found["counts"].values())
    for finding in found["findings"]:
        assert set(finding) == {"rule", "severity", "where", "message", "remedy"}
        assert finding["severity"] == severity(finding["rule"])
        assert str(path) in finding["where"]
        assert all(finding.values())
        assert len(json.dumps(finding)) < 1500, "a message is a line, whatever the file holds"
    assert all(name in done.output for name in set(rules(out)))
    assert found["errors"] == done.output.count("error   ") or found["errors"] > 1


@pytest.mark.parametrize("name", CORPUS)
def test_reading_refuses_what_the_report_calls_an_error_and_nothing_else(folder, name):
    path = written(folder, CORPUS[name][0])
    report = examine([Part(name="file", annotations=str(path), images=None)])
    errors = {finding.rule for finding in report.findings if severity(finding.rule) == "error"}
    if errors:
        with pytest.raises(DataError) as caught:
            read_coco(str(path), str(folder))
        assert caught.value.rule in errors
    else:
        read_coco(str(path), str(folder))


@pytest.mark.parametrize("name", CORPUS)
def test_the_repaired_copy_has_no_error_and_the_source_is_as_it_was(folder, name):
    content, rule = CORPUS[name]
    path, copied, out = written(folder, content), folder / "copy.json", folder / "out.json"
    before = path.read_bytes()
    done = call("--annotations", path, "--json", out, "--fix", copied)
    assert isinstance(done.exception, SystemExit | None)
    assert path.read_bytes() == before
    changes = json.loads(out.read_text())["changes"]
    if not copied.exists():
        assert "not repaired" in done.output
        assert rule in ("file-json", "key-missing", "key-type", "id-type")
        return
    assert call("--annotations", copied).exit_code == 0
    if rule == NO_RULE:
        assert changes == []
        assert json.loads(copied.read_text()) == json.loads(
            json.dumps(content) if isinstance(content, dict) else content
        )
    if rule and severity(rule) == "error":
        assert changes
        assert all(set(change) == {"where", "rule", "change"} for change in changes)


def test_what_a_repair_writes(folder):
    """Each value that is recomputed, against numbers worked out by hand."""
    square = tree()["annotations"][0]
    broken = same_name(used=True)
    broken["annotations"] = [
        square | {"id": 5, "bbox": ["10", "10", "20", "15"], "area": 999, "category_id": 3},
        square | {"id": 5, "bbox": [-4, 8, 36, 17], "iscrowd": "0"},
        square | {"id": "x", "bbox": [200, 200, 1, 1], "segmentation": [SQUARE, [1, 2], [NAN, *SQUARE, 3]]},
        square | {"id": 7, "iscrowd": 1},
        square | {"id": 8, "bbox": [10, 10, 0, 4], "area": 4, "segmentation": [[10, 10, 11, 10, 11, 14, 10, 14]]},
        square | {"id": 9, "bbox": [0, 0, 5, 5], "area": None},
        square | {"id": 10, "segmentation": [[NAN] * 6]},
        square | {"id": 11, "segmentation": []},
        square | {"id": 12, "image_id": 5},
    ]
    copied, out = folder / "copy.json", folder / "out.json"
    assert call("--annotations", written(folder, broken), "--fix", copied, "--json", out).exit_code == 1
    repaired = json.loads(copied.read_text())
    assert repaired["info"] == {"year": 2024}
    assert repaired["categories"] == [{"id": 1, "name": "cat"}]
    assert [e["id"] for e in repaired["annotations"]] == [5, 12 + 1, 12 + 2, 7, 8, 9]
    assert {e["category_id"] for e in repaired["annotations"]} == {1}
    assert [e["bbox"] for e in repaired["annotations"]] == [
        [10, 10, 20, 15],
        [0, 8, 32, 17],
        [10, 10, 20, 15],
        [10, 10, 20, 15],
        [10, 10, 1, 4],
        [10, 10, 20, 15],
    ]
    assert [e["area"] for e in repaired["annotations"]] == [AREA, AREA, AREA, AREA, 4, None]
    assert [e["iscrowd"] for e in repaired["annotations"]] == [0, 0, 0, 1, 0, 0]
    assert repaired["annotations"][2]["segmentation"] == [SQUARE]
    mask = np.zeros((1, H, W), bool)
    mask[:, 10:25, 10:30] = True
    assert repaired["annotations"][3]["segmentation"] == {"size": [H, W], "counts": encode_masks(mask)[0].decode()}
    removed = [change["where"] for change in json.loads(out.read_text())["changes"] if change["change"] == "removed"]
    assert [re.search(r"annotation (\d+)", where)[1] for where in removed] == ["12", "10", "11"]


def test_several_faults_are_all_found(folder):
    broken = annotation(bbox=[1, 2, 3], iscrowd=7, segmentation=[[1, 2]], area="x", category_id=4)
    broken["images"][1]["height"] = "40"
    broken["annotations"][2]["bbox"] = [0, 0, 500, 500]
    path, out = written(folder, broken), folder / "out.json"
    assert call("--annotations", path, "--json", out).exit_code == 1
    expected = ["area-type", "box-type", "crowd-flag", "id-unknown", "image-size", "polygon-length"]
    assert sorted(rules(out)) == expected


def test_the_table_shows_the_first_examples_and_counts_the_rest(folder):
    broken = tree()
    broken["annotations"] = [broken["annotations"][0] | {"id": i, "bbox": "x"} for i in range(10)]
    done = call("--annotations", written(folder, broken))
    assert re.search(r"error +box-type +10 +write bbox as four numbers", done.output)
    assert [f"annotation {i} (image 0)" in done.output for i in range(5)] == [True] * 3 + [False] * 2
    assert "... and 7 more" in done.output
    assert "10 errors, 1 warning: 2 images (0 decoded), 10 annotations" in done.output


def test_names_cannot_write_escape_sequences(folder):
    done = call("--annotations", written(folder, tree() | {"categories": [{"id": 1, "name": "\x1b[31m\u202e\ud800"}]}))
    assert done.exit_code == 1
    assert "\x1b" not in done.output
    path = written(folder, annotation(bbox=None)).rename(folder / "\x1b[31m.json")
    shown = examine([Part(name="file", annotations=str(path), images=None)]).table()
    assert "?[31m.json: annotation 1" in shown, "click itself takes escapes away from what is no terminal"


# --- image files -----------------------------------------------------------------------------------------


def exif(side: int) -> bytes:
    orientation = Image.Exif()
    orientation[0x0112] = side
    return orientation.tobytes()


def spoil(folder: Path, name: str) -> dict:
    """Makes the file of image 0 what ``name`` says, and returns the annotations."""
    file = folder / "0.png"
    if name == "missing":
        file.unlink()
    elif name == "a folder":
        file.unlink()
        file.mkdir()
    elif name == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif name == "empty":
        file.write_bytes(b"")
    elif name == "text":
        file.write_text("<html>404</html>")
    elif name == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:-2000])
    elif name == "floats":
        Image.fromarray(np.ones((H, W), np.float32)).save(file, "TIFF")
    elif name == "of another size":
        Image.new("RGB", (W + 1, H)).save(file)
    elif name == "on its side":
        Image.new("RGB", (W, H)).save(file, "JPEG", exif=exif(6))
    elif name == "upright by EXIF":
        Image.new("RGB", (H, W)).save(file, "JPEG", exif=exif(6))
    elif name == "a bomb":
        Image.new("1", (20_000, 10_000)).save(file)
    elif name == "linked from outside":
        file.rename(folder.parent / "secret.png")
        file.symlink_to(folder.parent / "secret.png")
    elif name == "linked within":
        file.rename(folder / "real.png")
        file.symlink_to(folder / "real.png")
    return tree()


@pytest.mark.parametrize(
    ("name", "rule"),
    {
        "sound": NO_RULE,
        "upright by EXIF": NO_RULE,
        "linked within": NO_RULE,
        "missing": "image-missing",
        "a folder": "image-missing",
        "a pipe": "image-missing",
        "empty": "image-empty",
        "text": "image-format",
        "truncated": "image-decodes",
        "floats": "image-mode",
        "of another size": "image-unlike",
        "on its side": "image-unlike",
        "a bomb": "image-pixels",
        "linked from outside": "image-path",
    }.items(),
)
def test_each_broken_image_file_ends_in_its_rule(folder, name, rule):
    images = folder / "images"
    images.mkdir()
    for i in range(2):
        (folder / f"{i}.png").rename(images / f"{i}.png")
    path, out, copied = written(folder, spoil(images, name)), folder / "out.json", folder / "copy.json"
    done = call("--annotations", path, "--images", images, "--json", out, "--fix", copied)
    assert done.exit_code == (1 if rule else 0), done.output
    assert rules(out) == ([rule] if rule else [])
    if rule:
        assert f"{path}: image 0" in json.loads(out.read_text())["findings"][0]["where"]
        assert [entry["id"] for entry in json.loads(copied.read_text())["images"]] == [1]
    assert len(json.loads(copied.read_text())["annotations"]) == (2 if rule else 4)


def test_real_sets_have_no_errors(shared_data, tmp_path):
    out = tmp_path / "out.json"
    for name, part in (("coco_quick", "train"), ("nuts3_quick", "val"), ("encoding_variants", "all")):
        folder = shared_data / name
        path = folder / "annotations" / f"instances_{part}.json"
        done = call("--annotations", path, "--images", folder / "images", "--json", out)
        assert done.exit_code == 0, done.output
        found = json.loads(out.read_text())
        assert found["pictures"] == found["images"] > 5
    folder = shared_data / "microcontrollers5"
    done = call("--annotations", folder / "annotations" / "instances_train.json", "--json", out)
    assert done.exit_code == 0
    counts = json.loads(out.read_text())["counts"]
    assert counts["area-mask"] > 100, "this export writes the area of the box"
    assert set(counts) == {"area-mask", "category-absent"}


def test_broken_pictures_are_named(shared_data, folder):
    broken = shared_data / "encoding_variants" / "broken"
    names = sorted(file.name for file in broken.iterdir() if file.suffix == ".jpg")
    sizes = {"height": H, "width": W}
    listed = [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)]
    path, out = written(folder, tree() | {"images": listed, "annotations": []}), folder / "out.json"
    assert call("--annotations", path, "--images", broken, "--json", out).exit_code == 1
    found = {f["rule"] for f in json.loads(out.read_text())["findings"] if f["severity"] == "error"}
    assert found == {"image-decodes", "image-empty", "image-format"}


def test_a_decoder_that_dies_takes_only_its_picture_with_it(folder, monkeypatch):
    """The last resort: processes that cannot start stand for a decoder that ends them."""
    from pais_ray.data import _pictures

    jobs = [_pictures.Job(str(folder / f"{i % 2}.png"), f"{i}", (H, W)) for i in range(20)]
    monkeypatch.setattr(_pictures, "_quiet", os.abort)
    looks = list(_pictures.look_at_all(jobs[:2], 10**6, processes=1))
    assert [look.error.rule for _, look in looks] == ["image-decodes"] * 2
    monkeypatch.undo()
    looks = list(_pictures.look_at_all(jobs, 10**6, processes=2))
    assert [job.where for job, _ in looks] == [job.where for job in jobs]
    assert all(look.error is None and look.sha256 for _, look in looks)


# --- a whole data set ------------------------------------------------------------------------------------


def data_set(folder: Path, same: bool) -> list[str]:
    for part, colour in (("train", 0), ("val", 0 if same else 99)):
        (folder / part).mkdir()
        for i in range(2):
            Image.new("RGB", (W, H), (colour, i, 7)).save(folder / part / f"{i}.png")
        (folder / f"{part}.json").write_text(json.dumps(tree()))
    words = [f"data.{part}={folder / part}.json" for part in ("train", "val")]
    return [*words, f"data.train_images={folder / 'train'}", f"data.val_images={folder / 'val'}"]


def test_words_spell_a_data_set(tmp_path):
    words, out = data_set(tmp_path, same=False), tmp_path / "out.json"
    done = call(*words, "--json", out)
    assert done.exit_code == 0, done.output
    assert "0 errors, 0 warnings: 4 images (4 decoded), 8 annotations" in done.output
    done = call(*words, "data.labeled=0.5", "--json", out)
    assert done.exit_code == 0
    assert set(rules(out)) <= {"category-absent"}
    assert (rules(out) == []) == (json.loads(out.read_text())["warnings"] == 0)
    done = call(*words, f"data.unlabeled={tmp_path / 'val'}")
    assert "6 images (6 decoded)" in done.output


def test_one_picture_in_two_parts_is_found_by_content(tmp_path):
    words, out = data_set(tmp_path, same=True), tmp_path / "out.json"
    assert call(*words, "--json", out).exit_code == 1
    assert rules(out) == ["image-leak"] * 2
    assert "val.json: image 0" in json.loads(out.read_text())["findings"][0]["where"]


def test_classes_absent_from_the_labeled_part(tmp_path):
    words, out = data_set(tmp_path, same=False), tmp_path / "out.json"
    changed = tree()
    changed["annotations"][1]["image_id"] = 1  # the dog
    (tmp_path / "train.json").write_text(json.dumps(changed))
    absent = set()
    for fold in range(1, 9):
        assert call(*words, "data.labeled=0.5", f"data.fold={fold}", "--json", out).exit_code == 0
        absent.add(tuple(rules(out)))
    assert absent == {(), ("category-absent",)}, "it depends on which of the two images is labeled"


def test_the_other_verbs_refuse_with_the_same_rule(tmp_path):
    words = data_set(tmp_path, same=False)
    (tmp_path / "train.json").write_text(json.dumps(annotation(segmentation=[[1e9, 10, *SQUARE]])))
    done = CliRunner().invoke(main, ["train", "quickstart", *words, f"run.storage_path={tmp_path / 'runs'}"])
    assert done.exit_code == 2
    assert "train.json: annotation 1 (image 0)" in done.output
    assert "[polygon-range]" in done.output
    results = tmp_path / "results.json"
    results.write_text("[]")
    for content, rule in CORPUS.values():
        if rule.startswith(("file-", "polygon-", "rle-", "id-dup", "image-size", "image-pixels", "area-type")):
            (tmp_path / "train.json").write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
            arguments = ["evaluate", "--annotations", str(tmp_path / "train.json"), "--predictions", str(results)]
            done = CliRunner().invoke(main, arguments)
            if rule == "id-duplicate" and content == repeated("annotations"):
                continue  # evaluation numbers annotations anew
            assert done.exit_code == 2, done.output
            assert f"[{rule}]" in done.output


# --- usage, caps, cost -----------------------------------------------------------------------------------


def test_wrong_usage_is_exit_code_2(folder):
    path = written(folder, tree())
    for arguments in (
        [],
        ["--annotations", folder / "none.json"],
        ["--annotations", folder],
        ["--annotations", path, "--images", folder / "none"],
        ["--annotations", path, "--images", path],
        ["--annotations", path, "coco"],
        ["--annotations", path, "--frobnicate"],
        ["--annotations", path, "--max-pixels", 0],
        ["--annotations", path, "--max-pixels", 10**10],
        ["--annotations", path, "--fix", path],
        ["--images", folder],
        ["quickstart"],
        ["data.train=nowhere.json", "data.val=nowhere.json", "data.images=."],
        ["data.max_pixels=many"],
        ["coco", "--fix", folder / "copy.json"],
    ):
        done = call(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert "Traceback" not in done.output
    (folder / "link.json").symlink_to(path)
    assert call("--annotations", path, "--fix", folder / "link.json").exit_code == 2
    assert call("--annotations", path, "--json", folder / "link.json").exit_code == 2
    assert call("--annotations", path, "--json", path / "out.json").exit_code == 2
    assert call("--annotations", path, "--json", folder / "a.json", "--fix", folder / "a.json").exit_code == 2
    assert json.loads(path.read_text()) == tree()


@pytest.mark.parametrize(
    ("flag", "setting", "value", "rule"),
    [
        ("--max-pixels", "max_pixels", H * W - 1, "image-pixels"),
        ("--max-instances", "max_instances", 1, "image-instances"),
        ("--max-json-gib", "max_json_gib", 1e-6, "file-size"),
    ],
)
def test_caps_are_settings_that_their_message_names(folder, flag, setting, value, rule):
    path, out = written(folder, tree()), folder / "out.json"
    assert call("--annotations", path, flag, value, "--json", out).exit_code == 1
    found = json.loads(out.read_text())["findings"]
    assert {finding["rule"] for finding in found} >= {rule}
    finding = next(f for f in found if f["rule"] == rule)
    assert f"{setting} = " in finding["message"]
    assert flag in finding["remedy"]
    assert f"data.{setting}" in finding["remedy"]
    with pytest.raises(DataError, match=rule):
        read_coco(str(path), str(folder), Limits(**{setting: value}))
    words = [f"data.train={path}", f"data.val={path}", f"data.images={folder}", f"data.{setting}={value:.7f}"]
    if setting != "max_json_gib":
        words[-1] = f"data.{setting}={value}"
    done = CliRunner().invoke(main, ["train", "quickstart", *words, f"run.storage_path={folder / 'runs'}"])
    assert done.exit_code == 2
    assert f"[{rule}]" in done.output


def limited(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`validate` in a process that may have 2 GiB of addresses and half a minute."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
    code += "from pais_ray.cli import main; main(['validate', *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "--annotations", str(path), *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize(
    "name",
    [
        "sound",
        "polygon far out",
        "polygon with NaN",
        "polygon that zigzags",
        "RLE bomb",
        "RLE too long",
        "nested deeply",
    ],
)
def test_bombs_stay_within_two_gib(folder, name):
    content, rule = CORPUS[name]
    done = limited(written(folder, content), "--json", folder / "out.json", "--fix", folder / "copy.json")
    assert done.returncode == (1 if rule else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert rule in done.stdout


def test_a_large_file_is_refused_by_its_size_and_what_does_not_fit_by_name(folder):
    path = folder / "huge.json"
    with path.open("wb") as file:
        file.truncate(9 << 30)  # takes no room on the disk
    done = limited(path)
    assert (done.returncode, "file-size" in done.stdout) == (1, True), done.stderr
    path.write_bytes(b'{"images":[' + b'{"":0},' * 12_000_000 + b"{}]}")  # 84 MB that become 3 GiB
    done = limited(path)
    assert (done.returncode, "file-size" in done.stdout) == (1, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "unit",
    [
        b"{}",
        b'{"":0}',
        b'{"a":{"b":1}}',
        b"[]",
        b"[[]]",
        b"1.5",
        b"300",
        b'"ab"',
        b'"\xf0\x9f\x90\xb1"',
        b"[1.5,2.5,3.5]",
        None,
    ],
)
def test_the_estimate_of_memory_bounds_what_parsing_takes(unit):
    count = 50_000
    data = b"[" + b",".join([unit] * count) + b"]" if unit else json.dumps({str(i): i for i in range(count)}).encode()
    tracemalloc.start()
    parsed = json.loads(data)
    taken = tracemalloc.get_traced_memory()[1] + len(data)
    tracemalloc.stop()
    assert len(parsed) == count
    assert taken <= parsed_bytes(data) <= 8 * taken


def test_long_thin_images_are_no_way_around_the_cap_of_an_outline(folder):
    """An image of one row lets coordinates reach hundreds of millions of pixels."""
    wide = 50_000_000
    content = annotation(segmentation=[[0, 0, 9 * wide, 0, 9 * wide, 1, 0, 1]])
    content["images"][0] |= {"height": 1, "width": wide}
    done = limited(written(folder, content))
    assert done.returncode == 1
    assert "polygon-outline" in done.stdout


def test_a_file_that_may_not_be_read_is_an_error_of_the_data(folder):
    pipe = folder / "pipe.json"
    os.mkfifo(pipe)
    done = call("--annotations", pipe)
    assert done.exit_code == 1
    assert "file-read" in done.output


# --- the rules and their page ----------------------------------------------------------------------------


def test_the_page_of_rules_is_that_of_the_code():
    page = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(RULES)
    for rule, kind, meaning, remedy in rows:
        assert kind == severity(rule)
        assert len(meaning) > 10
        assert remedy == RULES[rule]
    assert set(RULES) >= WARNINGS


def test_every_rule_is_broken_by_some_test():
    """Rules of other readers are named here until their tests are in this file."""
    readers = ["test_validate.py", "test_cityscapes.py", "test_evaluate_cityscapes.py"]
    text = "".join((Path(__file__).parent / name).read_text() for name in readers)
    elsewhere = {"file-missing", "categories", "box-size"}
    for rule in RULES:
        assert f'"{rule}"' in text or rule in elsewhere, rule
