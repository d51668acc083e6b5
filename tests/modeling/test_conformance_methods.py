"""The contract of methods, for every file of pais_ray/modeling/methods."""

import dataclasses
import math

import pytest
import torch
from pydantic import BaseModel, ValidationError

from pais_ray.modeling import registry
from pais_ray.structures.batch import Predictions
from pais_ray.structures.masks import Masks

WEIGHTS = ("class_weight", "box_weight", "mask_weight", "proposal_weight")
every_method = pytest.mark.parametrize("method", [registry.method(n)() for n in registry.method_names()], ids=repr)


def predictions(num):
    generator = torch.Generator().manual_seed(num)
    boxes = torch.tensor([[1.0, 2.0, 9.0, 12.0]]).repeat(num, 1)
    return Predictions(
        boxes=boxes,
        labels=torch.arange(num),
        scores=torch.rand(num, generator=generator),
        ious=torch.rand(num, generator=generator),
        masks=Masks.in_boxes(torch.rand(num, 28, 28, generator=generator), boxes),
    )


@every_method
def test_a_method_is_a_frozen_model_of_its_settings(method):
    assert isinstance(method, BaseModel)
    assert method.name in registry.method_names()
    assert type(method).model_validate_json(method.model_dump_json()) == method
    with pytest.raises(ValidationError):
        method.name = "another"
    with pytest.raises(ValidationError, match="no_such"):
        type(method)(no_such=1)


@every_method
def test_every_setting_has_a_description(method):
    unexplained = [n for n, f in type(method).model_fields.items() if n != "name" and not f.description]
    assert unexplained == []


@every_method
def test_weights_and_decay_are_bounded_at_every_step(method):
    for step in (0, 1, 7, 1000, 10**7):
        assert 0 <= method.decay(step) <= 1
        for weight in (method.labeled_weight(step), method.unlabeled_weight(step)):
            assert math.isfinite(weight)
            assert weight >= 0
        if not method.uses_unlabeled:
            assert method.unlabeled_weight(step) == 0
    assert method.decay(0) == 0, "the first teacher is the student"
    assert 0 <= method.score_threshold <= 1
    assert all(v >= 0 for v in {**method.labeled_weights, **method.unlabeled_weights}.values())


@every_method
@pytest.mark.parametrize("num", [0, 1, 40])
def test_pseudo_labels_are_targets_with_finite_weights(method, num):
    targets = method.pseudo_labels(predictions(num))
    assert len(targets) <= num
    for name in WEIGHTS:
        weight = getattr(targets, name)
        assert weight.shape == (len(targets),)
        assert torch.isfinite(weight).all()
        assert (weight >= 0).all()
    assert len(targets[torch.zeros(len(targets), dtype=torch.bool)]) == 0


@every_method
def test_predictions_at_or_below_the_score_threshold_are_not_kept(method):
    found = predictions(40)
    dropped = found[found.scores > method.score_threshold]
    one, other = method.pseudo_labels(found), method.pseudo_labels(dropped)
    for field in dataclasses.fields(one):
        if isinstance(getattr(one, field.name), torch.Tensor):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name))
