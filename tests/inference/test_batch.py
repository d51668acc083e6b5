"""Parts of a batch prediction: a failed read leaves the part unfinished, a damaged image does not."""

import json

import pyarrow as pa
import pytest

from pais_ray.files.storage import StorageError
from pais_ray.inference import batch
from tests.support.untrained import untrained_run


@pytest.fixture(scope="module")
def run(tiny_coco, tmp_path_factory):
    return untrained_run(tiny_coco, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def predictor(run, tiny_coco, tmp_path):
    root, listed = batch.list_images(str(tiny_coco / "images"), None)
    plan = batch.BatchPlan(
        run=str(run), role="teacher", checkpoint="last", weights_sha256="", root=root, listing_sha256="", part_images=2
    )
    batch.write_plan(plan, tmp_path)
    made = batch.PartPredictor(plan, tmp_path)
    return made, pa.Table.from_pylist([{"part": 0, "images": listed[:2]}])


def test_a_part_that_cannot_be_read_is_not_written_and_succeeds_later(predictor, tmp_path, monkeypatch):
    made, rows = predictor
    with monkeypatch.context() as patch:

        def fail(path, image_id):
            raise StorageError(path, "the connection was lost")

        patch.setattr(made.reader, "read", fail)
        (outcome,) = made(rows).to_pylist()
    assert "the connection was lost" in outcome["error"]
    assert not batch.is_finished(tmp_path, 0)
    (outcome,) = made(rows).to_pylist()
    assert outcome["error"] is None
    assert batch.is_finished(tmp_path, 0)
    manifest = json.loads(batch.part_files(tmp_path, 0)[1].read_text())
    assert (len(manifest["images"]), manifest["unreadable"]) == (2, [])


def test_a_missing_image_is_reported_in_the_finished_part(predictor, tmp_path):
    made, rows = predictor
    (row,) = rows.to_pylist()
    row["images"][1]["name"] = "missing.png"
    made(pa.Table.from_pylist([row]))
    manifest = json.loads(batch.part_files(tmp_path, 0)[1].read_text())
    assert [entry["file_name"] for entry in manifest["unreadable"]] == ["missing.png"]
    assert len(manifest["images"]) == 1


def test_failed_parts_are_counted_apart(tmp_path):
    failed = batch.report_progress([{"part": 0, "images": 2, "instances": 0, "error": "no connection"}], 2)
    assert failed == [{"part": 0, "error": "no connection"}]
    summary = batch.summarize(tmp_path, 1, failed, None)
    assert (summary.images, summary.failed) == (0, failed)
