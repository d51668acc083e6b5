"""Quality of pseudo-labels for ground truth that is known by construction."""

import pytest
import torch

from pais_ray.evaluation.pseudo_labels import (
    calibration,
    class_counts,
    column,
    mask_iou,
    match,
    precision_recall,
    pseudo_label_table,
    threshold_grid,
)
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

SIZE = (40, 60)


def masks(*boxes):
    out = torch.zeros(len(boxes), *SIZE)
    for mask, (x1, y1, x2, y2) in zip(out, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    return Masks.full(out)


def targets(boxes, labels):
    return Targets.ground_truth(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=masks(*boxes),
    )


def predictions(boxes, labels, scores, ious=None):
    return Predictions(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        ious=torch.tensor(ious if ious is not None else [1.0] * len(scores)),
        masks=masks(*boxes),
    )


LEFT, RIGHT, HALF_LEFT = [0, 0, 20, 20], [30, 0, 50, 20], [0, 0, 20, 10]
TRUTH = targets([LEFT, RIGHT], [1, 2])


def test_mask_iou_is_computed_for_full_size_masks():
    iou = mask_iou(masks(LEFT, HALF_LEFT), TRUTH.masks, SIZE)
    assert torch.allclose(iou, torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    in_box = Masks.in_boxes(torch.ones(1, 28, 28), torch.tensor([[0.0, 0.0, 20.0, 20.0]]))
    assert mask_iou(in_box, TRUTH.masks, SIZE)[0, 0] == pytest.approx(1)
    assert mask_iou(masks([0, 0, 0, 0]), masks([0, 0, 0, 0]), SIZE).item() == 0


def test_matching_is_one_to_one_and_best_first():
    iou = torch.tensor([[0.6, 0.9], [0.7, 0.95], [0.8, 0.0], [0.0, 0.0]])
    assert match(iou).tolist() == [1, 0, -1, -1]
    assert match(iou, threshold=0.75).tolist() == [1, -1, 0, -1]
    assert match(iou, allowed=torch.tensor([[True, False]] * 4)).tolist() == [0, -1, -1, -1]
    assert match(torch.zeros(2, 0)).tolist() == [-1, -1]
    assert match(torch.zeros(1, 1), threshold=0).tolist() == [-1]


def test_the_table_distinguishes_duplicates_wrong_classes_and_misses():
    found = predictions(
        [HALF_LEFT, LEFT, RIGHT, [0, 30, 10, 40]], [1, 1, 1, 2], [0.5, 0.9, 0.8, 0.1], [0.4, 0.9, 0.7, 0.2]
    )
    rows = pseudo_label_table(found, TRUTH, SIZE, image_id=7)
    assert [row["score"] for row in rows] == pytest.approx([0.9, 0.8, 0.5, 0.1])
    assert [row["iou_predicted"] for row in rows] == pytest.approx([0.9, 0.7, 0.4, 0.2])
    assert [row["iou_true"] for row in rows] == pytest.approx([1, 1, 0.5, 0])
    assert [row["class_correct"] for row in rows] == [True, False, True, False]
    assert [row["matched"] for row in rows] == [True, False, False, False]
    assert {row["image_id"] for row in rows} == {7}


def test_images_without_ground_truth_or_predictions():
    nothing = targets([], [])
    rows = pseudo_label_table(predictions([LEFT], [1], [0.9]), nothing, SIZE)
    assert rows[0]["iou_true"] == 0
    assert not rows[0]["class_correct"]
    assert pseudo_label_table(predictions([], [], []), TRUTH, SIZE) == []
    assert precision_recall([nothing], [nothing], [SIZE])["precision"] is None
    assert precision_recall([nothing], [TRUTH], [SIZE])["recall"] == 0


def test_precision_and_recall_add_up_over_images():
    kept = [predictions([LEFT, RIGHT, LEFT], [1, 0, 1], [0.9, 0.8, 0.7]), targets([RIGHT], [2])]
    result = precision_recall(kept, [TRUTH, TRUTH], [SIZE, SIZE])
    assert result == {"kept": 4, "truth": 4, "correct": 2, "precision": 0.5, "recall": 0.5}
    assert precision_recall(kept, [TRUTH, TRUTH], [SIZE, SIZE], same_class=False)["correct"] == 3
    half = [targets([HALF_LEFT], [1])]
    assert precision_recall(half, [TRUTH], [SIZE], iou=0.5)["correct"] == 1
    assert precision_recall(half, [TRUTH], [SIZE], iou=0.6)["correct"] == 0


def test_calibration_of_a_perfect_and_of_a_constant_prediction():
    true = torch.linspace(0.05, 0.95, 50)
    perfect = calibration(true, true)
    assert perfect["pearson"] == pytest.approx(1)
    assert perfect["ece"] == pytest.approx(0, abs=1e-12)
    high = calibration(torch.full((4,), 1.0), torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert high["pearson"] is None
    assert high["ece"] == pytest.approx(0.5)
    assert high["bias"] == pytest.approx(0.5)
    assert high["bins"] == [{"low": 0.9, "count": 4, "predicted": 1.0, "true": pytest.approx(0.5)}]
    assert calibration(1 - true, true)["pearson"] == pytest.approx(-1)
    assert calibration(torch.zeros(0), torch.zeros(0))["ece"] is None
    with pytest.raises(ValueError, match="as many"):
        calibration(torch.zeros(1), torch.zeros(2))


def test_ece_weights_bins_by_their_count():
    predicted = torch.tensor([0.15, 0.15, 0.15, 0.95])
    true = torch.tensor([0.15, 0.15, 0.15, 0.55])
    assert calibration(predicted, true)["ece"] == pytest.approx(0.4 / 4)


def test_thresholds_are_strict_and_count_lost_instances():
    table = [
        {"score": 0.9, "iou_predicted": 0.9, "iou_true": 0.8, "matched": True},
        {"score": 0.5, "iou_predicted": 0.6, "iou_true": 0.9, "matched": True},
        {"score": 0.7, "iou_predicted": 0.2, "iou_true": 0.1, "matched": False},
    ]
    rows = {(row["tau_cls"], row["tau_iou"]): row for row in threshold_grid(table, [0.0, 0.5], [0.0, 0.3])}
    counts = {
        taus: tuple(row[name] for name in ("kept", "kept_good", "lost_good", "kept_matched"))
        for taus, row in rows.items()
    }
    assert counts == {
        (0, 0): (3, 2, 0, 2),
        (0, 0.3): (2, 2, 0, 2),
        (0.5, 0): (2, 1, 1, 1),
        (0.5, 0.3): (1, 1, 1, 1),
    }
    assert column(table, "matched").tolist() == [1, 1, 0]
    assert [row["kept"] for row in threshold_grid([], [0.5], [0.5])] == [0]


def test_class_counts():
    assert class_counts([TRUTH, targets([], []), TRUTH], 4).tolist() == [0, 2, 2, 0]
    assert class_counts([], 2).tolist() == [0, 0]
