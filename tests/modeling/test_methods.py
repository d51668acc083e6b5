"""The methods: kept predictions, weights of the pseudo-labels, teacher decay."""

import pytest
import torch
from pydantic import ValidationError

from pais_ray.modeling.methods.pais import PAIS
from pais_ray.modeling.methods.supervised import Supervised
from pais_ray.structures.batch import Predictions
from pais_ray.structures.masks import Masks
from tests.support.paper import PAPER

SCORES = torch.tensor([0.95, 0.80, 0.60, 0.36, 0.35, 0.20])
IOUS = torch.tensor([0.90, 0.31, 0.30, 0.50, 0.80, 0.95])


def predictions(scores=SCORES, ious=IOUS):
    num = len(scores)
    corner = torch.arange(num, dtype=torch.float32)[:, None]
    boxes = torch.cat([corner, corner, corner + 4, corner + 5], dim=1)
    masks = Masks.in_boxes(torch.rand(num, 7, 7, generator=torch.Generator().manual_seed(0)), boxes)
    return Predictions(boxes=boxes, labels=torch.arange(num), scores=scores, ious=ious, masks=masks)


def test_defaults_are_the_constants_of_the_paper_for_mask_rcnn():
    expected = {
        name.removeprefix("method."): value
        for name, value in PAPER["mask_rcnn"].items()
        if name.startswith("method.") and name.count(".") == 1
    }
    assert {name: getattr(PAIS(), name) for name in expected} == expected


def test_predictions_above_both_thresholds_are_kept():
    targets = PAIS().pseudo_labels(predictions())
    assert targets.labels.tolist() == [0, 1, 3]  # 2 fails tau_iou, 4 tau_cls (equal is not over), 5 tau_cls
    assert torch.equal(targets.boxes, predictions().boxes[[0, 1, 3]])
    assert torch.equal(targets.masks.grids, predictions().masks.grids[[0, 1, 3]])


def test_weights_equal_eq_5():
    targets = PAIS(alpha=4, beta=2).pseudo_labels(predictions())
    torch.testing.assert_close(targets.class_weight, torch.tensor([0.95**4, 0.80**4, 0.36**4]))
    torch.testing.assert_close(targets.mask_weight, torch.tensor([0.90**2, 0.31**2, 0.50**2]))
    assert targets.box_weight.tolist() == [1, 1, 1]
    assert (targets.normalizer, targets.negative_weight) == ("pos_neg", 1.0)


def test_without_daloss_every_weight_is_exactly_one():
    targets = PAIS(alpha=0, beta=0).pseudo_labels(predictions())
    for weight in (targets.class_weight, targets.box_weight, targets.mask_weight, targets.proposal_weight):
        assert weight.tolist() == [1.0, 1.0, 1.0]


def test_released_knet_weights():
    knet = PAIS(class_scale=12, class_cap=0.5, mask_scale=2.5, negative_weight=0.1225, normalizer="pos")
    targets = knet.pseudo_labels(predictions())
    torch.testing.assert_close(targets.class_weight, torch.tensor([0.75, 0.75, 12 * 0.36**4]))
    torch.testing.assert_close(targets.mask_weight, 2.5 * torch.tensor([0.9, 0.31, 0.5]) ** 4)
    assert (targets.normalizer, targets.negative_weight) == ("pos", 0.1225)


def test_tau_proposal_keeps_boxes_out_of_the_proposal_loss():
    assert PAIS(tau_proposal=0.7).pseudo_labels(predictions()).proposal_weight.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("method", [PAIS(tau_cls=0.0, tau_iou=0.0), Supervised()])
def test_targets_have_no_gradient(method):
    scores, ious = SCORES.clone().requires_grad_(), IOUS.clone().requires_grad_()
    found = predictions(scores, ious)
    found.masks.grids.requires_grad_()
    found.boxes.requires_grad_()
    targets = method.pseudo_labels(found)
    tensors = [
        targets.boxes,
        targets.masks.grids,
        targets.class_weight,
        targets.mask_weight,
        targets.proposal_weight,
    ]
    assert not any(t.requires_grad for t in tensors)


def test_half_precision_scores_give_float32_weights():
    found = predictions(SCORES.half(), IOUS.half())
    assert PAIS().pseudo_labels(found).mask_weight.dtype == torch.float32


def test_the_teacher_is_the_running_mean_until_the_decay_reaches_ema():
    pais = PAIS(ema=0.9)
    assert [pais.decay(k) for k in range(3)] == [0.0, 0.5, pytest.approx(2 / 3)]
    assert pais.decay(9) == pytest.approx(0.9)
    assert pais.decay(10_000) == 0.9
    mean = 0.0
    for k, value in enumerate((3.0, 5.0, 10.0)):
        mean = pais.decay(k) * mean + (1 - pais.decay(k)) * value
    assert mean == pytest.approx(6.0)


def test_the_burn_in_has_no_unlabeled_term_and_the_mean_starts_after_it():
    pais = PAIS(burn_in=10, lambda_unlabeled=0.3)
    assert [pais.unlabeled_weight(k) for k in (0, 9, 10, 500)] == [0.0, 0.0, 0.3, 0.3]
    assert [pais.decay(k) for k in (0, 9, 10, 11)] == [0.0, 0.0, 0.0, 0.5]


def test_mask_iou_and_semantic_losses_are_off_on_unlabeled_images():
    off = {"mask_iou": 0.0, "semantic": 0.0}
    assert PAIS().unlabeled_weights == off
    assert PAIS(unlabeled_weights={"mask": 2.0}).unlabeled_weights == {**off, "mask": 2.0}
    assert PAIS(unlabeled_weights={"mask_iou": 1.0}).unlabeled_weights == {"mask_iou": 1.0, "semantic": 0.0}
    assert "mask_iou" not in PAIS().labeled_weights


def test_supervised_does_not_use_unlabeled_images():
    supervised = Supervised()
    assert not supervised.uses_unlabeled
    assert supervised.unlabeled_weight(0) == 0.0
    assert len(supervised.pseudo_labels(predictions())) == 0
    assert [supervised.decay(k) for k in (0, 1, 100_000)] == [0.0, 0.5, 0.999]


@pytest.mark.parametrize(
    "wrong",
    [
        {"alhpa": 1},
        {"tau_cls": 1.5},
        {"alpha": -1},
        {"lambda_unlabeled": None},
        {"normalizer": "sum"},
        {"ema": 2},
    ],
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PAIS(**wrong)
