"""Pseudo-labels from a file in a training run: used, resumed, checked, and produced by another run. The validation
images are held out from the annotated ones."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.tree import compose
from pais_ray.data.annotations.coco import read_coco
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import prepare
from pais_ray.train.driver import launch
from tests.data.test_scored_masks import results_of
from tests.faults.harness import weights
from tests.ray.test_main_job import words

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
STEPS = 4


@pytest.fixture(scope="module")
def masks(tiny_coco, tmp_path_factory):
    """The ground truth of every image as scored masks."""
    path = tmp_path_factory.mktemp("masks") / "results.json"
    results_of(read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images")), path, score=0.9, iou=0.75)
    return path


@pytest.fixture(scope="module")
def given(tiny_coco, tmp_path_factory, masks):
    """The config words of a run with these masks, by its name."""
    storage = tmp_path_factory.mktemp("scored_runs")
    more = (f"data.pseudo_labels={masks}", "method.burn_in=0", "optim.lr=0.001", "scaling.num_workers=1")
    more += ("data.val=null", "data.holdout=0.25", "data.labeled=0.4")
    more += (f"train.steps={STEPS}", "train.panel_every=3")
    return lambda name, *extra: words(tiny_coco, storage, name, *more, *extra)


@pytest.fixture(scope="module")
def uninterrupted(cluster, given):
    config = compose(given("uninterrupted"))
    assert launch.train(config).step == STEPS
    return Path(config.run.storage_path) / "uninterrupted"


def test_the_student_learns_from_the_masks_and_the_teacher_is_evaluated(uninterrupted):
    rows = metric_rows(uninterrupted)
    logged = [row for row in rows if "loss" in row]
    with_masks = [row for row in logged if row["pseudo/kept_per_image"]]
    assert len(with_masks) > 1
    for row in with_masks:
        kept = row["pseudo/kept_per_image"]  # of one image
        assert row["pseudo/over_tau_cls_per_image"] == kept
        assert row["pseudo/score_mean"] == pytest.approx(0.9)
        assert row["pseudo/iou_mean"] == pytest.approx(0.75)
        assert row["pseudo/class_weight_sum"] == pytest.approx(kept * 0.9**4)
        assert row["pseudo/mask_weight_sum"] == pytest.approx(kept * 0.75**4)
    assert any("teacher/segm_AP" in row for row in rows)
    assert (uninterrupted / "figures/pseudo_labels_00000003.png").exists()


def test_a_run_is_evaluated_on_the_held_out_images(uninterrupted, tmp_path):
    held_out = json.loads((uninterrupted / "split.json").read_text())["held_out_ids"]
    truth = json.loads((uninterrupted / "ground_truth.json").read_text())
    assert sorted(image["id"] for image in truth["images"]) == held_out
    assert len(held_out) == 3
    done = CliRunner().invoke(
        main, ["evaluate", str(uninterrupted), "--checkpoint", "last", "--json", f"{tmp_path}/e.json"]
    )
    assert done.exit_code == 0, done.output
    logged = [row["teacher/segm_AP"] for row in metric_rows(uninterrupted) if "teacher/segm_AP" in row]
    assert json.loads((tmp_path / "e.json").read_text())["segm"]["AP"] == pytest.approx(logged[-1], abs=1e-9)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_and_a_changed_file_is_refused(uninterrupted, given, masks):
    launch.train(compose(given("halves", "train.stop_at=2")))
    before = masks.read_text()
    masks.write_text(json.dumps([entry | {"score": 0.8} for entry in json.loads(before)]))
    try:
        with pytest.raises(ValueError, match=r"results\.json: changed since the start of the run"):
            launch.train(compose(given("halves")))
    finally:
        masks.write_text(before)
    with pytest.raises(ValueError, match=r"different values of data\.pseudo_labels"):
        launch.train(compose(given("halves", "data.pseudo_labels=null")))
    assert launch.train(compose(given("halves"))).step == STEPS
    a, b = weights(uninterrupted, STEPS), weights(uninterrupted.parent / "halves", STEPS)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_learns_from_the_predictions_of_another_run(uninterrupted, given, tmp_path):
    """`predict --part unlabeled` uses the image ids of the run; for a plain folder they are positions."""
    out = tmp_path / "out"
    command = ["predict", str(uninterrupted), "--out", str(out), "--draw", "2"]
    done = CliRunner().invoke(main, [*command, "--part", "unlabeled"])
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert results
    assert all("mask_iou" in entry for entry in results)
    assert len(os.listdir(out / "overlays")) == 2
    more = (f"data.pseudo_labels={out}/results.json", "method.tau_cls=0")
    config, data = prepare.prepare(compose(given("next", *more)))
    listing = json.loads((out / "images.json").read_text())["images"]
    assert [image["id"] for image in listing] == [r.image_id for r in data.unlabeled]
    assert (data.scored.below, data.scored.elsewhere) == (0, 0)
    assert sum(len(image.scores) for image in data.scored.images) == len(results) - data.scored.empty > 0
    folder = config.data.images
    done = CliRunner().invoke(main, [*command, folder])
    assert done.exit_code == 0, done.output
    _, data = prepare.prepare(compose(given("next", *more, f"data.unlabeled={folder}")))
    assert data.scored.elsewhere > 0, "the folder also has the labeled and the validation images"
    assert sum(len(image.scores) for image in data.scored.images) > 0
