"""Instance AP of Cityscapes: the values of the official evaluator, and each rule of the benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.annotations import cityscapes
from pais_ray.data.annotations.rle import encode_masks
from pais_ray.data.validation.rules import DataError
from pais_ray.evaluation.scoring import format_table, score
from tests.support.cityscapes_files import SIZE, scene, write_scene

REFERENCE = Path(__file__).parents[1] / "fixtures" / "evaluation" / "cityscapes"
CAR, PERSON = 26, 24


@pytest.fixture
def truth_of(tmp_path):
    def make(*scenes):
        for number, values in enumerate(scenes):
            write_scene(tmp_path, "val", "bonn", number, values)
        return cityscapes.to_coco(str(tmp_path / "gtFine" / "val"))[0]

    return make


def result(rectangle, confidence, category=CAR, image_id=0):
    top, left, bottom, right = rectangle
    mask = np.zeros((1, *SIZE), dtype=bool)
    mask[0, top:bottom, left:right] = True
    rle = {"size": list(SIZE), "counts": encode_masks(mask)[0].decode()}
    return {"image_id": image_id, "category_id": category, "score": confidence, "segmentation": rle}


def ap(truth, results, name="car"):
    return score(truth, results)["cityscapes"]["per_class"][name]


def test_values_are_those_of_the_official_evaluator():
    expected = json.loads((REFERENCE / "expected.json").read_text())
    truth, _ = cityscapes.to_coco(str(REFERENCE / "gtFine" / "val"))
    figures = score(truth, cityscapes.read_results(str(REFERENCE / "predictions"), truth))["cityscapes"]
    assert figures["AP"] == pytest.approx(expected["allAp"], abs=1e-4)
    assert figures["AP50"] == pytest.approx(expected["allAp50"], abs=1e-4)
    assert figures["per_class"].keys() == expected["classes"].keys()
    for name, values in expected["classes"].items():
        if values["ap"] is None:
            assert figures["per_class"][name] is None
        else:
            assert figures["per_class"][name] == pytest.approx(values["ap"], abs=1e-4), name


def test_ground_truth_as_prediction_is_perfect():
    truth, _ = cityscapes.to_coco(str(REFERENCE / "gtFine" / "val"))
    keys = ("image_id", "category_id", "segmentation")
    own = [{k: a[k] for k in keys} | {"score": 1.0} for a in truth["annotations"] if not a["iscrowd"]]
    figures = score(truth, own)["cityscapes"]
    assert (figures["AP"], figures["AP50"]) == (pytest.approx(1), pytest.approx(1))


def test_ap_of_one_correct_and_one_wrong_prediction(truth_of):
    """Two cars; the prediction with the higher score is wrong. Precision is 0 and 1/2 at recall 0 and 1/2."""
    truth = truth_of(scene((26000, 0, 0, 20, 20), (26001, 30, 30, 50, 50)))
    found = [result((0, 0, 20, 20), 0.5), result((30, 0, 50, 20), 0.9)]
    # Levels 0.5 and 0.9: precision 1/2 and 0, recall 1/2 and 0, then the artificial point (0, 0).
    # Widths: (1/2 - 0) / 2 for the first, (1/2 - 0) / 2 for the second, 0 for the third.
    assert ap(truth, found) == pytest.approx(0.5 * 0.25)
    # Without the wrong one: precision 1, 1 at recall 1/2, 0.
    assert ap(truth, found[:1]) == pytest.approx(0.25 + 0.25)
    assert ap(truth, []) == 0


def test_the_overlap_must_exceed_the_threshold(truth_of):
    truth = truth_of(scene((26000, 0, 0, 20, 20)))
    figures = score(truth, [result((0, 0, 20, 10), 0.5)])["cityscapes"]  # an IoU of exactly a half
    assert figures["AP50"] == 0
    assert score(truth, [result((0, 0, 20, 11), 0.5)])["cityscapes"]["AP50"] == 1


def test_a_second_prediction_of_an_object_is_wrong(truth_of):
    truth = truth_of(scene((26000, 0, 0, 20, 20)))
    first = result((0, 0, 20, 20), 0.5)
    for other in (0.4, 0.6):
        again = [first, result((0, 0, 20, 20), other)]
        # lower level: precision 1/2, upper: 1; recall 1 at both; only the upper has a width with the artificial one
        assert ap(truth, again) == ap(truth, again[::-1]) == pytest.approx(0 * 0.5 + 0.5 * 1 + 0.5 * 1)
    wrong = [first, result((40, 40, 60, 60), 0.6)]
    assert ap(truth, wrong) < 0.5


def with_car(*more):
    return scene((26000, 0, 0, 20, 20), *more)


GOOD = result((0, 0, 20, 20), 0.5)


@pytest.mark.parametrize(
    "ignored",
    [
        pytest.param((26, 30, 30, 60, 60), id="group"),
        pytest.param((4, 30, 30, 60, 60), id="void"),
        pytest.param((29, 30, 30, 60, 60), id="group of a class that is void"),
        pytest.param((26001, 31, 30, 40, 41), id="99 px"),
    ],
)
def test_predictions_on_ignore_regions_do_not_count(truth_of, ignored):
    truth = truth_of(with_car(ignored))
    _, top, left, bottom, right = ignored
    on_it, off_it = result((top, left, bottom, right), 0.9), result((top, 0, bottom, right - left), 0.9)
    assert ap(truth, [GOOD]) == ap(truth, [GOOD, on_it]) == 1
    assert ap(truth, [GOOD, off_it]) < 1


def test_predictions_outside_of_ignore_regions_count(truth_of):
    truth = truth_of(with_car((24, 30, 30, 60, 60)))
    assert ap(truth, [GOOD, result((30, 30, 60, 60), 0.9)]) < 1, "a group of another class"
    truth = truth_of(with_car((26001, 30, 30, 40, 40)))
    assert ap(truth, [GOOD]) < 1, "100 px are to be found"
    assert ap(truth, [GOOD, result((30, 30, 40, 40), 0.9)]) == 1


def test_a_prediction_is_ignored_if_its_ignored_share_exceeds_the_threshold(truth_of):
    truth = truth_of(with_car((26, 30, 30, 50, 50)))
    half = result((30, 20, 50, 40), 0.9)  # 0.5 of it lies in the group, its IoU with the group is 1/3
    assert score(truth, [GOOD, half])["cityscapes"]["AP50"] < 1
    most = result((30, 29, 50, 40), 0.9)  # 10/11 in it: ignored up to 0.9, wrong at 0.95
    assert score(truth, [GOOD, most])["cityscapes"]["AP50"] == 1
    assert 0.9 < ap(truth, [GOOD, most]) < 1


def test_classes_without_objects_do_not_lower_the_mean(truth_of):
    truth = truth_of(with_car())
    figures = score(truth, [GOOD, result((0, 0, 9, 9), 0.9, PERSON)])["cityscapes"]
    assert figures["per_class"]["person"] is None
    assert figures["AP"] == 1
    assert score(truth_of(scene()), [GOOD])["cityscapes"]["AP"] is None


def test_empty_masks_do_not_count(truth_of):
    truth = truth_of(with_car())
    assert ap(truth, [GOOD, result((0, 0, 0, 0), 0.9)]) == 1


def test_other_ground_truth_has_no_cityscapes_score(truth_of):
    truth = truth_of(with_car())
    truth["images"] = [{k: v for k, v in image.items() if k != "void"} for image in truth["images"]]
    assert score(truth, [GOOD]).keys() == {"segm", "bbox"}


def test_void_regions_are_validated_before_they_reach_c_code(truth_of):
    truth = truth_of(with_car())
    truth["images"][0]["void"] = {"size": list(SIZE), "counts": "11111"}
    with pytest.raises(DataError, match=r"void: .*\[rle-"):
        score(truth, [GOOD])


def test_the_table_has_a_line_for_cityscapes(truth_of):
    lines = format_table(score(truth_of(with_car()), [GOOD])).splitlines()
    assert next(line for line in lines if line.startswith("cityscapes ")).split()[1:3] == ["1.000", "1.000"]
    assert next(line for line in lines if line.startswith("car ")).split() == ["car", "1.000", "1.000", "1.000"]


def test_command_line_scores_folders_and_files(tmp_path):
    folder, predictions = str(REFERENCE / "gtFine" / "val"), str(REFERENCE / "predictions")
    out = tmp_path / "scores.json"
    done = CliRunner().invoke(
        main, ["evaluate", "--annotations", folder, "--predictions", predictions, "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["cityscapes"]["AP"] == pytest.approx(0.27816, abs=1e-4)
    truth, _ = cityscapes.to_coco(folder)
    (tmp_path / "results.json").write_text(json.dumps(cityscapes.read_results(predictions, truth)))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for annotations in (folder, str(tmp_path / "truth.json")):
        words = ["--annotations", annotations, "--predictions", str(tmp_path / "results.json"), "--json", str(out)]
        assert CliRunner().invoke(main, ["evaluate", *words]).exit_code == 0
        assert json.loads(out.read_text())["cityscapes"]["AP"] == pytest.approx(0.27816, abs=1e-4)
    words = ["--annotations", str(tmp_path / "truth.json"), "--predictions", predictions]
    assert CliRunner().invoke(main, ["evaluate", *words]).exit_code == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "expected `mask.png label score`"),
        ("a.png car 0.5", "expected `mask.png label score`"),
        ("a.png 26 nan", "expected a finite score"),
        ("../../a.png 26 0.5", "expected a mask inside"),
        ("none.png 26 0.5", "none.png: expected a readable file"),
        ("small.png 26 0.5", "expected a mask of 60 x 80 px, got 3 x 4"),
    ],
)
def test_invalid_results_are_refused_by_name(truth_of, tmp_path, line, said):
    from PIL import Image

    truth = truth_of(with_car())
    folder = tmp_path / "results"
    folder.mkdir()
    with pytest.raises(
        DataError, match=r"expected a list bonn_000000_000019\*\.txt, got none; .* \[cityscapes-results\]"
    ):
        cityscapes.read_results(str(folder), truth)
    Image.new("L", (4, 3)).save(folder / "small.png")
    (folder / "bonn_000000_000019_pred.txt").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        cityscapes.read_results(str(folder), truth)
    assert said in str(caught.value)
    assert caught.value.rule == "cityscapes-results"


def test_results_of_labels_without_instances_are_ignored(truth_of, tmp_path):
    truth = truth_of(with_car())
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "bonn_000000_000019.txt").write_text("none.png 29 0.5\n")
    assert cityscapes.read_results(str(folder), truth) == []
