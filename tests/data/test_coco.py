"""Reading COCO files: valid files give correct records; every fault raises its rule before any C call."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pais_ray.data.annotations.coco import read_coco, read_unlabeled
from pais_ray.data.annotations.folders import list_folder, read_folder
from pais_ray.data.annotations.rle import decode_rle, encode_masks
from pais_ray.data.validation import values
from pais_ray.data.validation.rules import RULES, DataError, Limits

H, W = 10, 12
SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # px 2..5 x 1..4
TREE = {
    "images": [{"id": 0, "file_name": "a.png", "height": H, "width": W}],
    "categories": [{"id": 7, "name": "cat"}, {"id": 0, "name": "ant"}, {"id": 90, "name": "dog"}],
    "annotations": [
        {
            "id": 4,
            "image_id": 0,
            "category_id": 7,
            "bbox": [2, 1, 4, 4],
            "segmentation": [SQUARE],
            "iscrowd": 0,
        }
    ],
}


def square() -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[1:5, 2:6] = True
    return mask


def read(folder, tree):
    Image.new("RGB", (W, H)).save(folder / "a.png")
    (folder / "set.json").write_text(json.dumps(tree))
    return read_coco(str(folder / "set.json"), str(folder))


def changed(**annotation) -> dict:
    tree = copy.deepcopy(TREE)
    tree["annotations"][0] |= annotation
    return tree


def test_ids_labels_and_boxes(tmp_path):
    dataset = read(tmp_path, TREE)
    assert [(c.id, c.name, c.index) for c in dataset.categories] == [
        (0, "ant", 0),
        (7, "cat", 1),
        (90, "dog", 2),
    ]
    (record,) = dataset.records
    assert (record.image_id, record.height, record.width) == (0, H, W)
    assert os.path.samefile(record.path, tmp_path / "a.png")
    assert record.labels.tolist() == [1]
    assert record.boxes.tolist() == [[2, 1, 6, 5]]
    assert record.boxes.dtype == np.float32
    assert record.labels.dtype == np.int64
    assert (decode_rle(record.rles, H, W)[0] == square()).all()


@pytest.mark.parametrize("kind", ["polygon", "runs", "str", "two polygons"])
def test_every_kind_of_mask_gives_the_same_run_lengths(tmp_path, kind):
    flat = square().ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    compressed = encode_masks(square()[None])[0]
    segmentation = {
        "polygon": [SQUARE],
        "runs": {"size": [H, W], "counts": runs},
        "str": {"size": [H, W], "counts": compressed.decode()},
        "two polygons": [[*SQUARE[:4], 6, 3, 2, 3], [2, 3, 6, 3, 6, 5, 2, 5]],
    }[kind]
    (record,) = read(tmp_path, changed(segmentation=segmentation)).records
    assert record.rles == (compressed,)


def test_counts_as_bytes_pass_the_check():
    values.check_rle({"size": [H, W], "counts": encode_masks(square()[None])[0]}, H, W, "x")


def test_crowds_and_stray_clicks_are_left_out_and_counted(tmp_path):
    tree = copy.deepcopy(TREE)
    one = tree["annotations"][0]
    tree["annotations"] += [
        one | {"id": 5, "iscrowd": 1, "segmentation": {"size": [H, W], "counts": [H * W - 5, 5]}},
        one | {"id": 6, "segmentation": {"size": [H, W], "counts": [H * W]}, "bbox": [3, 3, 1, 1]},
        one | {"id": 7, "segmentation": [], "bbox": [3, 3, 0, 0]},
        one | {"id": 8, "segmentation": {"size": [H, W], "counts": [H * W - 3, 3]}, "bbox": [W + 1, 8, 0, 3]},
        one | {"id": 9, "segmentation": [[3, 3, 3.5, 3, 3.5, 5, 3, 5]], "bbox": [3, 3, 0, 2]},
        one | {"id": 10, "bbox": [-1.5, -2, W + 3, 7.5]},
    ]
    dataset = read(tmp_path, tree)
    (record,) = dataset.records
    assert (dataset.num_crowd, dataset.num_dropped) == (1, 4)
    assert record.boxes.tolist() == [[2, 1, 6, 5], [0, 0, W, 5.5]]
    assert len(record.labels) == len(record.rles) == 2


def test_images_without_annotations_are_kept(tmp_path):
    (record,) = read(tmp_path, TREE | {"annotations": []}).records
    assert record.boxes.shape == (0, 4)
    assert record.labels.shape == (0,)
    assert decode_rle(record.rles, H, W).shape == (0, H, W)


def test_iscrowd_may_be_missing(tmp_path):
    tree = copy.deepcopy(TREE)
    del tree["annotations"][0]["iscrowd"]
    assert len(read(tmp_path, tree).records[0].labels) == 1


NAN, INF = float("nan"), float("inf")
FAULTS = [
    ({"segmentation": [[1, 1, 5, 5]]}, "polygon-length"),
    ({"segmentation": [[1, 1, 5, 5, 3]]}, "polygon-length"),
    ({"segmentation": [[1, 1, 5, 5, 3, 4, 9]]}, "polygon-length"),
    ({"segmentation": [[]]}, "polygon-length"),
    ({"segmentation": [[1, 1, NAN, 5, 3, 4]]}, "polygon-finite"),
    ({"segmentation": [[NAN, 1e9, 5, 5, 3, 4]]}, "polygon-finite"),
    ({"segmentation": [[1, 1, 5, -INF, 3, 4]]}, "polygon-finite"),
    ({"segmentation": [[1, 1, INF, -INF, 3, 4]]}, "polygon-finite"),
    ({"segmentation": [[1, 1, 1e9, 5, 3, 4]]}, "polygon-range"),
    ({"segmentation": [[1e308, 1e308, 1e308, 5, 3, 4]]}, "polygon-range"),
    ({"segmentation": [[1, 1, 5, -10 * W - 1, 3, 4]]}, "polygon-range"),
    ({"segmentation": [[1, 1, 10**400, 5, 3, 4]]}, "polygon-range"),
    ({"segmentation": [[1, 1, "5", 5, 3, 4]]}, "polygon-type"),
    ({"segmentation": [[1, 1, None, 5, 3, 4]]}, "polygon-type"),
    ({"segmentation": [[1, 1, True, 5, 3, 4]]}, "polygon-type"),
    ({"segmentation": [[[1, 1], [5, 5], [3, 4]]]}, "polygon-type"),
    ({"segmentation": SQUARE}, "polygon-type"),
    ({"segmentation": "abc"}, "segmentation-type"),
    ({"segmentation": None}, "segmentation-type"),
    ({"segmentation": {"counts": [120]}}, "rle-size"),
    ({"segmentation": {"size": [W, H], "counts": [120]}}, "rle-size"),
    ({"segmentation": {"size": [60000, 60000], "counts": "PPPPPPPP"}}, "rle-size"),
    ({"segmentation": {"size": [H, W]}}, "rle-type"),
    ({"segmentation": {"size": [H, W], "counts": [60, 60.0]}}, "rle-type"),
    ({"segmentation": {"size": [H, W], "counts": [0, 1000000]}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": [20, 20]}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": []}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": [130, -10]}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": [0, 2**40]}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": ""}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": "11"}}, "rle-sum"),
    ({"segmentation": {"size": [H, W], "counts": "1P"}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": "1\x00"}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": "1é\ud800"}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": "o" * 30 + "0"}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": "P" * 14 + "1"}}, "rle-decodes"),
    ({"segmentation": {"size": [H, W], "counts": "@@@"}}, "rle-decodes"),
    ({"bbox": [1, 2, 3]}, "box-type"),
    ({"bbox": [1, 2, 3, "4"]}, "box-type"),
    ({"bbox": {"x": 1}}, "box-type"),
    ({"bbox": [1, 2, 3, NAN]}, "box-finite"),
    ({"bbox": [1, 2, INF, 3]}, "box-finite"),
    ({"bbox": [1, 2, -3, 3]}, "box-size"),
    ({"iscrowd": 2}, "crowd-flag"),
    ({"area": NAN}, "area-type"),
    ({"area": -1}, "area-type"),
    ({"area": "9"}, "area-type"),
    ({"area": True}, "area-type"),
    ({"segmentation": [[0, 0, 9, 0, 9, 9, 0, 9] * 300]}, "polygon-outline"),
    ({"segmentation": [SQUARE] * 2001}, "polygon-count"),
    ({"segmentation": {"size": [H, float(W)], "counts": [120]}}, "rle-size"),
    ({"iscrowd": "0"}, "crowd-flag"),
    ({"image_id": 5}, "id-unknown"),
    ({"image_id": [0]}, "id-unknown"),
    ({"category_id": 1}, "id-unknown"),
    ({"id": "4"}, "id-type"),
    ({"id": True}, "id-type"),
]


@pytest.mark.parametrize(
    ("fault", "rule"), FAULTS, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_each_fault_of_an_annotation_raises_its_rule(tmp_path, monkeypatch, fault, rule):
    def reached(*_):
        raise AssertionError("a C function received malformed data")

    for name in ("frPyObjects", "merge", "area", "decode", "toBbox"):
        monkeypatch.setattr(coco_mask, name, reached)
    with pytest.raises(DataError) as caught:
        read(tmp_path, changed(**fault))
    assert caught.value.rule == rule
    message = str(caught.value)
    assert "set.json: annotation" in message
    assert f"{RULES[rule]} [{rule}]" in message
    assert len(message) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == message, "the error can be pickled"


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ({"segmentation": []}, "mask-empty"),
        ({"segmentation": [[-9, -9, -5, -9, -5, -5]]}, "mask-empty"),
        ({"segmentation": {"size": [H, W], "counts": [H * W]}}, "mask-empty"),
        ({"bbox": [2, 1, 4, 4 + H]}, "box-outside"),
        ({"bbox": [W + 3, 0, 0, 0]}, "box-outside"),
        ({"bbox": [-2.5, 0, 9, 9]}, "box-outside"),
        ({"bbox": [2, 1, 0, 4]}, "box-empty"),
        ({"bbox": [W, 1, 2, 4]}, "box-empty"),
        ({"bbox": [2, 1, 4, 0], "iscrowd": 1}, "box-empty"),
    ],
)
def test_a_box_or_a_mask_that_contradicts_the_other_is_refused(tmp_path, fault, rule):
    with pytest.raises(DataError, match=r"set\.json: annotation 4 \(image 0\)") as caught:
        read(tmp_path, changed(**fault))
    assert caught.value.rule == rule


def test_more_instances_than_pycocotools_measures_in_one_call(tmp_path):
    tree = copy.deepcopy(TREE)
    tree["annotations"] = [tree["annotations"][0] | {"id": i} for i in range(300)]
    assert len(read(tmp_path, tree).records[0].rles) == 300
    with pytest.raises(DataError, match=r"at most max_instances = 299, got 300 annotations; .*data\.max_instances"):
        read_coco(str(tmp_path / "set.json"), str(tmp_path), Limits(max_instances=299))


def test_a_thousand_polygons_merge_to_their_union(tmp_path):
    rows = [[2, y, 6, y, 6, y + 1, 2, y + 1] for y in range(1, 5)]
    (record,) = read(tmp_path, changed(segmentation=rows * 250)).records
    assert record.rles == tuple(encode_masks(square()[None]))


def without(part: str, key: str) -> dict:
    tree = copy.deepcopy(TREE)
    del tree[part][0][key]
    return tree


def twins() -> dict:
    tree = copy.deepcopy(TREE)
    tree["categories"][1]["name"] = "cat"
    tree["annotations"].append(tree["annotations"][0] | {"id": 5, "category_id": 0})
    return tree


def with_image(**image) -> dict:
    tree = copy.deepcopy(TREE)
    tree["images"][0] |= image
    return tree


@pytest.mark.parametrize(
    ("tree", "rule", "names"),
    [
        (without("annotations", "segmentation"), "key-missing", "annotation 4 .*'segmentation'"),
        (without("annotations", "bbox"), "key-missing", "annotation 4 .*'bbox'"),
        (without("annotations", "category_id"), "key-missing", "annotation 4: .*'category_id'"),
        (without("images", "file_name"), "key-missing", "image 0: .*'file_name'"),
        (without("images", "id"), "key-missing", r"image .*a\.png"),
        (without("categories", "name"), "key-missing", "category 7: .*'name'"),
        ({"images": []}, "key-missing", "'categories'"),
        (TREE | {"images": {}}, "key-type", "'images'"),
        (TREE | {"categories": []}, "key-type", "category"),
        (TREE | {"images": TREE["images"] * 2}, "id-duplicate", "image 0"),
        (TREE | {"categories": TREE["categories"] * 2}, "id-duplicate", "category 7"),
        (TREE | {"annotations": TREE["annotations"] * 2}, "id-duplicate", "annotation 4"),
        (TREE | {"annotations": [3]}, "key-type", "annotation"),
        (twins(), "category-name", "category 7: .*same name as category 0, 'cat'"),
        ([1], "file-json", "list"),
        (with_image(height=0), "image-size", "image 0"),
        (with_image(width=12.0), "image-size", "image 0"),
        (with_image(height=10**6, width=10**6), "image-pixels", "image 0"),
        (with_image(file_name="b.png"), "image-missing", "image 0: .*'b.png'"),
        (with_image(file_name="../secret.png"), "image-path", "image 0"),
        (with_image(file_name="/etc/hostname"), "image-path", "image 0"),
        (with_image(file_name="http://host/a.png"), "image-path", "image 0"),
        (with_image(file_name="a.png\0"), "image-path", "image 0"),
        (with_image(file_name="link.png"), "image-path", "image 0"),
        (with_image(file_name="folder/deep.png"), "image-path", "image 0"),
        (with_image(file_name=".."), "image-path", "image 0"),
        (with_image(file_name="folder/\ud800.png"), "image-missing", "image 0"),
        (with_image(file_name=7), "key-type", "image 0"),
    ],
)
def test_each_fault_of_the_file_names_its_entry(tmp_path, tree, rule, names):
    images = tmp_path / "images"
    (tmp_path / "elsewhere").mkdir()
    images.mkdir()
    for secret in (tmp_path / "secret.png", tmp_path / "elsewhere" / "deep.png"):
        Image.new("RGB", (W, H)).save(secret)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=names) as caught:
        read(images, tree)
    assert caught.value.rule == rule


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match="file-missing"):
        read_coco(str(tmp_path / "gone.json"), str(tmp_path))
    (tmp_path / "set.json").write_text('{"images": [')
    with pytest.raises(DataError, match="file-json"):
        read_coco(str(tmp_path / "set.json"), str(tmp_path))
    (tmp_path / "set.json").write_text(json.dumps(TREE))
    with pytest.raises(DataError, match="file-missing"):
        read_coco(str(tmp_path / "set.json"), str(tmp_path / "gone"))


def test_subfolders_and_a_linked_root_are_valid(tmp_path):
    real = tmp_path / "real"
    (real / "sub").mkdir(parents=True)
    Image.new("RGB", (W, H)).save(real / "sub" / "deep.png")
    (tmp_path / "root").symlink_to(real)
    dataset = read(tmp_path / "root", with_image(file_name="sub/deep.png"))
    assert dataset.records[0].path == str(tmp_path / "root" / "sub" / "deep.png")


def test_run_lengths_of_any_mask_parse_back():
    """Compares the parser with the C encoder: random masks from empty to full, of unusual sizes."""
    random = np.random.default_rng(0)
    for density in (0, 0.001, 0.02, 0.5, 0.98, 1):
        for height, width in ((1, 1), (1, 40), (37, 1), (50, 61), (300, 400)):
            masks = random.random((3, height, width)) < density
            rles = encode_masks(masks)
            for counts in rles:
                assert values.parse_counts(counts, "x").sum() == height * width
                values.check_rle({"size": [height, width], "counts": counts.decode()}, height, width, "x")
            assert (decode_rle(rles, height, width) == masks).all()
            assert decode_rle(rles, height, width).dtype == np.uint8


def test_any_string_is_parsed_or_refused():
    """Random strings raise a rule or give runs that the C decoder also reads as a mask of that size."""
    random = np.random.default_rng(1)
    fine = 0
    for _ in range(3000):
        text = bytes(random.integers(48, 112, random.integers(1, 6), dtype=np.uint8))
        try:
            runs = values.parse_counts(text, "x")
        except DataError as error:
            assert error.rule == "rle-decodes"  # noqa: PT017
            continue
        total = int(runs.sum())
        if not 0 < total < 100_000:
            continue
        fine += 1
        assert coco_mask.area([{"size": [total, 1], "counts": text}])[0] == runs[1::2].sum()
        assert decode_rle([text], total, 1).sum() == runs[1::2].sum()
    assert fine > 300


def test_decoding_checks_the_size():
    with pytest.raises(DataError, match="rle-sum"):
        decode_rle(encode_masks(np.ones((1, 3, 3), bool)), 4, 3)
    with pytest.raises(ValueError, match=r"masks \(N, H, W\)"):
        encode_masks(np.ones((3, 3), bool))


def test_a_plain_folder(tmp_path):
    sizes = {"b.PNG": (5, 6), "a/z.Jpg": (7, 8), "a.webp": (3, 4), "a/b/c.png": (9, 2)}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / name)
    for hidden in (".x.png", ".git/y.png", "a/notes.txt"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("not an image")
    records = read_folder(str(tmp_path))
    names = [os.path.relpath(record.path, tmp_path) for record in records]
    assert names == ["a/b/c.png", "a/z.Jpg", "a.webp", "b.PNG"]
    assert [record.image_id for record in records] == [0, 1, 2, 3]
    assert [(record.width, record.height) for record in records] == [sizes[name] for name in names]
    assert [vars(r) for r in read_unlabeled(str(tmp_path), None)] == [vars(r) for r in records]


@pytest.mark.parametrize("kind", ["a pipe", "a device", "nothing"])
def test_a_folder_with_a_pipe_or_device_is_an_error_and_nothing_is_opened(tmp_path, kind):
    """Reading from a pipe without a writer would block forever."""
    path = tmp_path / "x.jpg"
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else tmp_path / "none.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: expected an image file, got a pipe.*\[image-missing\]"):
        list_folder(str(tmp_path))


def test_a_folder_with_a_broken_image_is_an_error(image_sets, tmp_path):
    with pytest.raises(DataError, match=r"(not_an_image|zero_bytes)\.jpg"):
        read_folder(str(image_sets / "encoding_variants" / "broken"))
    with pytest.raises(DataError, match="image-missing"):
        read_folder(str(tmp_path))
    with pytest.raises(DataError, match="file-missing"):
        read_folder(str(tmp_path / "gone"))


def test_of_an_unlabeled_json_file_only_the_images_are_read(tmp_path):
    read(tmp_path, TREE)
    tree = {"images": TREE["images"], "annotations": "not read"}
    (tmp_path / "images.json").write_text(json.dumps(tree))
    (record,) = read_unlabeled(str(tmp_path / "images.json"), str(tmp_path))
    assert set(vars(record)) == {"image_id", "path", "height", "width"}
    with pytest.raises(DataError, match=r"data\.unlabeled_images or data\.images"):
        read_unlabeled(str(tmp_path / "images.json"), None)


@pytest.mark.parametrize(
    ("part", "images", "instances", "crowd", "empty", "people"),
    [("train", 5, 39, 1, 0, 0), ("val", 2, 32, 1, 1, 14)],
)
def test_coco_photographs_are_read_with_the_counts_of_the_file(
    image_sets, part, images, instances, crowd, empty, people
):
    check_counts(image_sets / "coco", part, images, instances, crowd, empty, people)


@pytest.mark.parametrize(
    ("part", "images", "instances", "crowd", "empty", "people"),
    [("all", 24, 233, 6, 2, 84), ("train", 16, 168, 4, 0, 52), ("val", 8, 65, 2, 2, 32)],
)
def test_more_coco_photographs_are_read_with_the_counts_of_their_readme(
    shared_data, part, images, instances, crowd, empty, people
):
    check_counts(shared_data / "coco_quick", part, images, instances, crowd, empty, people)


def check_counts(folder, part, images, instances, crowd, empty, people):
    path = folder / "annotations" / f"instances_{part}.json"
    dataset = read_coco(str(path), str(folder / "images"))
    assert len(dataset.records) == images
    assert len(dataset.categories) == 80
    assert dataset.num_dropped == 0
    assert dataset.num_crowd == crowd
    assert sum(len(r.labels) for r in dataset.records) == instances - crowd
    annotated = {entry["image_id"] for entry in json.loads(path.read_text())["annotations"]}
    assert len({r.image_id for r in dataset.records} - annotated) == empty
    person = next(c for c in dataset.categories if c.name == "person")
    # people include crowds
    labels = np.concatenate([r.labels for r in dataset.records])
    assert people - crowd <= (labels == person.index).sum() <= people


def test_coco_masks_lie_in_their_boxes_and_match_pycocotools(image_sets):
    folder = image_sets / "coco"
    path = folder / "annotations" / "instances_val.json"
    entries = [e for e in json.loads(path.read_text())["annotations"] if not e["iscrowd"]]
    for record in read_coco(str(path), str(folder / "images")).records:
        own = [e for e in entries if e["image_id"] == record.image_id]
        masks = decode_rle(record.rles, record.height, record.width)
        for entry, mask, box in zip(own, masks, record.boxes, strict=True):
            parts = coco_mask.frPyObjects(entry["segmentation"], record.height, record.width)
            assert mask.sum() == coco_mask.area(coco_mask.merge(parts))
            ys, xs = np.nonzero(mask)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            x, y, width, height = entry["bbox"]
            assert np.allclose(box, [x, y, x + width, y + height], atol=1e-4)
            assert np.abs(tight - box).max() <= 3, "boxes are drawn with a precision of some pixels"


@pytest.mark.parametrize(("name", "part"), [("nuclei", "train"), ("encoding_variants", "all")])
def test_every_instance_of_other_real_data_sets_is_read(image_sets, name, part):
    check_all_read(image_sets / name, part)


@pytest.mark.parametrize("name", ["nuts3_quick", "microcontrollers5"])
def test_every_instance_of_larger_real_data_sets_is_read(shared_data, name):
    check_all_read(shared_data / name, "train")


def check_all_read(folder, part):
    path = folder / "annotations" / f"instances_{part}.json"
    dataset = read_coco(str(path), str(folder / "images"))
    tree = json.loads(path.read_text())
    assert [r.image_id for r in dataset.records] == [image["id"] for image in tree["images"]]
    kept = sum(len(r.labels) for r in dataset.records)
    assert kept + dataset.num_crowd + dataset.num_dropped == len(tree["annotations"])
    assert dataset.num_dropped == 0


def test_the_modules_do_not_import_torch():
    import subprocess
    import sys

    names = ("images.images", "annotations.coco", "validation.values", "annotations.splits", "synthetic.generator")
    modules = ", ".join(f"pais_ray.data.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
