"""The contract of segmentors, for every public file of ``pais_ray/modeling/segmentors``.

A new segmentor is one file with one ``nn.Module`` class, whose ``Config`` knows the preset `nano`; it is
tested by being there.
"""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import pais_ray.modeling.segmentors
from pais_ray.structures.batch import Targets, Views
from pais_ray.structures.masks import Masks

VOCABULARY = {"class", "box", "mask", "mask_iou", "objectness", "proposal_box", "semantic"}
WEIGHTED = {"class", "box", "mask"}
NAMES = [m.name for m in pkgutil.iter_modules(pais_ray.modeling.segmentors.__path__) if not m.name.startswith("_")]
NUM_CLASSES = 3
HEIGHT, WIDTH = 64, 96
VALID = torch.tensor([[64, 96], [50, 70]])


def build(name):
    module = importlib.import_module(f"pais_ray.modeling.segmentors.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{name}.py: expected one public network, found {found}"
    torch.manual_seed(0)
    return found[0](NUM_CLASSES, found[0].Config(preset="nano"))


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    return build(request.param).train()


@pytest.fixture(scope="module")
def views():
    plain = Views.of(torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)))
    return dataclasses.replace(plain, sizes=VALID)


@pytest.fixture(scope="module")
def found(network, views):
    return network.predict(views)


def rectangles(boxes, labels, **weights):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1  # the left half of the box
    labels = torch.tensor(labels, dtype=torch.long)
    return dataclasses.replace(Targets.ground_truth(boxes=boxes, labels=labels, masks=Masks.full(masks)), **weights)


def scene(first=1.0, second=1.0, negative=1.0, normalizer="mean"):
    """Two instances in the first image and one in the second; each of the first has a weight of its own."""
    pair, one = torch.tensor([first, second]), torch.tensor([first])

    def weights(w):
        return {"class_weight": w, "box_weight": w, "mask_weight": w}

    shared = {"negative_weight": negative, "normalizer": normalizer}
    return [
        rectangles([[4, 4, 40, 44], [50, 10, 92, 60]], [0, 2], **weights(pair), **shared),
        rectangles([[10, 6, 60, 46]], [1], **weights(one), **shared),
    ]


def nothing():
    return rectangles([], [])


def run(network, views, targets, seed=3):
    torch.manual_seed(seed)  # sampling inside a network draws from the global stream, as torchvision's does
    return network(views, targets)


def values(losses):
    return {k: v.item() for k, v in losses.items()}


def test_losses_are_named_scalars(network, views):
    losses = run(network, views, scene())
    assert set(losses) <= VOCABULARY
    assert {"class", "mask"} <= set(losses)
    assert all(v.ndim == 0 and v.isfinite() and v.requires_grad for v in losses.values())


def test_plain_tensors_are_accepted_as_views_without_padding(network, views):
    images = views.images[:1]
    assert values(run(network, images, scene()[:1])) == values(run(network, Views.of(images), scene()[:1]))


def test_losses_do_not_depend_on_the_mode(network, views):
    training = values(run(network, views, scene()))
    assert values(run(network.eval(), views, scene())) == training
    network.train()


def test_a_weight_affects_only_its_own_instance(network, views):
    """Under `mean` the losses are linear: the parts of the first, the second and the background add up."""
    whole = values(run(network, views, scene()))
    first = values(run(network, views, scene(first=1, second=0, negative=0)))
    second = values(run(network, views, scene(first=0, second=1, negative=0)))
    background = values(run(network, views, scene(first=0, second=0, negative=1)))
    for name in WEIGHTED & set(whole):
        assert first[name] > 0
        assert second[name] > 0
        total = first[name] + second[name] + background[name]
        assert whole[name] == pytest.approx(total, rel=1e-5), name
        if name != "class":
            assert background[name] == 0, name


@pytest.mark.parametrize("normalizer", ["mean", "pos", "pos_neg"])
def test_losses_are_linear_in_the_weights(network, views, normalizer):
    once = values(run(network, views, scene(0.3, 0.8, 0.5, normalizer)))
    twice = values(run(network, views, scene(0.6, 1.6, 1.0, normalizer)))
    for name in once:
        assert twice[name] == pytest.approx((1 + (name in WEIGHTED)) * once[name], rel=1e-5), name


def test_weight_sum_makes_the_class_loss_independent_of_the_scale_of_the_weights(network, views):
    once = values(run(network, views, scene(0.3, 0.8, 0.5, "weight_sum")))
    twice = values(run(network, views, scene(0.6, 1.6, 1.0, "weight_sum")))
    assert twice["class"] == pytest.approx(once["class"], rel=1e-5)


def test_pos_neg_averages_background_separately(network, views):
    """What the background adds under `pos_neg` does not depend on the positives' weights."""

    def added(first, second):
        with_it = values(run(network, views, scene(first, second, 1.0, "pos_neg")))
        without = values(run(network, views, scene(first, second, 0.0, "pos_neg")))
        return with_it["class"] - without["class"]

    # Differences of losses near 5 in fp32: the absolute part is their rounding.
    assert added(1.0, 1.0) == pytest.approx(added(0.1, 5.0), rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(
    ("case", "normalizer"),
    [
        *[("none", n) for n in ("mean", "pos", "pos_neg", "weight_sum")],
        *[(c, "pos_neg") for c in ("second_empty", "first_empty", "no_proposal", "weightless")],
    ],
)
def test_every_parameter_gets_a_gradient(network, views, case, normalizer):
    full = scene()
    targets = {
        "none": [nothing(), nothing()],
        "second_empty": [full[0], nothing()],
        "first_empty": [nothing(), full[1]],
        "no_proposal": [dataclasses.replace(t, proposal_weight=torch.zeros(len(t))) for t in full],
        "weightless": scene(0, 0, 0),
    }[case]
    targets = [dataclasses.replace(t, normalizer=normalizer) for t in targets]
    network.zero_grad(set_to_none=True)
    losses = run(network, views, targets)
    assert all(v.isfinite() for v in losses.values()), values(losses)
    sum(losses.values()).backward()
    missing = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    wrong = [n for n, p in network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert wrong == []


def test_half_precision_changes_the_losses_little(network, views):
    exact = values(run(network, views, scene()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(network, views, scene())
        halved = values(losses)
        predictions = network.predict(views)
    assert all(v.dtype == torch.float32 for v in losses.values())
    # Sampling and matching may pick others where two are nearly alike.
    assert sum(halved.values()) == pytest.approx(sum(exact.values()), rel=0.1)
    for found in predictions:
        assert found.scores.dtype == found.boxes.dtype == found.masks.affine.dtype == torch.float32
        assert (found.scores.diff() <= 0).all()


def test_losses_have_the_same_names_whatever_the_targets(network, views):
    assert set(run(network, views, [nothing(), nothing()])) == set(run(network, views, scene()))


def test_targets_with_different_normalizers_are_refused(network, views):
    targets = [scene()[0], scene(normalizer="pos")[1]]
    with pytest.raises(ValueError, match="normalizer"):
        network(views, targets)


def test_a_wrong_number_of_targets_is_refused(network, views):
    with pytest.raises(ValueError, match="expected 2 targets"):
        network(views, scene()[:1])


def test_predictions_are_ordered_bounded_and_inside_the_valid_view(found):
    assert len(found) == 2
    for predictions, (height, width) in zip(found, VALID.tolist(), strict=True):
        assert len(predictions) > 0, "an untrained network sees something above its threshold"
        scores, ious, boxes = predictions.scores, predictions.ious, predictions.boxes
        assert ((scores >= 0) & (scores <= 1)).all()
        assert ((ious >= 0) & (ious <= 1)).all()
        assert (scores.diff() <= 0).all()
        assert predictions.labels.dtype == torch.long
        assert ((predictions.labels >= 0) & (predictions.labels < NUM_CLASSES)).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        soft = predictions.masks.grids
        assert len(soft) == len(predictions)
        assert ((soft >= 0) & (soft <= 1)).all()
        assert not any(v.requires_grad for v in (scores, ious, boxes, soft))


def test_predictions_do_not_depend_on_the_mode(network, views, found):
    evaluating = network.eval().predict(views)
    assert network.training is False
    network.train()
    for a, b in zip(found, evaluating, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.ious, b.ious)


def test_a_threshold_drops_detections_and_keeps_the_others_unchanged(network, views, found):
    bar = found[0].scores[len(found[0]) // 3].item()
    for some, full in zip(network.predict(views, score_threshold=bar), found, strict=True):
        expected = full[full.scores >= bar]
        assert len(some) == len(expected)
        assert torch.equal(some.boxes, expected.boxes)
        torch.testing.assert_close(some.masks.grids, expected.masks.grids)
        torch.testing.assert_close(some.ious, expected.ious)


def test_finite_is_false_even_if_a_threshold_drops_the_detections(network, views, found):
    """A teacher that overflows would else propose nothing, and nobody would see why."""
    assert all(bool(p.finite) for p in found)
    images = views.images.clone()
    images[:, :, :32] = torch.inf
    lost = network.predict(dataclasses.replace(views, images=images), score_threshold=0.05)
    assert len(lost) == len(found)
    assert not any(bool(p.finite) for p in lost)
    assert not any(bool(p[:0].to("cpu").finite) for p in lost)


def test_an_image_without_detections_has_empty_predictions(network, views):
    for predictions in network.predict(views, score_threshold=1.0):
        assert len(predictions) == 0
        assert predictions.masks.paste((HEIGHT, WIDTH)).shape == (0, HEIGHT, WIDTH)
