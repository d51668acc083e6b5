"""Batch prediction on a cluster: after a kill and a second call, the results equal those of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.validation.rules import DataError
from pais_ray.inference import batch
from pais_ray.inference.predictor import Predictor, image_records
from tests.support.untrained import untrained_run
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(tiny_coco, tmp_path_factory) -> Path:
    return untrained_run(tiny_coco, tmp_path_factory.mktemp("runs"))


def manifests(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("*.manifest.json")}


def assert_same(results: list[dict], expected: list[dict]) -> None:
    assert len(results) == len(expected) > 0
    for one, other in zip(results, expected, strict=True):
        assert [one[k] for k in ("image_id", "category_id")] == [other[k] for k in ("image_id", "category_id")]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


def test_results_after_a_kill_equal_those_of_one_process(cluster, run, tiny_coco, tmp_path):
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    words = ["batch-predict", str(run), f"{tiny_coco}/images", "--out", str(out), "--part-images", "2", "--merge"]
    env = {**os.environ, "RAY_ADDRESS": cluster["address"]}
    driver = subprocess.Popen([sys.executable, "-m", "pais_ray.cli", *words], env=env)
    wait_for(lambda: len(manifests(out)) >= 2, lambda: driver.poll() is None)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    first = manifests(out)
    assert not (out / "results.json").exists()
    damaged = out / "parts" / "part-000000.json"
    damaged.write_text(damaged.read_text()[:-9])
    done = CliRunner().invoke(main, [*words, "--json", str(summary)])
    assert done.exit_code == 0, done.output
    last = manifests(out)
    assert {name for name in first if last[name] != first[name]} == {"part-000000.manifest.json"}
    summary_json = json.loads(summary.read_text())
    assert (summary_json["images"], summary_json["parts"], summary_json["unreadable"]) == (16, 8, [])
    predictor = Predictor.open(run)
    expected = predictor.results(image_records([tiny_coco / "images"]), "expected")
    assert_same(json.loads((out / "results.json").read_text()), expected)
    listed = json.loads((out / "images.json").read_text())
    assert [image["id"] for image in listed["images"]] == list(range(16))
    assert listed["categories"] == predictor.categories
    done = CliRunner().invoke(main, [*words, "--role", "student"])
    assert done.exit_code == 2
    assert "was created with a different role; choose another --out" in done.stderr


def test_a_bucket_and_a_list_of_its_images(cluster, run, tiny_coco, tmp_path):
    """With the file system interface of object stores: a damaged image is reported, and the others have results."""
    images = tmp_path / "bucket" / "images"
    shutil.copytree(tiny_coco / "images", images)
    tree = json.loads((tiny_coco / "val.json").read_text())
    broken = tree["images"][1]["file_name"]
    (images / broken).write_bytes(b"no image")
    out = tmp_path / "out"
    words = [str(tiny_coco / "val.json"), "--images", f"file://{images}", "--out", str(out), "--merge"]
    done = CliRunner().invoke(main, ["batch-predict", str(run), *words])
    assert done.exit_code == 1, done.output
    assert broken in done.stderr
    assert "images not read: 1" in done.stderr
    found = {result["image_id"] for result in json.loads((out / "results.json").read_text())}
    assert found == {image["id"] for image in tree["images"]} - {tree["images"][1]["id"]}


def test_listings(tiny_coco, tmp_path):
    root, found = batch.list_images(f"file://{tiny_coco}/images", None)
    assert (root, found) == (f"file://{tiny_coco}/images", batch.list_images(f"{tiny_coco}/images", None)[1])
    assert len(found) == 16
    with pytest.raises(ValueError, match="--images: expected"):
        batch.list_images(f"{tiny_coco}/val.json", None)
    with pytest.raises(ValueError, match="without credentials"):
        batch.list_images("s3://key:secret@bucket/images", None)
    outside = tmp_path / "out.json"
    outside.write_text(json.dumps({"images": [{"id": 1, "file_name": "../x.png"}]}))
    with pytest.raises(DataError, match="image-path"):
        batch.list_images(str(outside), "s3://bucket/images")
