"""`pais-ray validate`: image files, and the complete data set of a run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.data.annotations import splits
from pais_ray.data.annotations.coco import read_coco
from tests.support.malformed import (
    CORPUS,
    NO_RULE,
    SQUARE,
    H,
    W,
    annotation,
    call,
    repeated,
    rules,
    tree,
    written,
)


def exif(side: int) -> bytes:
    orientation = Image.Exif()
    orientation[0x0112] = side
    return orientation.tobytes()


def spoil(folder: Path, name: str) -> dict:
    """Replaces the file of image 0 by the one that ``name`` describes, and returns the annotations."""
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
def test_each_broken_image_file_gives_its_rule(folder, name, rule):
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


def check_without_errors(folder: Path, part: str, out: Path, images: int) -> None:
    path = folder / "annotations" / f"instances_{part}.json"
    done = call("--annotations", path, "--images", folder / "images", "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["pictures"] == found["images"] == images


def test_real_data_sets_have_no_errors(image_sets, tmp_path):
    for name, part, images in (("coco", "train", 5), ("nuclei", "train", 3), ("encoding_variants", "all", 16)):
        check_without_errors(image_sets / name, part, tmp_path / "out.json", images)


def test_larger_real_data_sets_have_no_errors(shared_data, tmp_path):
    out = tmp_path / "out.json"
    check_without_errors(shared_data / "coco_quick", "train", out, 16)
    check_without_errors(shared_data / "nuts3_quick", "val", out, 6)
    folder = shared_data / "microcontrollers5"
    done = call("--annotations", folder / "annotations" / "instances_train.json", "--json", out)
    assert done.exit_code == 0
    counts = json.loads(out.read_text())["counts"]
    assert counts["area-mask"] > 100, "this export writes the area of the box"
    assert set(counts) == {"area-mask", "category-absent"}


def test_broken_images_are_named(image_sets, folder):
    broken = image_sets / "encoding_variants" / "broken"
    names = sorted(file.name for file in broken.iterdir() if file.suffix == ".jpg")
    sizes = {"height": H, "width": W}
    listed = [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)]
    path, out = written(folder, tree() | {"images": listed, "annotations": []}), folder / "out.json"
    assert call("--annotations", path, "--images", broken, "--json", out).exit_code == 1
    found = {f["rule"] for f in json.loads(out.read_text())["findings"] if f["severity"] == "error"}
    assert found == {"image-decodes", "image-empty", "image-format"}


def test_a_crashing_decoder_affects_only_its_own_image(folder, monkeypatch):
    """Processes that cannot start simulate a decoder that crashes."""
    from pais_ray.data.validation import image_files

    jobs = [image_files.ImageFile(str(folder / f"{i % 2}.png"), f"{i}", (H, W)) for i in range(20)]
    monkeypatch.setattr(image_files, "_ignore_pillow_warnings", os.abort)
    looks = list(image_files.check_images(jobs[:2], 10**6, processes=1))
    assert [look.error.rule for _, look in looks] == ["image-decodes"] * 2
    monkeypatch.undo()
    looks = list(image_files.check_images(jobs, 10**6, processes=2))
    assert [job.where for job, _ in looks] == [job.where for job in jobs]
    assert all(look.error is None and look.sha256 for _, look in looks)


def data_set(folder: Path, same: bool) -> list[str]:
    for part, color in (("train", 0), ("val", 0 if same else 99)):
        (folder / part).mkdir()
        for i in range(2):
            Image.new("RGB", (W, H), (color, i, 7)).save(folder / part / f"{i}.png")
        (folder / f"{part}.json").write_text(json.dumps(tree()))
    words = [f"data.{part}={folder / part}.json" for part in ("train", "val")]
    return [*words, f"data.train_images={folder / 'train'}", f"data.val_images={folder / 'val'}"]


def test_a_data_set_given_by_configs_and_overrides(tmp_path):
    words, out = data_set(tmp_path, same=False), tmp_path / "out.json"
    done = call(*words, "--json", out)
    assert done.exit_code == 0, done.output
    assert "0 errors, 0 warnings: 4 images (4 decoded), 8 annotations" in done.output
    done = call(*words, "data.labeled=0.5", "--json", out)
    assert done.exit_code == 0
    assert set(rules(out)) <= {"category-absent"}
    assert (rules(out) == []) == (json.loads(out.read_text())["warnings"] == 0)
    done = call(*words, f"data.unlabeled={tmp_path / 'val'}")
    assert "4 images (4 decoded)" in done.output, "what is evaluated on is not taken for unlabeled"
    (tmp_path / "more").mkdir()
    for i in range(2):
        Image.new("RGB", (W, H), (90, i, 200)).save(tmp_path / "more" / f"more{i}.png")
    done = call(*words, f"data.unlabeled={tmp_path / 'more'}")
    assert "6 images (6 decoded)" in done.output


def test_an_image_in_two_parts_is_found_by_content(tmp_path):
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


def test_a_manifest_defines_the_labeled_and_held_out_images(tmp_path):
    words, out = data_set(tmp_path, same=False), tmp_path / "out.json"
    assert call(*words, f"data.split={tmp_path}/none.json").exit_code == 2
    changed = tree()
    changed["annotations"][1]["image_id"] = 1  # the dog
    (tmp_path / "train.json").write_text(json.dumps(changed))
    dataset = read_coco(str(tmp_path / "train.json"), str(tmp_path / "train"))
    manifest, path = splits.manifest(splits.assemble([0], [1], 0.5, 7), dataset), tmp_path / "split.json"
    assert manifest.absent == ("dog",)
    path.write_text(manifest.to_json())
    assert call(*words, f"data.split={path}", "--json", out).exit_code == 0
    assert rules(out) == ["category-absent"]
    path.write_text(splits.manifest(splits.assemble([0], [], 1.0, 7, None, 0.5, [1]), dataset).to_json())
    (tmp_path / "train" / "1.png").write_bytes((tmp_path / "train" / "0.png").read_bytes())
    assert call(words[0], words[2], f"data.split={path}", "--json", out).exit_code == 1
    assert "image-leak" in rules(out)


def test_the_other_verbs_raise_the_same_rule(tmp_path):
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
                continue  # evaluation renumbers annotations
            assert done.exit_code == 2, done.output
            assert f"[{rule}]" in done.output
