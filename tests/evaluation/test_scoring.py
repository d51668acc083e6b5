"""The contract of evaluators: a new metric is one file in ``evaluators/`` or one more pair."""

import math
import textwrap

import pytest

from pais_ray.evaluation import evaluators, scoring


@pytest.fixture
def truth():
    image = {"id": 1, "height": 4, "width": 4}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 0}
    annotation["segmentation"] = {"size": [4, 4], "counts": [0, 2, 2, 2, 10]}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": [image], "categories": categories, "annotations": [annotation]}


@pytest.fixture
def results(truth):
    return [truth["annotations"][0] | {"score": 0.5}]


def test_training_logs_metrics_by_evaluator_and_classes_of_masks_only(truth, results):
    metrics = scoring.score_metrics(truth, results)
    for name in ("segm_AP", "bbox_AP50", "segm_AP_class/cat"):
        assert metrics[name] == pytest.approx(1)
    assert math.isnan(metrics["segm_AP_class/dog"])
    assert "segm_APl" not in metrics, "there is no large object"
    assert {name for name in metrics if "/" in name} == {"segm_AP_class/cat", "segm_AP_class/dog"}
    assert {name.partition("_")[0] for name in metrics} == {"segm", "bbox"}


def test_a_file_adds_an_evaluator_to_scores_log_and_table(truth, results, tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(
        textwrap.dedent(
            """
            class Counting:
                name, needs_masks = "count", False

                def supports(self, truth):
                    return len(truth["images"]) == 1

                def evaluate(self, truth, results):
                    yield "ratio", len(results) / len(truth["annotations"])
                    yield "results", len(results)

            EVALUATORS = (Counting(),)
            """
        )
    )
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(tmp_path)])
    scoring.list_evaluators.cache_clear()
    try:
        scores = scoring.score(truth, results)
        assert list(scores) == ["segm", "bbox", "count"]
        assert scores["count"] == {"ratio": 1.0, "results": len(results), "per_class": {}}
        logged = scoring.score_metrics(truth, results)
        assert (logged["count_ratio"], logged["count_results"]) == (1.0, len(results)), "integers are logged, too"
        assert "ratio" in scoring.format_table(scores)
        assert list(scoring.score(truth, results, ["count"])) == ["count"]
    finally:
        scoring.list_evaluators.cache_clear()


def test_an_unknown_evaluator_is_named(truth):
    with pytest.raises(ValueError, match="expected some of segm, bbox, cityscapes, got 'panoptic'"):
        scoring.score(truth, [], ["panoptic"])
