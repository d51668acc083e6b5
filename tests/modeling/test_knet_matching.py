"""Matching, against its formula and against every permutation."""

import itertools
import math

import pytest
import torch

from pais_ray.modeling.segmentors._knet_matching import assign, class_cost, mask_costs, matching_cost

WEIGHTS = (2.0, 4.0, 1.0)  # class, dice, agreement: released K-Net


def scene(num_kernels=5, counts=(3, 2), num_classes=4, pixels=17, seed=0):
    g = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts)
    classes = torch.randn(images, num_kernels, num_classes, generator=g)
    masks = 2 * torch.randn(images, num_kernels, pixels, generator=g)
    labels = torch.randint(0, num_classes, (images, most), generator=g)
    wanted = torch.rand(images, most, pixels, generator=g)
    return classes, masks, labels, wanted


def by_hand(class_logits, mask_logits, label, wanted):
    """The cost of one kernel and one target, in Python floats."""
    p = 1 / (1 + math.exp(-class_logits[label]))
    focal = -math.log(p) * 0.25 * (1 - p) ** 2 + math.log(1 - p) * 0.75 * p**2
    soft = [1 / (1 + math.exp(-v)) for v in mask_logits]
    dot = sum(a * b for a, b in zip(soft, wanted, strict=True))
    squares = sum(a * a for a in soft) + 1e-3 + sum(b * b for b in wanted) + 1e-3
    agreement = sum(a * b + (1 - a) * (1 - b) for a, b in zip(soft, wanted, strict=True)) / len(soft)
    return 2.0 * focal + 4.0 * -(2 * dot / squares) + 1.0 * -agreement


def test_matching_cost_equals_the_formula():
    classes, masks, labels, wanted = scene()
    found = matching_cost(classes, masks, labels, wanted, WEIGHTS)
    for b, n, m in itertools.product(range(2), range(5), range(3)):
        expected = by_hand(classes[b, n].tolist(), masks[b, n].tolist(), labels[b, m].item(), wanted[b, m].tolist())
        assert found[b, n, m].item() == pytest.approx(expected, rel=1e-4), (b, n, m)


def test_without_class_logits_there_is_no_class_cost():
    classes, masks, labels, wanted = scene()
    difference = matching_cost(classes, masks, labels, wanted, WEIGHTS) - matching_cost(
        None, masks, labels, wanted, WEIGHTS
    )
    torch.testing.assert_close(difference, 2 * class_cost(classes, labels))


def test_a_perfect_mask_has_the_lowest_cost():
    wanted = (torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    dice, agreement = mask_costs(40 * (wanted - 0.5), wanted)
    assert dice.item() == pytest.approx(-1, abs=1e-3)
    assert agreement.item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_costs_stay_in_fp32_under_autocast(precision):
    classes, masks, labels, wanted = scene(pixels=4000)
    expected = matching_cost(classes, masks, labels, wanted, WEIGHTS)
    with torch.autocast("cpu", dtype=precision):
        found = matching_cost(classes, masks, labels, wanted, WEIGHTS)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_the_best_of_all_permutations(seed):
    counts = [(seed * 7) % 6, 1 + seed % 4]
    costs = torch.randn(2, 6, max(counts), generator=torch.Generator().manual_seed(seed))
    (match,) = assign([costs], counts)
    start = 0
    for b, count in enumerate(counts):
        mine = match.image == b
        kernels, targets = match.kernel[mine], match.target[mine] - start
        start += count
        assert sorted(targets.tolist()) == list(range(count)), "every target once"
        assert len(set(kernels.tolist())) == count, "no kernel twice"
        ways = itertools.permutations(range(6), count)
        best = min(sum(costs[b, k, t].item() for t, k in enumerate(chosen)) for chosen in ways)
        assert costs[b, kernels, targets].sum().item() == pytest.approx(best, abs=1e-5)


def test_several_costs_give_several_matchings():
    first, second = torch.tensor([[[0.0, 9], [9, 0]]]), torch.tensor([[[9.0, 0], [0, 9]]])
    one, two = assign([first, second], [2])
    assert one.kernel[one.target.argsort()].tolist() == [0, 1]
    assert two.kernel[two.target.argsort()].tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_iou_term_of_eq_4_changes_no_assignment(seed):
    """Eq. 4 subtracts s_i, a constant of pseudo-label i."""
    classes, masks, labels, wanted = scene(num_kernels=9, seed=seed)
    plain = matching_cost(classes, masks, labels, wanted, WEIGHTS)
    ious = torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(seed))
    (without,), (with_it,) = assign([plain], [3, 2]), assign([plain - 10 * ious], [3, 2])
    assert torch.equal(without.kernel, with_it.kernel)
    assert torch.equal(without.target, with_it.target)


def test_more_targets_than_kernels_leave_some_unmatched():
    (match,) = assign([torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))], [5])
    assert len(match) == 2
    assert len(set(match.target.tolist())) == 2


def test_images_without_targets_have_no_pairs():
    (match,) = assign([torch.zeros(2, 4, 0)], [0, 0])
    assert len(match) == 0
    assert match.kernel.dtype == torch.long


def test_costs_that_are_not_finite_do_not_stop_the_solver():
    costs = torch.full((1, 3, 2), float("nan"))
    costs[0, 1] = torch.tensor([float("inf"), 0.0])
    (match,) = assign([costs], [2])
    assert len(match) == 2
    assert match.kernel[match.target == 1].item() == 1
