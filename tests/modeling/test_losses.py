"""The weighted losses, each against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from pais_ray.modeling import losses

NORMALIZERS = ["mean", "pos", "pos_neg", "weight_sum"]


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 0, 3, 1, 0, 2, 0])
    weight = torch.tensor([0.5, 0.5, 0.9, 0.0, 0.5, 0.3, 0.5])
    return logits, labels, weight


def by_hand(logits, labels, weight, normalizer):
    """Sums in Python floats, one sample at a time."""
    pos = neg = num_pos = total_weight = 0.0
    for row, label, w in zip(logits.tolist(), labels.tolist(), weight.tolist(), strict=True):
        term = w * (math.log(sum(math.exp(v) for v in row)) - row[label])
        total_weight += w
        if label > 0:
            pos, num_pos = pos + term, num_pos + 1
        else:
            neg += term
    num = len(labels)
    return {
        "mean": (pos + neg) / num,
        "pos": (pos + neg) / num_pos,
        "pos_neg": pos / num_pos + neg / (num - num_pos),
        "weight_sum": (pos + neg) / total_weight,
    }[normalizer]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_cross_entropy_equals_the_formula(sample, normalizer):
    logits, labels, weight = sample
    value = losses.cross_entropy(logits, labels, weight, labels > 0, normalizer)
    assert value.item() == pytest.approx(by_hand(logits, labels, weight, normalizer), rel=1e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rows", [[], [0, 1], [2, 3, 5]], ids=["none", "negatives", "positives"])
def test_the_loss_is_finite_and_keeps_its_graph_without_positives_or_negatives(sample, normalizer, rows):
    logits, labels, weight = (v[rows] for v in sample)
    value = losses.cross_entropy(logits, labels, weight, labels > 0, normalizer)
    (gradient,) = torch.autograd.grad(value, sample[0])
    assert value.isfinite()
    assert gradient.isfinite().all()
    if normalizer == "pos" and not (labels > 0).any():
        assert value == 0
        assert (gradient == 0).all()
    if normalizer == "pos_neg" and len(rows):
        # One side is absent, so what remains is the other's plain mean.
        expected = (F.cross_entropy(logits, labels, reduction="none") * weight).mean()
        torch.testing.assert_close(value, expected)


def test_zero_weights_give_a_zero_loss(sample):
    logits, labels, weight = sample
    for normalizer in NORMALIZERS:
        assert losses.cross_entropy(logits, labels, weight * 0, labels > 0, normalizer) == 0


def test_an_unknown_normalizer_is_refused(sample):
    logits, labels, weight = sample
    with pytest.raises(ValueError, match="expected mean, pos"):
        losses.cross_entropy(logits, labels, weight, labels > 0, "median")


def test_binary_cross_entropy_has_one_weight_per_sample():
    generator = torch.Generator().manual_seed(1)
    logits, targets = (torch.rand(3, 4, 5, generator=generator) for _ in range(2))
    weight = torch.tensor([0.0, 1.0, 3.0])
    value = losses.binary_cross_entropy(logits, targets, weight, 6)
    each = [F.binary_cross_entropy_with_logits(a, b) for a, b in zip(logits, targets, strict=True)]
    torch.testing.assert_close(value, (each[1] + 3 * each[2]) / 6)


def test_binary_cross_entropy_of_scalars_equals_torch():
    logits, targets = torch.randn(5, generator=torch.Generator().manual_seed(2)), torch.ones(5)
    value = losses.binary_cross_entropy(logits, targets, torch.ones(5), 5)
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_box_regression_is_smooth_l1_summed_over_the_four_deltas(beta):
    deltas, targets = torch.tensor([[0.05, 1.0, 0.0, -2.0], [1.0, 1.0, 1.0, 1.0]]), torch.zeros(2, 4)
    value = losses.box_regression(deltas, targets, torch.tensor([2.0, 0.0]), 4, beta)
    small = 0.05 if beta == 0 else 0.5 * 0.05**2 / beta
    expected = 2 * (small + (1 - beta / 2) + (2 - beta / 2)) / 4
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_losses_without_samples_are_zero_and_keep_their_graph():
    masks = torch.zeros(0, 28, 28, requires_grad=True)
    ious = torch.zeros(0, requires_grad=True)
    boxes = torch.zeros(0, 4, requires_grad=True)
    total = (
        losses.binary_cross_entropy(masks, torch.zeros(0, 28, 28), torch.zeros(0), 0)
        + losses.mask_iou(ious, masks, torch.zeros(0, 28, 28))
        + losses.box_regression(boxes, torch.zeros(0, 4), torch.zeros(0), 0, 1 / 9)
    )
    total.backward()
    assert total == 0
    assert all(v.grad is not None for v in (masks, ious, boxes))


def test_mask_iou_target_is_the_iou_of_binarized_masks():
    logits = torch.full((3, 2, 4), -5.0)
    logits[:2, 0] = 5.0  # the upper half
    targets = torch.zeros(3, 2, 4)
    targets[0, :, :2] = 0.7  # the left half: 2 cells of 6 shared
    targets[1, 0] = 0.49  # below a half is nothing
    targets[2, 0, 0] = 1.0
    torch.testing.assert_close(losses.mask_iou_target(logits, targets), torch.tensor([2 / 6, 0.0, 0.0]))


def test_mask_iou_loss_has_a_gradient_only_for_the_iou_logits():
    mask_logits = torch.full((1, 2, 4), 5.0, requires_grad=True)
    iou_logits = torch.zeros(1, requires_grad=True)
    targets = torch.ones(1, 2, 4)
    targets[0, 0, :2] = 0  # IoU 6 / 8
    losses.mask_iou(iou_logits, mask_logits, targets).backward()
    assert mask_logits.grad is None
    torch.testing.assert_close(iou_logits.grad, torch.tensor([0.5 - 0.75]))


def focal_by_hand(row, label):
    total = 0.0
    for c, v in enumerate(row):
        p = 1 / (1 + math.exp(-v))
        total += -0.25 * (1 - p) ** 2 * math.log(p) if c == label else -0.75 * p**2 * math.log(1 - p)
    return total


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_focal_equals_the_formula(normalizer):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.tensor([3, 0, 2, 3, 1, 3]), torch.tensor([0.5, 0.9, 0.1, 0.5, 0.3, 0.5])
    terms = [w * focal_by_hand(r, y) for r, y, w in zip(logits.tolist(), labels, weight.tolist(), strict=True)]
    pos, neg = sum(terms[i] for i in (1, 2, 4)), sum(terms[i] for i in (0, 3, 5))
    expected = {
        "mean": (pos + neg) / 3,  # K-Net's own: per positive
        "pos": (pos + neg) / 3,
        "pos_neg": pos / 3 + neg / 3,
        "weight_sum": (pos + neg) / 2.8,
    }[normalizer]
    assert losses.focal(logits, labels, weight, normalizer).item() == pytest.approx(expected, rel=1e-5)


def test_focal_without_positives_keeps_the_background_term():
    """Released K-Net: the number of positives is at least one."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    background, weight = torch.full((4,), 3), torch.full((4,), 0.1225)
    expected = 0.1225 * sum(focal_by_hand(row, 3) for row in logits.tolist())
    assert losses.focal(logits, background, weight, "pos").item() == pytest.approx(expected, rel=1e-5)


def test_dice_equals_its_definition():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted, weight = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 0.5, 0.0])
    expected = 0.0
    for own, truth, w in zip(logits.flatten(1).tolist(), wanted.flatten(1).tolist(), weight.tolist(), strict=True):
        soft = [1 / (1 + math.exp(-v)) for v in own]
        dot = sum(a * b for a, b in zip(soft, truth, strict=True))
        squares = sum(a * a for a in soft) + 1e-3 + sum(b * b for b in truth) + 1e-3
        expected += w * (1 - 2 * dot / squares) / 3
    assert losses.dice(logits, wanted, weight, 3).item() == pytest.approx(expected, rel=1e-5)


def test_dice_loss_of_a_perfect_mask_is_close_to_zero():
    wanted = (torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert losses.dice(60 * (wanted - 0.5), wanted, torch.ones(2), 2).item() == pytest.approx(0, abs=1e-3)
    assert losses.dice(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4), torch.zeros(0), 0) == 0


def test_semantic_loss_is_divided_by_the_pixels_with_a_class():
    logits = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    truth = torch.zeros(1, 2, 2, 2)
    truth[0, 1, 0] = 1  # two pixels of class 1
    cells = [(logits[0, :, y, x].tolist(), 1 if y == 0 else 2) for y in range(2) for x in range(2)]
    expected = sum(focal_by_hand(row, label) for row, label in cells) / 2
    assert losses.semantic(logits, truth).item() == pytest.approx(expected, rel=1e-5)
