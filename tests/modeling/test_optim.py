"""Scaling a published schedule, learning rates by step, and the groups of the optimizer."""

import itertools
import json
import math

import pytest
import torch
from pydantic import ValidationError

from pais_ray.modeling.optim import (
    OptimConfig,
    ReferenceSchedule,
    Schedule,
    build_optimizer,
    lr_at,
    plan_schedule,
    set_lr,
)

REFERENCE = ReferenceSchedule(batch=16, lr=0.01, steps=220_000, warmup=1000, milestones=(160_000, 200_000))
SGD, ADAMW = OptimConfig(name="sgd"), OptimConfig(name="adamw")


def test_a_run_at_the_reference_batch_has_the_reference_schedule():
    plan = plan_schedule(SGD, REFERENCE, None, 16)
    assert (plan.lr, plan.steps, plan.warmup, plan.milestones) == (0.01, 220_000, 1000, (160_000, 200_000))


@pytest.mark.parametrize("images", [1, 4, 8, 32, 64])
def test_linear_scaling_keeps_lr_times_steps_and_the_number_of_images(images):
    plan = plan_schedule(SGD, REFERENCE, None, images)
    assert plan.lr * plan.steps == pytest.approx(REFERENCE.lr * REFERENCE.steps)
    assert plan.steps * images == REFERENCE.steps * REFERENCE.batch


def test_adamw_scales_the_learning_rate_with_the_square_root():
    assert plan_schedule(ADAMW, REFERENCE, None, 4).lr == pytest.approx(0.005)
    assert plan_schedule(ADAMW, REFERENCE, None, 4).steps == 880_000


@pytest.mark.parametrize(("images", "steps"), [(4, None), (64, None), (16, 2200), (3, 22_000)])
def test_milestones_keep_their_share_of_the_steps_and_the_warmup_its_number_of_images(images, steps):
    plan = plan_schedule(SGD, REFERENCE, steps, images)
    assert plan.warmup == min(round(1000 * 16 / images), plan.steps // 20)
    for scaled, published in zip(plan.milestones, REFERENCE.milestones, strict=True):
        assert scaled / plan.steps == pytest.approx(published / REFERENCE.steps, abs=0.51 / plan.steps)


@pytest.mark.parametrize("steps", [1, 20, 777, 1_000_000])
def test_explicit_steps_are_exact_and_do_not_change_the_learning_rate(steps):
    plan = plan_schedule(SGD, REFERENCE, steps, 4)
    assert plan.steps == steps
    assert plan.lr == pytest.approx(0.0025)
    assert max(plan.milestones) <= steps


def test_an_explicit_learning_rate_is_not_scaled():
    assert plan_schedule(OptimConfig(lr=0.3), REFERENCE, None, 4).lr == 0.3


def test_explain_shows_the_derivation():
    text = plan_schedule(SGD, REFERENCE, None, 4).explain()
    assert (
        "images per step 4 (reference 16), learning rate 0.0025 (linear, reference 0.01), "
        "steps 880000 (reference 220000)" in text
    )
    assert "640000, 800000" in text
    given = plan_schedule(OptimConfig(lr=0.3), REFERENCE, 20, 4).explain()
    assert "learning rate 0.3 (as given, reference 0.01), steps 20 (as given, reference 220000)" in given


def test_schedule_json_is_flat_and_is_read_back():
    plan = plan_schedule(SGD, REFERENCE, None, 4)
    tree = json.loads(json.dumps(plan.to_json()))
    assert tree == {
        "lr": 0.0025,
        "steps": 880_000,
        "warmup": 4000,
        "milestones": [640_000, 800_000],
        "kind": "multistep",
        "warmup_ratio": 0.001,
        "gamma": 0.1,
        "images_per_step": 4,
        "scale": 0.25,
        "rule": "linear",
        "lr_given": False,
        "steps_given": False,
        "reference_batch": 16,
        "reference_lr": 0.01,
        "reference_steps": 220_000,
    }
    read = Schedule.from_json(tree)
    assert read == plan
    assert read.origin == plan.origin


def test_schedules_are_equal_if_they_give_the_same_run():
    scaled, given = (plan_schedule(optim, REFERENCE, None, 4) for optim in (SGD, OptimConfig(lr=0.0025)))
    assert scaled == given
    assert scaled.explain() != given.explain()
    assert scaled != plan_schedule(OptimConfig(lr=0.003), REFERENCE, None, 4)
    assert scaled != plan_schedule(SGD, REFERENCE, None, 8)


def test_multistep_learning_rate():
    plan = plan_schedule(SGD, REFERENCE, None, 16)
    assert lr_at(plan, 0) == pytest.approx(0.01 * 0.001)
    assert lr_at(plan, 500) == pytest.approx(0.01 * (0.001 + 0.999 / 2))
    assert lr_at(plan, 1000) == 0.01
    assert lr_at(plan, 159_999) == 0.01
    assert lr_at(plan, 160_000) == pytest.approx(0.001)
    assert lr_at(plan, 200_000) == pytest.approx(0.0001)


def test_cosine_and_constant_learning_rate():
    cosine = plan_schedule(OptimConfig(schedule="cosine"), REFERENCE, 22_000, 16)
    assert lr_at(cosine, cosine.warmup) == pytest.approx(0.01)
    assert lr_at(cosine, (22_000 + cosine.warmup) // 2) == pytest.approx(0.005)
    assert lr_at(cosine, 22_000) == pytest.approx(0.0)
    constant = plan_schedule(OptimConfig(schedule="constant"), REFERENCE, None, 16)
    assert {lr_at(constant, s) for s in (1000, 100_000, 219_999)} == {0.01}


@pytest.mark.parametrize("kind", ["multistep", "cosine", "constant"])
def test_learning_rate_rises_during_the_warmup_and_never_afterwards(kind):
    plan = plan_schedule(OptimConfig(schedule=kind), REFERENCE, 2200, 16)
    rates = [lr_at(plan, s) for s in range(2200)]
    assert all(a < b for a, b in itertools.pairwise(rates[: plan.warmup + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[plan.warmup :]))
    assert all(math.isfinite(r) and r >= 0 for r in rates)


def named_parameters():
    shapes = {"backbone.body.w": (2, 2), "backbone.body.b": (2,), "backbone.fpn.w": (2, 2), "head.w": (2, 2)}
    named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    named["head.frozen"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    return named


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_parameter_groups_follow_names_and_shapes(name):
    named = named_parameters()
    optim = OptimConfig(name=name, backbone_lr_factor=0.25, decay_norms_and_biases=False, weight_decay=0.05)
    plan = plan_schedule(optim, REFERENCE, None, 16)
    optimizer = build_optimizer(named.items(), optim, plan)
    assert set_lr(optimizer, plan, 5000) == plan.lr
    assert group_of(optimizer, named["backbone.body.w"])["lr"] == pytest.approx(0.25 * plan.lr)
    assert group_of(optimizer, named["backbone.fpn.w"])["lr"] == plan.lr
    assert group_of(optimizer, named["head.w"])["weight_decay"] == 0.05
    assert group_of(optimizer, named["backbone.body.b"])["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


def test_weight_decay_applies_to_all_parameters_by_default():
    named = named_parameters()
    optimizer = build_optimizer(named.items(), SGD, plan_schedule(SGD, REFERENCE, None, 16))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4]


def test_milestones_out_of_order_are_refused():
    with pytest.raises(ValidationError, match="milestones: expected ascending"):
        ReferenceSchedule(milestones=(200_000, 160_000))
    with pytest.raises(ValueError, match="at least 1 image"):
        plan_schedule(SGD, REFERENCE, None, 0)
