"""COCO metrics equal those of pycocotools, perfect predictions give 1, and invalid input never reaches C code."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from pais_ray.data.annotations.ground_truth import load_ground_truth
from pais_ray.evaluation.evaluators.coco import METRICS
from pais_ray.evaluation.results import to_results
from pais_ray.evaluation.scoring import format_table, score
from pais_ray.structures.batch import Predictions
from pais_ray.structures.masks import Masks

REFERENCE = Path(__file__).parents[1] / "fixtures" / "evaluation" / "coco"
SIZE = (60, 80)


def square(x1, y1, x2, y2):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def rle(mask):
    encoded = mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def polygon(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


@pytest.fixture
def truth():
    """Ids with gaps and a zero; a crowd, an object in two parts, an empty image."""
    crowd = square(50, 30, 80, 60)
    runs = [0] if crowd[0, 0] else []
    flat = crowd.T.flatten().int()
    edges = torch.nonzero(flat.diff()).flatten() + 1
    runs += torch.tensor([0, *edges.tolist(), flat.numel()]).diff().tolist()
    annotations = [
        {"id": 0, "image_id": 7, "category_id": 0, "segmentation": [polygon(2, 2, 12, 12)]},
        {
            "id": 5,
            "image_id": 7,
            "category_id": 9,
            "segmentation": [polygon(20, 5, 30, 40), polygon(34, 5, 44, 40)],
        },
        {
            "id": 9,
            "image_id": 7,
            "category_id": 9,
            "iscrowd": 1,
            "segmentation": {"size": list(SIZE), "counts": runs},
        },
        {"id": 3, "image_id": 3, "category_id": 9, "segmentation": rle(square(0, 0, 70, 50))},
    ]
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in (7, 3, 4)]
    return {
        "images": images,
        "categories": [{"id": 9, "name": "cat"}, {"id": 0, "name": "dog"}, {"id": 20, "name": "absent"}],
        "annotations": annotations,
    }


def predictions(masks, labels, scores):
    boxes = [[m.any(0).nonzero().min(), m.any(1).nonzero().min(), m.any(0).nonzero().max() + 1,
              m.any(1).nonzero().max() + 1] for m in masks]  # fmt: skip
    return Predictions(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        ious=torch.full((len(scores),), 0.5),
        masks=Masks.full(torch.stack(masks) if masks else torch.zeros(0, *SIZE)),
    )


@pytest.fixture
def perfect():
    ids = [9, 0, 20]
    in_parts = square(20, 5, 30, 40) | square(34, 5, 44, 40)
    found = predictions([square(2, 2, 12, 12), in_parts, square(60, 40, 70, 50)], [1, 0, 0], [0.9, 0.8, 0.7])
    results = to_results(found, 7, SIZE, ids)
    results += to_results(predictions([square(0, 0, 70, 50)], [0], [0.6]), 3, SIZE, ids)
    return results + to_results(predictions([], [], []), 4, SIZE, ids)


def test_perfect_predictions_have_an_ap_of_1_and_detections_in_crowds_are_ignored(truth, perfect):
    before = copy.deepcopy(truth)
    figures = score(truth, perfect)
    for iou_type in ("segm", "bbox"):
        assert figures[iou_type]["AP"] == pytest.approx(1)
        assert figures[iou_type]["AP50"] == pytest.approx(1)
        assert figures[iou_type]["per_class"] == {
            "dog": pytest.approx(1),
            "cat": pytest.approx(1),
            "absent": None,
        }
    assert truth == before
    truth["annotations"][2]["iscrowd"] = 0
    assert score(truth, perfect)["segm"]["AP"] < 0.99


def test_results_contain_the_predictions(perfect):
    entry = perfect[1]
    assert entry["image_id"] == 7
    assert entry["category_id"] == 9
    assert entry["bbox"] == [20, 5, 24, 35]
    assert entry["score"] == pytest.approx(0.8)
    assert entry["mask_iou"] == 0.5
    assert isinstance(entry["segmentation"]["counts"], str)
    assert mask_utils.area(entry["segmentation"]) == 20 * 35
    json.dumps(perfect)


def test_low_resolution_masks_are_pasted_in_their_boxes():
    found = predictions([square(10, 10, 38, 38)], [0], [1.0])
    small = Predictions(**{**vars(found), "masks": Masks.in_boxes(torch.ones(1, 28, 28), found.boxes)})
    assert to_results(small, 1, SIZE, [1])[0]["segmentation"] == rle(square(10, 10, 38, 38))


def test_an_empty_list_of_results_scores_0(truth):
    figures = score(truth, [])
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == figures["segm"]["AR100"] == 0
    assert figures["segm"]["per_class"] == {"dog": 0, "cat": 0, "absent": None}
    truth["annotations"] = []
    assert score(truth, [])["segm"]["AP"] is None


def test_ground_truth_can_be_restricted_to_images(truth, perfect):
    only = load_ground_truth(truth, image_ids=[3, 4])
    assert {a["image_id"] for a in only["annotations"]} == {3}
    assert score(only, perfect[-1:])["segm"]["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="expected ids of images in this file, got 8"):
        load_ground_truth(truth, image_ids=[8])


def test_missing_boxes_are_computed_from_masks_and_sizes_refer_to_masks(truth, perfect):
    bare = [{k: v for k, v in e.items() if k != "bbox"} for e in perfect]
    assert score(truth, bare) == score(truth, perfect)
    # A lone false positive whose mask is small but whose box is large is no error among the large.
    thin = perfect[-1] | {"segmentation": rle(square(0, 0, 2, 2)), "bbox": [0, 0, 80, 60], "score": 0.99}
    stripped = {k: v for k, v in thin.items() if k != "bbox"}
    with_box, without = score(truth, [thin, *perfect]), score(truth, [stripped, *perfect])
    assert with_box["segm"] == without["segm"]
    assert with_box["bbox"] != without["bbox"]


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_values_are_those_of_the_official_evaluator(iou_type):
    expected = json.loads((REFERENCE / "expected.json").read_text())[iou_type]
    results = REFERENCE / f"{iou_type}_results.json"
    figures = score(REFERENCE / "ground_truth.json", results, (iou_type,))[iou_type]
    values = [figures[name] for name in METRICS]
    assert values == pytest.approx(expected["pycocotools_2.0.11"], abs=1e-6)
    assert values == pytest.approx(expected["published_3dp"], abs=5.01e-4)
    assert set(figures["per_class"]) == set(expected["per_class_AP"])
    for name, value in expected["per_class_AP"].items():
        assert figures["per_class"][name] == (None if value is None else pytest.approx(value, abs=1e-6)), name


def test_the_order_of_results_does_not_matter_and_nothing_is_printed(capsys):
    truth = load_ground_truth(REFERENCE / "ground_truth.json")
    results = json.loads((REFERENCE / "segm_results.json").read_text())
    for i, entry in enumerate(results):  # equal scores would be ranked by their order
        entry["score"] += 1e-6 * i
    plain = score(truth, results, ("segm",))
    random.Random(0).shuffle(results)
    shards = [[e for e in results if e["image_id"] % 3 == rank] for rank in range(3)]
    assert score(truth, [e for shard in shards for e in shard], ("segm",)) == plain
    assert capsys.readouterr().out == ""


def test_results_with_boxes_only_are_scored_as_boxes():
    assert set(score(REFERENCE / "ground_truth.json", REFERENCE / "bbox_results.json")) == {"bbox"}


GOOD = {"size": list(SIZE), "counts": [4800]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "no such image"),
        ({"image_id": None}, "no such image"),
        ({"category_id": 1}, "category ids of the ground truth 0, 9, 20, got 1"),
        ({"score": float("nan")}, "score"),
        ({"score": "high"}, "score"),
        ({"bbox": [0, 0, float("inf"), 1]}, "box-finite"),
        ({"bbox": [0, 0, -1, 1]}, "bbox"),
        ({"bbox": [0, 0, 1]}, "bbox"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, "expected RLE"),
        ({"segmentation": {"size": [60000, 60000], "counts": "0"}}, "rle-size"),
        ({"segmentation": {**GOOD, "counts": [0, 1000000]}}, "rle-sum"),
        ({"segmentation": {**GOOD, "counts": [10]}}, "rle-sum"),
        ({"segmentation": {**GOOD, "counts": [-10, 4810]}}, "rle-decodes"),
        ({"segmentation": {**GOOD, "counts": "\x01\xff"}}, "rle-decodes"),
        ({"segmentation": {**GOOD, "counts": "oooooooooooooooooooooooo"}}, "rle-decodes"),
        ({"segmentation": {**GOOD, "counts": "PPP"}}, "rle-decodes"),
        ({"segmentation": {**GOOD, "counts": "00"}}, "rle-sum"),
        ({"segmentation": {**GOOD, "counts": None}}, "rle-type"),
    ],
)
def test_invalid_results_are_refused_by_entry_and_rule(truth, perfect, tmp_path, change, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([perfect[0], perfect[1] | change]))
    with pytest.raises(ValueError, match=rf"results\.json: entry 1 .*{message}"):
        score(truth, file)


@pytest.mark.parametrize("key", ["image_id", "category_id", "score", "segmentation"])
def test_missing_keys_are_named(truth, perfect, key):
    perfect[2].pop(key)
    with pytest.raises(ValueError, match=f"entry 2 .*{key}"):
        score(truth, perfect)


@pytest.mark.parametrize(
    "shape",
    [
        [[0, 0, 1e9, 0, 5, 5]],
        [[0, 0, float("nan"), 0, 5, 5]],
        [[0, 0, 4, 4]],
        [[0, 0, 4, 4, 5, 5, 6]],
        {"size": [60, 80], "counts": [0, 10**6]},
        {"size": [6, 8], "counts": [48]},
    ],
)
def test_invalid_ground_truth_is_refused_before_it_reaches_c_code(truth, shape):
    truth["annotations"][3]["segmentation"] = shape
    with pytest.raises(ValueError, match=r"annotation 3: .*\["):
        score(truth, [])


def test_run_lengths_of_pycocotools_are_valid(truth):
    """Random masks, some with long runs: the check accepts all of them."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for density in (0.0, 0.001, 0.1, 0.5, 0.9, 1.0):
        mask = torch.rand(SIZE, generator=generator) < density
        results.append({"image_id": 4, "category_id": 9, "score": 0.5, "segmentation": rle(mask)})
    assert score(truth, results)["segm"]["AP"] == 0


def test_missing_files_and_invalid_json_are_refused(truth, tmp_path):
    with pytest.raises(ValueError, match="file-missing"):
        score(truth, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON.*file-json"):
        score(tmp_path / "bad.json", [])
    with pytest.raises(ValueError, match="expected COCO annotations"):
        score([], [])
    with pytest.raises(ValueError, match="expected a list"):
        score(truth, {})


def test_the_table_has_every_metric_and_class(truth, perfect):
    text = format_table(score(truth, perfect))
    assert "AP50" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("dog", "absent"))] == [
        ["dog", "1.000", "1.000"],
        ["absent", "-", "-"],
    ]
