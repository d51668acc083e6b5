"""Malformed scored masks: every file gives its rule, in the report and when it is read, before any C call."""

import copy
import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from pais_ray.config.tree import compose_data
from pais_ray.data.annotations import rle
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.folders import read_folder
from pais_ray.data.annotations.records import Category, Record
from pais_ray.data.sources import scored_masks
from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.report import Part, examine
from pais_ray.data.validation.rules import LIMITS, DataError, severity
from pais_ray.runs.prepare import read_data
from tests.data.test_validate_fuzz import mutate
from tests.support.malformed import AREA, INF, NAN, RLE, SQUARE, H, W, call, rules, tree

GOOD = {"image_id": 0, "category_id": 3, "segmentation": [SQUARE], "bbox": [10, 10, 20, 15], "score": 0.5}


def entry(**changes):
    return [GOOD, {**GOOD, **changes}]


def without(key):
    return [{k: v for k, v in GOOD.items() if k != key}]


@st.composite
def mutated(draw):
    """A valid file of six masks with up to four changes."""
    sound = [GOOD | {"image_id": i % 2, "iou": 0.5} for i in range(3)]
    sound += [GOOD | {"image_id": i % 2, "segmentation": RLE, "bbox": [4, 3, 6, 5]} for i in range(3)]
    content = copy.deepcopy({"annotations": sound})
    for _ in range(draw(st.integers(1, 4))):
        mutate(draw, content)
    return content.get("annotations", content)


CORPUS: dict[str, tuple[object, str | None]] = {
    "sound": (entry(iou=0.5), None),
    "RLE": (entry(segmentation=RLE, bbox=[4, 3, 6, 5]), None),
    "no box": (without("bbox"), None),
    "whole numbers": (entry(score=1, iou=0), None),
    "nothing": ([], None),
    "an object": ({"annotations": [GOOD]}, "file-json"),
    "truncated": (b'[{"image_id": 0,', "file-json"),
    "not an object": ([7], "key-type"),
    "no image": (without("image_id"), "key-missing"),
    "no category": (without("category_id"), "key-missing"),
    "no score": (without("score"), "key-missing"),
    "no mask": (without("segmentation"), "key-missing"),
    "unknown image": (entry(image_id=99), "id-unknown"),
    "image as text": (entry(image_id="0"), "id-unknown"),
    "image as list": (entry(image_id=[0]), "id-unknown"),
    "unknown category": (entry(category_id=2), "id-unknown"),
    "label for category": (entry(category_id=True), "id-unknown"),
    "score above one": (entry(score=1.01), "score-range"),
    "score below zero": (entry(score=-0.1), "score-range"),
    "score NaN": (entry(score=NAN), "score-range"),
    "score infinite": (entry(score=INF), "score-range"),
    "score as text": (entry(score="0.9"), "score-range"),
    "score true": (entry(score=True), "score-range"),
    "score null": (entry(score=None), "score-range"),
    "iou above one": (entry(iou=1.2), "score-range"),
    "mask_iou NaN": (entry(mask_iou=NAN), "score-range"),
    "predicted_iou as text": (entry(predicted_iou="high"), "score-range"),
    "mask null": (entry(segmentation=None), "segmentation-type"),
    "polygon with NaN": (entry(segmentation=[[NAN, 10, *SQUARE]]), "polygon-finite"),
    "polygon far out": (entry(segmentation=[[1e9, 10, *SQUARE]]), "polygon-range"),
    "polygon odd": (entry(segmentation=[[*SQUARE, 1]]), "polygon-length"),
    "RLE of another image": (entry(segmentation={"size": [W, H], "counts": [H * W]}), "rle-size"),
    "RLE too short": (entry(segmentation={"size": [H, W], "counts": [100, 50]}), "rle-sum"),
    "RLE past its end": (entry(segmentation={**RLE, "counts": RLE["counts"] + "P"}), "rle-decodes"),
    "RLE of fractions": (entry(segmentation={"size": [H, W], "counts": [0.5]}), "rle-type"),
    "box of corners": (entry(bbox=[10, 10, 55, 35]), "box-outside"),
    "box as text": (entry(bbox=["1", 2, 3, 4]), "box-type"),
    "box empty": (entry(bbox=[10, 10, 0, 0]), "box-empty"),
    "box elsewhere": (entry(bbox=[40, 30, 10, 10]), "box-mask"),
    "mask empty": (entry(segmentation={"size": [H, W], "counts": [H * W]}), "scored-empty"),
}


def errors(out):
    return [rule for rule in rules(out) if severity(rule) == "error"]


def data(folder, content, name="masks.json"):
    """Two labeled and two unlabeled images, and the overrides for them."""
    (folder / "set.json").write_text(json.dumps(tree()))
    (folder / "more").mkdir(exist_ok=True)
    for i in range(2):
        Image.new("RGB", (W, H), (9, 40 * i, 7)).save(folder / "more" / f"{i}.png")
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    words = [f"data.train={folder}/set.json", f"data.images={folder}", "data.holdout=0.5"]
    return path, [*words, f"data.unlabeled={folder}/more", f"data.pseudo_labels={path}"]


@pytest.mark.parametrize("name", CORPUS)
def test_each_malformed_file_gives_its_rule_in_report_and_reading(folder, name):
    content, rule = CORPUS[name]
    path, _ = data(folder, content)
    coco = str(folder / "set.json")
    parts = [Part(name="train", annotations=coco, images=None)]
    parts.append(Part(name="unlabeled", annotations=coco, images=None, labels=False))
    findings = examine(parts, scored=str(path)).findings
    assert [finding.rule for finding in findings] == ([rule] if rule else [])
    assert all(str(path) in finding.where and len(finding.message) < 500 for finding in findings)
    records, categories = read_folder(str(folder / "more")), [Category(id=3, name="cat", index=0)]
    if rule and severity(rule) == "error":
        with pytest.raises(DataError) as caught:
            scored_masks.read_scored(str(path), records, (), categories, 0.0)
        assert caught.value.rule == rule
    else:
        found = scored_masks.read_scored(str(path), records, (), categories, 0.0)
        assert sum(len(image.scores) for image in found.images) + found.empty == len(content)


def test_mutated_files_give_findings_and_reading_raises_for_the_same_ones(folder):
    records = [Record(image_id=i, path=f"{i}.png", height=H, width=W) for i in range(2)]
    known = {i: scored_masks.ImageInfo((H, W), f"{i}.png") for i in range(2)}
    path = folder / "masks.json"

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated())
    def law(content):
        path.write_text(json.dumps(content))
        report, refused = Report(), None
        scored_masks.inspect_scored(str(path), known, {3}, LIMITS, report)
        errors = {finding.rule for finding in report.findings if severity(finding.rule) == "error"}
        try:
            scored_masks.read_scored(str(path), records, (), [Category(id=3, name="cat", index=0)], 0.0)
        except DataError as error:
            refused = error.rule
        assert refused in errors if errors else refused is None

    law()


def test_every_invalid_entry_is_reported(folder):
    wrong = [GOOD | {"score": 2}, GOOD, GOOD | {"image_id": 5}, GOOD | {"segmentation": RLE | {"counts": "1"}}]
    _, words = data(folder, wrong)
    out = folder / "out.json"
    assert call(*words, "--json", out).exit_code == 1
    assert errors(out) == ["score-range", "id-unknown", "rle-sum"]


def test_masks_for_the_unlabeled_images_of_train(folder):
    """Without data.unlabeled every image of the file may have masks, because the labeled ones change with the fold."""
    _, words = data(folder, [GOOD, GOOD | {"image_id": 1}])
    words = [word for word in words if not word.startswith("data.unlabeled")]
    assert call(*words, "data.labeled=0.5").exit_code == 0
    _, words = data(folder, [GOOD | {"image_id": 2}])
    words = [word for word in words if not word.startswith("data.unlabeled")]
    assert call(*words, "data.labeled=0.5").exit_code == 1


def test_masks_for_images_of_a_prefix_with_unknown_sizes(folder):
    """Report and reading both read the headers."""
    path, words = data(folder, [GOOD])
    words = [word.replace("unlabeled=", "unlabeled=file://") for word in words]
    assert call(*words).exit_code == 0
    assert [len(image.scores) for image in read_data(compose_data(words)).scored.images] == [1, 0]
    out = folder / "out.json"
    path.write_text(json.dumps([GOOD | {"segmentation": {"size": [W, H], "counts": [H * W]}}]))
    assert call(*words, "--json", out).exit_code == 1
    assert errors(out) == ["rle-size"]
    (folder / "more" / "1.png").write_text("no picture")
    assert call(*words, "--json", out).exit_code == 1
    assert sorted(errors(out)) == ["image-format", "rle-size"]
    with pytest.raises(DataError, match="image-format"):
        read_data(compose_data(words))


def test_train_fails_with_the_same_rule_and_exit_code_2(folder):
    from click.testing import CliRunner

    from pais_ray.cli import main

    path, words = data(folder, entry(score=7))
    done = CliRunner().invoke(main, ["train", "synthetic", "mask_rcnn", "pais", *words, "data.labeled=1"])
    assert done.exit_code == 2
    assert f"error: {path}: entry 1 (image 0): expected a number from 0 to 1 as 'score', got 7" in done.stderr
    assert "[score-range]" in done.stderr
    done = CliRunner().invoke(main, ["train", "synthetic", "mask_rcnn", "supervised", *words])
    assert done.exit_code == 2
    assert "data.pseudo_labels: supervised learns from labeled images only" in done.stderr


def test_a_missing_file_is_wrong_usage(folder):
    path, words = data(folder, [])
    path.unlink()
    done = call(*words)
    assert done.exit_code == 2
    assert "[file-missing]" in done.stderr


def test_ids_of_a_folder_with_new_images_are_refused(folder):
    path, words = data(folder, [GOOD])
    listing = [{"id": i, "file_name": f"/elsewhere/{i}.png"} for i in range(2)]
    (folder / "images.json").write_text(json.dumps({"images": listing, "categories": []}))
    assert call(*words).exit_code == 0
    Image.new("RGB", (W, H), (9, 9, 9)).save(folder / "more" / "00.png")
    out = folder / "out.json"
    assert call(*words, "--json", out).exit_code == 1
    assert errors(out) == ["scored-images"]
    with pytest.raises(DataError, match=r"expected the file '1.png' of the prediction, got '00.png'"):
        scored_masks.read_scored(str(path), read_folder(str(folder / "more")), (), [], 0.0)
    (folder / "images.json").write_text("[1, 2")
    assert call(*words).exit_code == 0, "another tool's file of that name says nothing"


def test_too_many_masks_of_an_image(folder):
    _, words = data(folder, [GOOD] * 4)
    out = folder / "out.json"
    assert call(*words, "data.max_instances=3", "--json", out).exit_code == 1
    assert errors(out) == ["image-instances"]


def test_scored_masks_are_measured_like_annotations(folder):
    """The same square, as an annotation and as a scored mask."""
    path, _ = data(folder, [GOOD | {"image_id": 0}])
    record = read_coco(str(folder / "set.json"), str(folder)).records[0]
    found = scored_masks.read_scored(
        str(path), read_folder(str(folder / "more")), (), [Category(id=3, name="cat", index=0)], 0.0
    )
    assert found.images[0].rles[0] in record.rles
    assert rle.decode_rle(found.images[0].rles, H, W).sum() == AREA
