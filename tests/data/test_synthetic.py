"""The generated data set: reproducible, with exact annotations, and with the difficulties of real data."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.synthetic import generator

SIZE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "set"
    generator.generate(str(path), train=24, val=8, size=SIZE, seed=5)
    return path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def annotations(folder: Path, part: str = "train") -> list[dict]:
    return json.loads((folder / f"{part}.json").read_text())["annotations"]


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    parts = coco_mask.frPyObjects(segmentation, height, width)
    rle = coco_mask.merge(parts) if isinstance(parts, list) else parts
    return decode_rle([rle["counts"]], height, width)[0].astype(bool)


def mask_of(entry: dict) -> np.ndarray:
    return decode(entry["segmentation"], SIZE, SIZE)


def test_the_bytes_depend_on_the_seed_only(folder, tmp_path):
    generator.generate(str(tmp_path / "again"), train=24, val=8, size=SIZE, seed=5)
    assert digests(tmp_path / "again") == digests(folder)
    generator.generate(str(tmp_path / "other"), train=2, val=1, size=SIZE, seed=6)
    other, own = digests(tmp_path / "other"), digests(folder)
    assert all(other[name] != own[name] for name in other)


def test_an_image_does_not_depend_on_the_number_of_images(folder, tmp_path):
    generator.generate(str(tmp_path / "fewer"), train=3, val=2, size=SIZE, seed=5)
    fewer, own = digests(tmp_path / "fewer"), digests(folder)
    images = [name for name in fewer if name.startswith("images")]
    assert len(images) == 5
    assert all(fewer[name] == own[name] for name in images)


def test_all_images_differ(folder):
    images = [digest for name, digest in digests(folder).items() if name.startswith("images")]
    assert len(set(images)) == len(images) == 32


def test_the_same_data_set_is_kept_and_another_one_replaces_it(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    generator.generate(str(folder), train=1, val=1, size=64, seed=0)
    (folder / "mine.txt").write_text("kept as long as the set is the same")
    with monkeypatch.context() as patch:
        patch.delattr(generator, "_scene")
        generator.generate(str(folder), train=1, val=1, size=64, seed=0)
    assert (folder / "mine.txt").exists()
    generator.generate(str(folder), train=2, val=1, size=64, seed=0)
    assert not (folder / "mine.txt").exists()
    assert len(json.loads((folder / "train.json").read_text())["images"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "no partial folder is left"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("a year of work")
    with pytest.raises(ValueError, match="choose another folder"):
        generator.generate(str(tmp_path), train=1, val=1, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_every_mask_decodes_and_matches_box_and_area(folder):
    for part in ("train", "val"):
        for entry in annotations(folder, part):
            mask = mask_of(entry)
            ys, xs = np.nonzero(mask)
            assert len(ys) == entry["area"] > 0
            x, y, width, height = entry["bbox"]
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + width, y + height)


def test_no_visible_pixel_belongs_to_two_instances(folder):
    claimed: dict[int, np.ndarray] = {}
    for entry in annotations(folder):
        claimed.setdefault(entry["image_id"], np.zeros((SIZE, SIZE), int))[mask_of(entry)] += 1
    assert len(claimed) > 15
    assert max(count.max() for count in claimed.values()) == 1


def test_every_kind_of_annotation_occurs(folder):
    tree = json.loads((folder / "train.json").read_text())
    entries = tree["annotations"]
    ids = [category["id"] for category in tree["categories"]]
    assert len(ids) >= 6
    assert max(ids) >= len(ids), "ids have gaps"
    assert {entry["category_id"] for entry in entries} == set(ids)
    plain = [entry["segmentation"] for entry in entries if not entry["iscrowd"]]
    assert any(isinstance(item, list) and len(item) > 1 for item in plain), "multi-polygon"
    assert any(isinstance(item, dict) for item in plain), "RLE of an instance"
    crowds = [entry["segmentation"] for entry in entries if entry["iscrowd"]]
    assert len(crowds) >= 2
    assert all(isinstance(item, dict) for item in crowds)
    assert {image["id"] for image in tree["images"]} - {entry["image_id"] for entry in entries}, "empty images"
    assert {Path(image["file_name"]).suffix for image in tree["images"]} == {".png", ".jpg"}
    sides = np.sqrt([entry["area"] for entry in entries]) / SIZE
    assert (sides < 32 / 192).any()
    assert ((sides > 32 / 192) & (sides < 96 / 192)).any()
    assert (sides > 96 / 192).any()


def test_image_ids_of_the_parts_are_disjoint_and_every_file_is_listed(folder):
    train, val = (json.loads((folder / f"{part}.json").read_text())["images"] for part in ("train", "val"))
    ids = [image["id"] for image in train + val]
    assert len(set(ids)) == len(ids)
    assert {image["file_name"] for image in train + val} == {p.name for p in (folder / "images").iterdir()}


def test_annotations_match_the_painted_shapes(folder):
    """Neighboring pixels differ more across the outline of an instance than elsewhere."""
    across, along = [], []
    for record in read_coco(str(folder / "train.json"), str(folder / "images")).records:
        gray = np.asarray(Image.open(record.path).convert("L")).astype(int)
        step = np.abs(np.diff(gray, axis=1))
        masks = decode_rle(record.rles, SIZE, SIZE)
        edge = (np.diff(masks.astype(int), axis=2) != 0).any(axis=0) if len(masks) else np.zeros_like(step, bool)
        across.append(step[edge])
        along.append(step[~edge])
    assert np.concatenate(across).mean() > 4 * np.concatenate(along).mean()


def test_the_coco_reader_accepts_it(folder):
    dataset = read_coco(str(folder / "train.json"), str(folder / "images"))
    entries = annotations(folder)
    assert sum(len(record.labels) for record in dataset.records) == sum(not e["iscrowd"] for e in entries)
    assert dataset.num_crowd == sum(e["iscrowd"] for e in entries) > 0
    assert dataset.num_dropped == 0


@pytest.mark.parametrize("seed", range(20))
def test_outlines_represent_any_mask_without_holes(seed):
    """Random specks touch at corners, which is the difficult case of tracing."""
    mask = np.random.default_rng(seed).random((12, 15)) < 0.25
    polygons = generator.outline(mask)
    if polygons is None:  # the random mask has a hole
        return
    assert (decode(polygons, 12, 15) == mask).all()


def test_parts_that_touch_at_a_corner_are_two_polygons():
    for mask in (np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1]):
        assert sorted(map(len, generator.outline(mask))) == [8, 8]


def test_a_mask_with_a_hole_has_run_lengths_and_no_polygon():
    mask = np.zeros((8, 9), bool)
    mask[1:7, 0:8] = True
    mask[3:5, 3:6] = False
    assert generator.outline(mask) is None
    assert (decode(generator.run_lengths(mask), 8, 9) == mask).all()
    assert decode(generator.run_lengths(np.ones((3, 4), bool)), 3, 4).all()


def test_invalid_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="size >= 64"):
        generator.generate(str(tmp_path / "set"), size=10)
