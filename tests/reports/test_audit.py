"""The audit uses images whose annotations training did not use, and its figures follow from its rows."""

import csv
import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.inference import predictor as predictor_file
from pais_ray.reports import audit
from pais_ray.structures.batch import Predictions
from pais_ray.structures.masks import Masks
from tests.support.untrained import untrained_run


@pytest.fixture(scope="module")
def run(tiny_coco, tmp_path_factory):
    return untrained_run(tiny_coco, tmp_path_factory.mktemp("runs"))


def test_the_audit_of_a_run(run, tmp_path):
    out = tmp_path / "audit"
    done = CliRunner().invoke(main, ["audit", str(run), "--out", str(out), "--number", "5"])
    assert done.exit_code == 0, done.output
    assert "5 images, teacher: " in done.output
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    hidden = SplitManifest.from_json((run / "split.json").read_text()).split.unlabeled_ids
    image_ids = {int(row["image_id"]) for row in rows}
    assert image_ids <= set(hidden), "labeled images do not test pseudo-labels"
    assert len(image_ids) == 5
    report = json.loads((out / "audit.json").read_text())
    kept = [row for row in rows if row["kept"] == "True"]
    assert report["kept"]["kept"] == len(kept) > 0
    assert all(float(row["score"]) > 0.1 for row in kept)
    assert sum(c["truth"] for c in report["classes"]) == report["kept"]["truth"] > 0
    assert Image.open(out / "audit.png").size[0] > 1000


def test_predictions_equal_to_the_ground_truth_get_perfect_figures(run, monkeypatch):
    predictor = predictor_file.Predictor.open(run)
    records = audit.hidden_records(run, predictor.config)[:3]

    def predict_truth(*arguments):
        _, truth, size = original(*arguments)
        ones = torch.ones(len(truth))
        found = Predictions(
            boxes=truth.boxes, labels=truth.labels, scores=ones, ious=ones, masks=Masks.full(truth.masks.paste(size))
        )
        return found, truth, size

    original = audit.predict_with_truth
    monkeypatch.setattr(audit, "predict_with_truth", predict_truth)
    report = audit.build_report(audit.audit_images(predictor, records), predictor)
    assert report["kept"]["precision"] == report["kept"]["recall"] == 1.0
    assert report["mask_iou"]["ece"] == report["score"]["ece"] == 0.0
    assert all(c["truth"] == c["kept"] for c in report["classes"])


def test_unlabeled_images_without_annotations_require_others(tiny_coco, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (96, 96), (200, 30, 90)).save(tmp_path / "others" / "0.png")
    run = untrained_run(tiny_coco, tmp_path, "foreign", f"data.unlabeled={tmp_path}/others", "data.labeled=1")
    done = CliRunner().invoke(main, ["audit", str(run)])
    assert done.exit_code == 2
    assert "give --annotations and --images" in done.stderr
    words = ["--annotations", f"{tiny_coco}/val.json", "--images", f"{tiny_coco}/images"]
    done = CliRunner().invoke(main, ["audit", str(run), *words])
    assert done.exit_code == 0, done.output
    assert (run / "audit" / "audit.png").exists()
