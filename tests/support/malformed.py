"""Generated malformed COCO files, each with the rule that it breaks; shared by the tests of `validate`."""

import copy
import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.annotations.rle import encode_masks

H, W = 40, 60
NAN, INF = float("nan"), float("inf")
SQUARE = [10, 10, 30, 10, 30, 25, 10, 25]
AREA = 20 * 15
RLE = {"size": [H, W], "counts": encode_masks(np.pad(np.ones((1, 5, 6), bool), ((0, 0), (3, H - 8), (4, W - 10))))[0]}
RLE["counts"] = RLE["counts"].decode()


def tree() -> dict:
    """A valid file: two images, three instances and a crowd."""
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


def vast(segmentation: list) -> dict:
    """Polygons in an image of 24 million pixels."""
    changed = annotation(segmentation=segmentation)
    changed["images"][0] |= {"height": 4000, "width": 6000}
    changed["annotations"][1]["image_id"] = 1
    return changed


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
CORPUS = {  # name -> (content as a tree or bytes, the rule that it breaks)
    "valid": (tree(), NO_RULE),
    "valid without area and iscrowd": (without("annotations", "area"), NO_RULE),
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
    "an empty list of images": (tree() | {"images": [], "annotations": []}, "key-type"),
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
    "more objects than metrics count": (many(101), "image-crowded"),
    "more annotations than the limit": (many(10_001), "image-instances"),
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
    "polygons that zigzag together": (vast([[-5000, -5000, 15000, 15000] * 20] * 3), "polygon-outline"),
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


def written(folder: Path, content: object) -> Path:
    path = folder / "set.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path
