"""Detection of data=FOLDER: real and generated layouts, the explanations printed, and ambiguous folders."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.config.overlays import ConfigError, expand_words
from pais_ray.config.tree import compose, compose_data, dump, load
from pais_ray.data.annotations.splits import read_manifest
from pais_ray.data.sources.discover import detect
from pais_ray.data.validation.rules import DataError
from pais_ray.runs.prepare import prepare


def found(source, **given) -> dict:
    return {key: value for key, value in detect(str(source), given).settings.items() if value is not None}


def refused(source, **given) -> str:
    with pytest.raises(DataError) as caught:
        detect(str(source), given)
    assert caught.value.rule == "data-layout"
    return str(caught.value)


def call(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (value % 256, 80, 120)).save(path)


def coco(path: Path, names: list[str], **more) -> None:
    """A COCO file with one square in each image."""
    square = {"category_id": 1, "bbox": [8, 8, 24, 24], "segmentation": [[8, 8, 32, 8, 32, 32, 8, 32]], "iscrowd": 0}
    tree = {
        "images": [{"id": i, "file_name": name, "height": 64, "width": 64} for i, name in enumerate(names)],
        "annotations": [square | {"id": i, "image_id": i, "area": 576} for i in range(len(names))],
        "categories": [{"id": 1, "name": "square"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree | more))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten images of which four are labeled."""
    folder = tmp_path / "photos"
    for i in range(10):
        picture(folder / f"{i}.png", 20 * i)
    coco(folder / "labels.json", [f"{i}.png" for i in range(4)])
    return folder


# ---- layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coco", "nuclei"])
def test_real_data_sets_with_two_files_and_a_folder(image_sets, name):
    check_two_files_and_a_folder(image_sets / name)


@pytest.mark.parametrize(
    "name", ["animals6", "coco2017_mini", "coco_quick", "dsb2018_nuclei", "nuts3_quick", "microcontrollers5"]
)
def test_larger_real_data_sets_with_two_files_and_a_folder(shared_data, name):
    check_two_files_and_a_folder(shared_data / name)


def check_two_files_and_a_folder(root: Path) -> None:
    assert found(root) == {
        "train": f"{root}/annotations/instances_train.json",
        "train_images": f"{root}/images",
        "val": f"{root}/annotations/instances_val.json",
        "val_images": f"{root}/images",
    }


def test_images_of_a_test_file_are_not_trained_on(tmp_path):
    for part, start, count in (("train", 0, 3), ("val", 3, 2), ("test", 5, 2)):
        names = [f"{i}.png" for i in range(start, start + count)]
        coco(tmp_path / "annotations" / f"instances_{part}.json", names)
        for name in names:
            picture(tmp_path / "images" / name)
    lines = "\n".join(detect(str(tmp_path), {}).lines)
    assert "2 images listed by other JSON files are not used as unlabeled images" in lines
    assert "not used: " in lines


def test_a_single_file_is_used_for_training(image_sets):
    root = image_sets / "encoding_variants"
    settings = found(root)
    assert settings == {
        "train": f"{root}/annotations/instances_all.json",
        "train_images": f"{root}/images",
        "holdout": 0.2,
    }


def test_cityscapes(image_sets, tmp_path):
    root = image_sets / "cityscapes_layout"
    assert found(root) == {"train": f"{root}/gtFine/train", "val": f"{root}/gtFine/val"}
    assert any("add the config cityscapes" in line for line in detect(str(root), {}).lines)
    for name in ("gtFine/train", "leftImg8bit/train", "leftImg8bit/train_extra"):
        (tmp_path / name).mkdir(parents=True)
    more = {"unlabeled": f"{tmp_path}/leftImg8bit/train_extra", "labeled": 1.0, "holdout": 0.2}
    assert found(tmp_path) == {"train": f"{tmp_path}/gtFine/train", **more}


def test_an_export_of_roboflow(tmp_path):
    """The layout that the site exports: one folder per part with its images and its file."""
    for part, start, count in (("train", 0, 3), ("valid", 3, 2), ("test", 5, 2)):
        names = [f"{i}.png" for i in range(start, start + count)]
        coco(tmp_path / part / "_annotations.coco.json", names)
        for i, name in enumerate(names, start):
            picture(tmp_path / part / name, 20 * i)
    assert found(tmp_path) == {
        "train": f"{tmp_path}/train/_annotations.coco.json",
        "train_images": f"{tmp_path}/train",
        "val": f"{tmp_path}/valid/_annotations.coco.json",
        "val_images": f"{tmp_path}/valid",
    }
    done = call("validate", f"data={tmp_path}")
    assert "5 images (5 decoded)" in done.output, "the test part is not used"


def test_the_layout_of_coco_2017(tmp_path):
    for part, count in (("train2017", 3), ("val2017", 2), ("unlabeled2017", 4)):
        for i in range(count):
            picture(tmp_path / part / f"{part[0]}{i}.png")
    for kind in ("instances", "stuff", "person_keypoints", "captions"):
        for part, count in (("train2017", 3), ("val2017", 2)):
            more = {"keypoints": []} if kind == "person_keypoints" else {}
            coco(tmp_path / f"annotations/{kind}_{part}.json", [f"{part[0]}{i}.png" for i in range(count)], **more)
    coco2017 = {
        "train": f"{tmp_path}/annotations/instances_train2017.json",
        "train_images": f"{tmp_path}/train2017",
        "val": f"{tmp_path}/annotations/instances_val2017.json",
        "val_images": f"{tmp_path}/val2017",
    }
    assert found(tmp_path) == coco2017 | {"unlabeled": f"{tmp_path}/unlabeled2017", "labeled": 1.0}
    listing = tmp_path / "annotations/image_info_unlabeled2017.json"
    listing.write_text(json.dumps({"images": [{"file_name": "u0.png", "id": 1, "height": 64, "width": 64}]}))
    more = {"unlabeled": str(listing), "unlabeled_images": f"{tmp_path}/unlabeled2017", "labeled": 1.0}
    assert found(tmp_path) == coco2017 | more
    shutil.rmtree(tmp_path / "unlabeled2017")
    listing.unlink()
    assert found(tmp_path) == coco2017


@pytest.mark.parametrize("name", ["unlabeled", "unlabelled"])
def test_a_folder_of_unlabeled_images_has_either_spelling(tmp_path, name):
    for part in ("train", "val"):
        picture(tmp_path / part / f"{part}.png")
        coco(tmp_path / f"{part}.json", [f"{part}.png"])
    picture(tmp_path / name / "u.png")
    assert found(tmp_path)["unlabeled"] == f"{tmp_path}/{name}"


def test_files_beside_their_images(tmp_path):
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        picture(tmp_path / name)
    coco(tmp_path / "train.json", ["a.png", "b.png"])
    coco(tmp_path / "val.json", ["c.png"])
    assert found(tmp_path)["train_images"] == f"{tmp_path}/train"
    assert found(tmp_path)["val_images"] == f"{tmp_path}/val"
    coco(tmp_path / "train.json", ["train/a.png", "train/b.png"])
    assert found(tmp_path)["train_images"] == str(tmp_path), "names with their folder"


def test_a_folder_of_images_and_one_file(photos):
    expected = {"train": f"{photos}/labels.json", "train_images": str(photos), "unlabeled": str(photos)}
    assert found(photos) == expected | {"labeled": 1.0, "holdout": 0.2}
    assert found(photos / "labels.json") == found(photos), "the file alone says as much"
    lines = detect(str(photos), {}).lines
    assert f"  data.train={photos}/labels.json  (4 images)" in lines
    assert f"  data.unlabeled={photos}  (6 images that no JSON file lists)" in lines


def test_shards_are_recognized_by_their_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "pais_ray shards", "version": 1}))
    assert found(tmp_path) == {"train": str(tmp_path)}
    assert found("s3://bucket/shards") == {"train": "s3://bucket/shards"}


# ---- missing or ambiguous parts --------------------------------------------------------------------------


def test_images_without_annotations_are_an_error_with_remedies(photos):
    (photos / "labels.json").unlink()
    message = refused(photos)
    assert message.startswith(
        f"{photos}: expected a COCO JSON file for training, got 10 images and no such file; label some"
    )
    assert f"data.unlabeled={photos}" in message
    done = call("train", f"data={photos}")
    assert done.exit_code == 2
    assert "[data-layout]" in done.stderr
    (photos / "other.json").write_text('{"note": "images"}')
    assert f"got 10 images and no such file (not usable: {photos}/other.json); label" in refused(photos)


@pytest.mark.parametrize("length", [0, 1, 60, 400, -1])
@pytest.mark.parametrize("name", ["instances_val.json", "instances_train.json", "valid/_annotations.coco.json"])
def test_a_truncated_file_is_an_error_and_not_ignored(tmp_path, name, length):
    """Otherwise a run would hold out training images and report results on them."""
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", 20 * i)
    other = "instances_val.json" if "train" in name else "instances_train.json"
    coco(tmp_path / other, [f"{i}.png" for i in range(4)])
    path = tmp_path / name
    coco(path, ["4.png", "5.png"])
    path.write_bytes(path.read_bytes()[:length] if length else b"")
    part = "train" if "train" in name else "val"
    assert found(tmp_path)[part] == str(path)
    assert "the file is truncated" in "\n".join(detect(str(tmp_path), {}).lines)
    done = call("validate", f"data={tmp_path}")
    assert done.exit_code == 1, done.output
    assert "file-json" in done.output
    done = call("train", f"data={tmp_path}", "supervised", f"run.storage_path={tmp_path}/runs")
    assert done.exit_code == 2
    assert "[file-json]" in done.stderr


def test_other_truncated_files_are_ignored(photos):
    (photos / "log_train.json").write_text('[{"loss": 1}, {"lo')
    (photos / "settings.json").write_text("")
    (photos / "captions.json").write_text('{"images": [], "annotations": [{"caption": "a"}]}')
    assert found(photos)["train"] == f"{photos}/labels.json"


def test_a_missing_image_is_reported_by_validate(photos):
    (photos / "2.png").unlink()
    done = call("validate", f"data={photos}")
    assert done.exit_code == 1, done.output
    assert "image-missing" in done.output


def test_a_folder_without_read_permission(photos, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", refuse)
    done = call("validate", f"data={photos}")
    assert done.exit_code == 2
    assert f"error: {photos}: expected a readable folder, got Permission denied" in done.stderr


def test_two_files_for_training(photos):
    coco(photos / "more.json", ["5.png"])
    message = refused(photos)
    assert (
        f"expected one JSON file for training, got {photos}/labels.json, {photos}/more.json; choose with data.train="
        in message
    )
    lines = "\n".join(detect(str(photos), {"train": f"{photos}/more.json"}).lines)
    assert "4 images listed by other JSON files are not used as unlabeled images" in lines
    assert "train" not in found(photos, train=f"{photos}/more.json"), "settings of the user are not repeated"
    (photos / "more.json").rename(photos / "train.json")
    assert found(photos)["train"] == f"{photos}/train.json", "the name decides"


def test_images_in_no_folder_or_in_two(tmp_path):
    coco(tmp_path / "train.json", ["a.png"])
    assert "expected a folder with images such as 'a.png'" in refused(tmp_path)
    assert refused(tmp_path).endswith("set data.train_images [data-layout]")
    picture(tmp_path / "one/a.png")
    picture(tmp_path / "two/a.png")
    assert f"in one folder, got {tmp_path}/one, {tmp_path}/two; choose with data.train_images=" in refused(tmp_path)
    assert found(tmp_path, train_images=f"{tmp_path}/one")["holdout"] == 0.2
    picture(tmp_path / "images/a.png")
    assert found(tmp_path)["train_images"] == f"{tmp_path}/images", "the usual name has priority"


def test_figures_of_a_run_are_not_used_as_unlabeled_images(photos):
    picture(photos / "runs/first/figures/curves.png")
    assert "in the folders of labeled ones, got some in runs/first/figures; choose with data.unlabeled=" in refused(
        photos
    )
    assert "unlabeled" not in found(photos, unlabeled=None)


def test_explicit_settings_have_priority(photos):
    for words in (["data.holdout=0.5", f"data={photos}"], [f"data={photos}", "data.holdout=0.5"]):
        assert compose_data(words).holdout == 0.5
    coco(photos / "val.json", ["9.png"])
    assert compose_data([f"data={photos}"]).val == f"{photos}/val.json"
    data = compose_data([f"data={photos}", "data.holdout=0.5"])
    assert (data.val, data.holdout) == (None, 0.5)
    data = compose_data([f"data={photos}", "data.val=elsewhere.json", "data.val_images=x"])
    assert (data.val, data.holdout) == ("elsewhere.json", None)
    with pytest.raises(ConfigError, match="expected one folder"):
        compose([f"data={photos}", "data=elsewhere"])
    with pytest.raises(DataError, match="file-missing"):
        compose([f"data={photos}/nowhere"])


# ---- configs and overrides -------------------------------------------------------------------------------


def test_a_folder_alone_gives_the_method_of_the_paper(photos, tmp_path):
    spelt = expand_words([f"data={photos}"])
    assert spelt.chosen == ["Defaults: mask_rcnn pais (no other word names a segmentor or a method)"]
    config = compose([f"data={photos}"])
    assert (config.segmentor.name, config.method.name, config.data.labeled) == ("mask_rcnn", "pais", 1.0)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config, "the dump contains all settings"
    assert f"train: {photos}/labels.json" in dump(config)


def test_configs_choose_the_method_and_their_data_is_replaced(photos):
    knet = expand_words([f"data={photos}", "knet"])
    assert knet.chosen == ["Defaults: pais (no other word names a method)"]
    config = compose([f"data={photos}", "quickstart"])
    assert expand_words([f"data={photos}", "quickstart"]).chosen == []
    assert (config.data.train, config.data.labeled, config.data.image_size) == (f"{photos}/labels.json", 1.0, 128)
    coco_word = compose([f"data={photos}", "coco"])
    assert (coco_word.data.val, coco_word.data.val_images) == (None, None)
    assert expand_words(["quickstart"]) == (["quickstart"], [], [])


def test_without_unlabeled_images_the_error_has_two_remedies(image_sets):
    with pytest.raises(ConfigError, match=r"set data\.labeled=0\.1, or .*add the word supervised"):
        compose([f"data={image_sets / 'nuclei'}"])
    assert compose([f"data={image_sets / 'nuclei'}", "supervised"]).data.labeled == 1
    assert compose([f"data={image_sets / 'nuclei'}", "data.labeled=0.5"]).method.name == "pais"


def test_names_in_any_language_are_kept(tmp_path):
    folder = tmp_path / 'Füße: "#1", 🐈'
    picture(folder / "ä ö.png")
    coco(folder / "train.json", ["ä ö.png"])
    assert compose_data([f"data={folder}"]).train == f"{folder}/train.json"


# ---- the resulting data ----------------------------------------------------------------------------------


def test_the_parts_of_a_run(photos, tmp_path):
    """Labeled, held-out and unlabeled images share no file; the ground truth is that of the held-out images."""
    _, data = prepare(compose([f"data={photos}", "data.holdout=0.25", f"run.storage_path={tmp_path}/runs"]))
    parts = [[Path(r.path).name for r in part] for part in (data.labeled, data.val, data.unlabeled)]
    assert [len(part) for part in parts] == [3, 1, 6]
    assert len({name for part in parts for name in part}) == 10
    assert set(parts[2]) == {f"{i}.png" for i in range(4, 10)}
    assert isinstance(data.truth, dict)
    assert [image["file_name"] for image in data.truth["images"]] == parts[1]
    assert len(data.truth["annotations"]) == 1
    assert data.manifest.split.held_out_ids == tuple(r.image_id for r in data.val)


def test_a_labeled_fraction_makes_the_other_images_unlabeled(photos, tmp_path):
    words = [f"data={photos}", "data.labeled=0.5", f"run.storage_path={tmp_path}/runs"]
    _, data = prepare(compose(words))
    labeled, unlabeled, val = ({Path(r.path).name for r in p} for p in (data.labeled, data.unlabeled, data.val))
    assert (len(labeled), len(val), len(unlabeled)) == (1, 1, 8)
    assert not labeled & unlabeled
    assert not val & unlabeled


def test_split_and_run_agree(photos, tmp_path):
    done = call("split", f"data={photos}", "--out", tmp_path / "out", "--labeled", 0.5, "--fold", 2)
    assert done.exit_code == 0, done.output
    assert "found a COCO data set" in done.output
    path = tmp_path / "out/labeled_50pct_fold2.json"
    manifest = read_manifest(path)
    storage = f"run.storage_path={tmp_path}/runs"
    _, drawn = prepare(compose([f"data={photos}", "data.labeled=0.5", "data.fold=2", storage]))
    config, given = prepare(compose([f"data={photos}", f"data.split={path}", storage]))
    assert manifest.split == drawn.manifest.split == given.manifest.split
    assert (config.data.holdout, config.data.labeled, config.data.fold) == (0.2, 0.5, 2)
    assert call("split", f"data={photos}", "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out/labeled_100pct_fold1.json").exists()
    assert call("split", "--out", tmp_path / "out").exit_code == 2


def test_verbs_print_the_detected_settings(photos, tmp_path):
    done = call("show", f"data={photos}", "--json", tmp_path / "show.json")
    assert done.exit_code == 0, done.output
    assert "#   data.holdout=0.2  (no JSON file is named as validation)" in done.output
    assert "# Defaults: mask_rcnn pais (no other word names a segmentor or a method)" in done.output
    assert json.loads((tmp_path / "show.json").read_text())["config"]["data"]["unlabeled"] == str(photos)
    done = call("validate", f"data={photos}")
    assert done.exit_code == 0, done.output
    assert "found a COCO data set" in done.output
    assert "# Defaults: " not in done.output
    assert "10 images (10 decoded)" in done.output
