"""The batches of a run in one process: those of the plan, trained on without Ray."""

import pytest
import torch

from pais_ray.config.tree import compose, rows_per_step, run_schedule
from pais_ray.runs.batches import local_batches, step_plan
from pais_ray.runs.prepare import prepare
from pais_ray.train.state import build_state
from pais_ray.train.step import StepSettings, train_step


@pytest.fixture
def config(tiny_coco, tmp_path):
    return compose(
        [
            *("synthetic", "mask_rcnn", "pais", "data.image_size=64", "data.labeled=0.25", "segmentor.weights=null"),
            *(f"data.train={tiny_coco}/train.json", f"data.val={tiny_coco}/val.json"),
            *(f"data.images={tiny_coco}/images", f"run.storage_path={tmp_path}", "segmentor.preset=nano"),
            *("train.steps=6", "method.burn_in=2", "scaling.num_workers=2"),
        ]
    )


def test_every_step_has_the_rows_of_the_plan_and_no_unlabeled_images_during_the_burn_in(config):
    schedule = run_schedule(config)
    config, data = prepare(config)
    plan, rows = step_plan(config, data, schedule), rows_per_step(schedule, config)
    steps = list(local_batches(config))
    assert len(steps) == 6
    for step, batches in enumerate(steps):
        assert [int(batch.labeled.rows[0]) for batch in batches] == list(range(step * rows, (step + 1) * rows))
        for batch in batches:
            labeled, unlabeled = plan.row(int(batch.labeled.rows[0]))
            assert batch.labeled.image_ids.tolist() == [data.labeled[i].image_id for i in labeled]
            if step < 2:
                assert batch.weak is None
            else:
                assert batch.weak.image_ids.tolist() == [data.unlabeled[i].image_id for i in unlabeled]


def test_a_step_trains_on_them(config):
    schedule = run_schedule(config)
    state = build_state(config, schedule, num_classes=6, device="cpu")
    before = [parameter.clone() for parameter in state.student.parameters()]
    result = train_step(
        state, state.student, next(local_batches(config)), config.method, StepSettings(schedule=schedule)
    )
    assert not result.skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, state.student.parameters(), strict=True))
