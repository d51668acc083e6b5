"""The Cityscapes layout: records are the painted pixels, groups are crowds, faults raise a rule."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.data.annotations import cityscapes
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.images.images import decode_values
from pais_ray.data.sources.readers import read_annotations, read_labeled, read_truth
from pais_ray.data.validation.rules import RULES, DataError, Limits
from tests.support.cityscapes_files import polygons, scene, write_polygons, write_scene


@pytest.fixture
def root(tmp_path):
    """Three scenes of two cities: overlap, a group, void, a caravan; one scene is empty."""
    folder = tmp_path / "cs"
    values = scene((26000, 10, 10, 30, 40), (24000, 20, 30, 50, 50), (26, 50, 60, 60, 80), (4, 0, 0, 5, 80))
    write_scene(folder, "train", "ulm", 0, values)
    write_scene(folder, "train", "aachen", 1, scene((26001, 1, 1, 5, 5), (29000, 8, 8, 20, 20), (33000, 30, 0, 60, 9)))
    write_scene(folder, "train", "aachen", 0, scene())
    return folder


def painted(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        return decode_values(file.read(), path)


def check_against_pixels(folder) -> int:
    """Compares every mask, box, label and crowd of a part with instanceIds.png; returns the number of instances."""
    dataset = read_labeled(str(folder), None)
    assert isinstance(dataset.truth, dict)
    ids = {c.index: c.id for c in dataset.categories}
    assert ids == dict(enumerate([24, 25, 26, 27, 28, 31, 32, 33]))
    total = 0
    for record in dataset.records:
        values = painted(record.path.replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_instanceIds.png"))
        expected = [v for v in np.unique(values) if v >= 1000 and v // 1000 not in (29, 30)]
        masks = decode_rle(record.rles, record.height, record.width).astype(bool)
        assert len(masks) == len(expected)
        for value, mask, label, box in zip(expected, masks, record.labels, record.boxes, strict=True):
            assert ids[int(label)] == value // 1000
            np.testing.assert_array_equal(mask, values == value)
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        crowds = [a for a in dataset.truth["annotations"] if a["image_id"] == record.image_id and a["iscrowd"]]
        assert sorted(a["category_id"] for a in crowds) == [v for v in np.unique(values) if v in ids.values()]
        for crowd in crowds:
            mask = decode_rle([crowd["segmentation"]["counts"].encode()], record.height, record.width)[0]
            np.testing.assert_array_equal(mask.astype(bool), values == crowd["category_id"])
        void = dataset.truth["images"][record.image_id]["void"]["counts"].encode()
        mask = decode_rle([void], record.height, record.width)[0].astype(bool)
        np.testing.assert_array_equal(mask, np.isin(values, [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]))
        total += len(masks)
    return total


def test_records_are_the_painted_pixels(root):
    assert check_against_pixels(root / "gtFine" / "train") == 4


def test_real_files_are_read_as_painted(image_sets, tmp_path):
    layout = shutil.copytree(image_sets / "cityscapes_layout" / "gtFine", tmp_path / "gtFine")
    for path in layout.glob("*/*/*_instanceIds.png"):  # only the size of the photographs matters
        photograph = tmp_path / "leftImg8bit" / path.relative_to(layout)
        photograph = photograph.with_name(path.name.replace("gtFine_instanceIds", "leftImg8bit"))
        photograph.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as ids:
            Image.new("RGB", ids.size).save(photograph)
    assert check_against_pixels(layout / "train") == 250
    assert check_against_pixels(layout / "val") == 89


def test_polygons_paint_what_the_official_tool_painted(image_sets):
    files = sorted((image_sets / "cityscapes_layout" / "gtFine").glob("*/*/*_polygons.json"))
    assert len(files) == 39
    for path in files:
        values = painted(str(path).replace("_polygons.json", "_instanceIds.png"))
        np.testing.assert_array_equal(cityscapes.paint(json.loads(path.read_text()), str(path)), values)


def test_polygons_replace_missing_instance_images(image_sets, tmp_path):
    given = image_sets / "cityscapes_layout" / "gtFine" / "val"
    for path in given.glob("*/*_polygons.json"):
        (tmp_path / "gtFine" / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "gtFine" / "val" / path.parent.name)
    assert cityscapes.to_coco(str(tmp_path / "gtFine" / "val"))[0] == cityscapes.to_coco(str(given))[0]


def test_later_objects_hide_earlier_ones():
    tree = polygons(
        ("car", 10, 10, 30, 40),
        ("car", 12, 12, 20, 20),
        ("road", 10, 10, 30, 15),
        ("persongroup", 0, 0, 5, 5),
        ("license plate", 25, 30, 28, 38),
        ("polegroup", 50, 0, 60, 9),
        ("caravan", 40, 40, 50, 50),
    )
    tree["objects"].append({**tree["objects"][0], "deleted": 1})
    expected = scene(
        (26000, 10, 10, 30, 40),
        (26001, 12, 12, 20, 20),
        (7, 10, 10, 30, 15),
        (24, 0, 0, 5, 5),
        (18, 50, 0, 60, 9),
        (29000, 40, 40, 50, 50),
        background=0,
    )
    np.testing.assert_array_equal(cityscapes.paint(tree, "x"), expected)


def test_the_painted_image_has_priority_over_polygons(root):
    before = cityscapes.to_coco(str(root / "gtFine" / "train"))
    (root / "gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json").write_text("nonsense")
    assert cityscapes.to_coco(str(root / "gtFine" / "train")) == before


def test_the_hash_depends_on_pixels_and_not_on_the_order_of_files(root, tmp_path):
    one = read_labeled(str(root / "gtFine" / "train"), None)
    assert [r.path.split("/")[-2:] for r in one.records] == [
        ["aachen", "aachen_000000_000019_leftImg8bit.png"],
        ["aachen", "aachen_000001_000019_leftImg8bit.png"],
        ["ulm", "ulm_000000_000019_leftImg8bit.png"],
    ]
    assert [len(r.labels) for r in one.records] == [0, 2, 2]
    other = tmp_path / "other"
    for name in ("aachen/aachen_000000", "ulm/ulm_000000", "aachen/aachen_000001"):  # written in another order
        for folder in ("gtFine", "leftImg8bit"):
            for path in (root / folder / "train").glob(f"{name}*"):
                (other / folder / "train" / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, other / folder / "train" / path.parent.name)
    (other / "gtFine" / "train" / "readme.txt").write_text("not a city")
    assert read_annotations(str(other / "gtFine" / "train")).sha256 == one.sha256
    write_scene(other, "train", "ulm", 0, scene((26000, 10, 10, 30, 39)))
    assert read_annotations(str(other / "gtFine" / "train")).sha256 != one.sha256


def test_converted_file_gives_the_same_records(root, tmp_path):
    tree, _ = cityscapes.to_coco(str(root / "gtFine" / "train"))
    (tmp_path / "coco.json").write_text(json.dumps(tree))
    native = read_labeled(str(root / "gtFine" / "train"), None)
    coco = read_coco(str(tmp_path / "coco.json"), str(root / "leftImg8bit" / "train"))
    assert (coco.categories, coco.num_crowd) == (native.categories, native.num_crowd) == (native.categories, 1)
    for a, b in zip(native.records, coco.records, strict=True):
        assert (a.image_id, a.path, a.rles, a.boxes.tolist()) == (b.image_id, b.path, b.rles, b.boxes.tolist())


def test_images_can_be_in_another_folder(root, tmp_path):
    (root / "leftImg8bit" / "train").rename(tmp_path / "elsewhere")
    dataset = read_labeled(str(root / "gtFine" / "train"), str(tmp_path / "elsewhere"))
    assert dataset.records[0].path.startswith(str(tmp_path / "elsewhere"))


def no_annotations(root):
    shutil.rmtree(root / "gtFine")


def no_pairs(root):
    for path in (root / "gtFine" / "train").glob("*/*"):
        path.rename(path.with_name(path.name.replace("instanceIds", "color")))


def no_image(root):
    (root / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png").unlink()


def no_images(root):
    shutil.rmtree(root / "leftImg8bit")


def other_size(root):
    shutil.copy(
        write_and_path(root / "other", scene()[:30]), root / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    )


def write_and_path(root, values):
    return root / "leftImg8bit" / "train" / f"{write_scene(root, 'train', 'a', 0, values)}_leftImg8bit.png"


def eight_bits(root):
    path = root / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    Image.fromarray(scene().astype(np.uint8)).save(path)


def colors(root):
    shutil.copy(
        root / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
        root / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png",
    )


def train_ids(root):
    write_scene(root, "train", "ulm", 0, scene((11000, 0, 0, 9, 9)))


def unknown_label_id(root):
    write_scene(root, "train", "ulm", 0, scene((255, 0, 0, 9, 9)))


def cut_off(root):
    path = root / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    path.write_bytes(path.read_bytes()[:60])


def with_polygons(tree):
    def change(root):
        write_polygons(root, "train", "ulm/ulm_000000_000019", tree)

    return change


def object_of(**changes):
    return polygons(objects=[{"label": "car", "polygon": [[0, 0], [9, 0], [9, 9]], **changes}])


@pytest.mark.parametrize(
    ("change", "rule", "said"),
    [
        (no_annotations, "cityscapes-layout", "gtFine/PART/CITY/NAME_gtFine_instanceIds.png"),
        (no_pairs, "cityscapes-layout", "expected CITY/NAME_gtFine_instanceIds.png"),
        (no_image, "cityscapes-layout", "ulm_000000_000019_leftImg8bit.png: expected the image of an annotation in "),
        (no_images, "cityscapes-layout", "leftImg8bit/train: expected the images of"),
        (other_size, "image-size", "expected 60 x 80 px as annotated, got 30 x 80 px"),
        (eight_bits, "cityscapes-ids", "expected 16 bits per pixel"),
        (colors, "image-mode", "got mode RGB"),
        (train_ids, "cityscapes-ids", "got a pixel value of 11000"),
        (unknown_label_id, "cityscapes-ids", "got a pixel value of 255"),
        (cut_off, "image-decodes", "ulm_000000_000019_gtFine_instanceIds.png"),
        (with_polygons([]), "key-missing", "polygons.json"),
        (with_polygons({"objects": []}), "image-size", "positive integer as height"),
        (with_polygons({"objects": [], "imgHeight": 10**6, "imgWidth": 10**6}), "image-pixels", "polygons.json"),
        (with_polygons(object_of(label="spaceship")), "cityscapes-label", "object 0"),
        (with_polygons(object_of(label="spaceshipgroup")), "cityscapes-label", "spaceshipgroup"),
        (with_polygons(object_of(label=7)), "key-missing", "label and polygon"),
        (with_polygons(object_of(polygon=[0, 0, 9, 0, 9, 9])), "polygon-type", "[x, y]"),
        (with_polygons(object_of(polygon=[[0, 0], [9, 0]])), "polygon-length", "object 0"),
        (with_polygons(object_of(polygon=[[0, 0], [9, 0], [1e9, 9]])), "polygon-range", "object 0"),
        (with_polygons(object_of(polygon=[[0, 0], [9, 0], [float("nan"), 9]])), "polygon-finite", "object 0"),
        (with_polygons(object_of(polygon=None)), "polygon-type", "object 0"),
    ],
)
def test_a_fault_is_named(root, change, rule, said):
    change(root)
    with pytest.raises(DataError) as caught:
        read_labeled(str(root / "gtFine" / "train"), None)
    assert caught.value.rule == rule
    assert rule in RULES
    assert said in str(caught.value)


@pytest.mark.parametrize(("cap", "rule"), [("max_pixels", "image-pixels"), ("max_instances", "image-instances")])
def test_caps_hold_as_they_do_for_coco(root, cap, rule):
    with pytest.raises(DataError, match=rule):
        read_labeled(str(root / "gtFine" / "train"), None, Limits(**{cap: 1}))


def test_broken_json_is_named(root):
    write_polygons(root, "train", "ulm/ulm_000000_000019", {})
    (root / "gtFine/train/ulm/ulm_000000_000019_gtFine_polygons.json").write_text("{")
    with pytest.raises(DataError, match=r"ulm_000000_000019_gtFine_polygons.json: expected JSON.*\[file-json\]"):
        read_annotations(str(root / "gtFine" / "train"))


@pytest.mark.parametrize("where", [".", "gtFine", "leftImg8bit/train"])
def test_the_wrong_folder_is_told_the_right_one(root, where):
    with pytest.raises(DataError, match=r"give data.train=ROOT/gtFine/train \[cityscapes-layout\]"):
        read_labeled(str(root / where), None)


def test_truth_of_a_file_is_the_file(root):
    assert read_truth("some.json") == "some.json"
    assert isinstance(read_truth(str(root / "gtFine" / "train")), dict)


def test_a_run_takes_the_folders_and_scores_against_its_own_file(root, tmp_path):
    """Through prepare and the run directory: what a worker scores against is all of Cityscapes."""
    from pais_ray.config.tree import compose, run_schedule
    from pais_ray.evaluation.scoring import score
    from pais_ray.runs import directory, prepare

    write_scene(root, "val", "bonn", 3, scene((26000, 10, 10, 30, 40), (26, 50, 60, 60, 80)))
    words = ["synthetic", "mask_rcnn", "pais", "data.labeled=0.4", f"run.storage_path={tmp_path}/runs"]
    config = compose([*words, f"data.train={root}/gtFine/train", f"data.val={root}/gtFine/val"])
    config, data = prepare.prepare(config)
    assert (len(data.labeled), len(data.unlabeled), len(data.val)) == (1, 2, 1)
    directory.write_run_directory(tmp_path / "run", config, data, run_schedule(config))
    truth = json.loads((tmp_path / "run" / directory.GROUND_TRUTH).read_text())
    results = [
        {**{k: a[k] for k in ("image_id", "category_id", "segmentation")}, "score": 0.5} for a in truth["annotations"]
    ]
    scores = score(tmp_path / "run" / directory.GROUND_TRUTH, results)
    assert [scores[kind]["AP"] for kind in ("segm", "cityscapes")] == [pytest.approx(1), pytest.approx(1)]


def test_the_preset_names_the_native_layout():
    from pais_ray.config.tree import compose

    data = compose(["cityscapes", "mask_rcnn", "pais"]).data
    assert data.part("train") == ("data/cityscapes/gtFine/train", None)
    converted = compose(["cityscapes", "mask_rcnn", "pais", "data.train=a.json", "data.train_images=b"]).data
    assert converted.part("train") == ("a.json", "b")


def test_validate_serves_the_layout(root):
    shutil.copytree(root / "gtFine" / "train", root / "gtFine" / "val")
    shutil.copytree(root / "leftImg8bit" / "train", root / "leftImg8bit" / "val")
    words = ["validate", "cityscapes", f"data.train={root}/gtFine/train", f"data.val={root}/gtFine/val"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "image-leak" in done.output, "both parts hold the same pictures"
    assert "3 errors" in done.output, "and nothing else is wrong"
    next((root / "gtFine" / "val" / "ulm").glob("*_instanceIds.png")).write_bytes(b"no png")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "image-format" in done.output
