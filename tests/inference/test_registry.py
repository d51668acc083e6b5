"""A checkpoint becomes a version that MLflow loads and serves without pickle, and only a better one is promoted."""

import base64
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException
from mlflow.models.utils import _enforce_schema
from PIL import Image

from pais_ray.cli import main
from pais_ray.config.tree import compose, dump
from pais_ray.inference.predictor import Predictor
from pais_ray.inference.serving import registry
from pais_ray.tracking.settings import TrackingConfig, tracking_uri
from tests.support.mlflow_runs import client, open_test_run, tiny_run
from tests.support.servers import model_server

NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uri(storage) -> str:
    return tracking_uri(TrackingConfig(), storage)


@pytest.fixture(scope="module")
def first(tiny_coco, storage) -> Path:
    return tiny_run(tiny_coco, storage, "first", 0.20)


@pytest.fixture(scope="module")
def loaded(first, storage, uri):
    """The model as MLflow loads it with pickle disabled."""
    done = CliRunner().invoke(main, ["register", str(first), "--name", "loaded"])
    assert done.exit_code == 0, done.output
    mlflow.set_tracking_uri(uri)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_PICKLE.items():
            patch.setenv(name, value)
        return mlflow.pyfunc.load_model("models:/loaded@candidate")


@pytest.fixture
def photo(tiny_coco) -> bytes:
    return sorted((tiny_coco / "images").iterdir())[0].read_bytes()


def promote(uri: str, name: str, *version: str):
    return CliRunner().invoke(main, ["promote", name, *version, "--tracking", uri])


def champion(uri: str, name: str) -> str | None:
    version = client(uri).get_registered_model(name).aliases.get("champion")
    return None if version is None else str(version)


def test_a_loaded_model_predicts_the_same_as_the_run(first, loaded, photo):
    [answer] = loaded.predict(pandas.DataFrame({"image": [photo]}), params={"score": 0.0})
    picture, results = Predictor.open(first).predict_bytes(photo, "photo")
    assert (answer["height"], answer["width"]) == picture.shape[:2]
    assert len(results) > 0
    for seen, result in zip(answer["instances"], results, strict=True):
        assert seen.pop("category")
        assert {**seen, "image_id": 0} == result
    assert loaded.predict(pandas.DataFrame({"image": [photo]}), params={"score": 1.1})[0]["instances"] == []


def test_the_output_has_the_signature(loaded, photo):
    answers = loaded.predict(pandas.DataFrame({"image": [photo, photo]}), params={"score": 0.0})
    frame = pandas.DataFrame(answers)
    outputs = loaded.metadata.signature.outputs
    assert list(frame.columns) == outputs.input_names()
    _enforce_schema(frame, outputs)
    assert set(answers[0]["instances"][0]) == {p.name for p in outputs.input_types()[2].dtype.properties}


def test_a_version_has_no_pickle_and_no_tracking_uri(loaded, storage):
    files = [p for p in (storage / "mlflow_artifacts" / "models").rglob("*") if p.is_file()]
    assert {"MLmodel", "served.py", "teacher.safetensors", "config.yaml"} <= {p.name for p in files}
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    [config] = [p for p in files if p.name == "config.yaml"]
    assert "uri: null" in config.read_text()


@pytest.mark.parametrize(("data", "rule"), [(b"no picture", "image-format"), (None, "image-pixels")])
def test_an_invalid_image_is_refused_with_its_rule(loaded, data, rule):
    if data is None:  # 400 megapixels in a few kB
        file = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(file, format="PNG")
        data = file.getvalue()
    with pytest.raises(MlflowException, match=rule) as caught:
        loaded.predict(pandas.DataFrame({"image": [data]}))
    assert caught.value.get_http_status_code() == 400


@pytest.mark.server
def test_mlflow_serves_predictions_over_http(first, loaded, storage, uri, photo, tmp_path):
    with model_server(tmp_path, "models:/loaded@candidate", uri, NO_PICKLE) as server:

        def ask(content: object) -> dict:
            body = json.dumps(content).encode()
            request = urllib.request.Request(f"{server.url}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)

        encoded = base64.b64encode(photo).decode()
        _, results = Predictor.open(first).predict_bytes(photo, "photo")
        expected = [r["score"] for r in results]
        for content in ({"inputs": {"image": [encoded]}}, {"dataframe_records": [{"image": encoded}]}):
            [answer] = ask({**content, "params": {"score": 0.0}})["predictions"]
            assert [i["score"] for i in answer["instances"]] == pytest.approx(expected, abs=1e-6)
        example = next(storage.rglob("*/serving_input_example.json"))
        assert ask(json.loads(example.read_text()))["predictions"][0]["height"] == 32
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask({"inputs": {"image": [base64.b64encode(b"no picture").decode()]}})
        assert refused.value.code == 400
        assert "image-format" in refused.value.read().decode()


def test_the_better_one_becomes_champion_and_the_worse_one_does_not(tiny_coco, storage, uri, first):
    name = "shapes"
    for root in (first, tiny_run(tiny_coco, storage, "worse", 0.15), tiny_run(tiny_coco, storage, "better", 0.25)):
        registry.register(root, name)
    assert champion(uri, name) is None
    done = promote(uri, name, "1")
    assert done.exit_code == 0, done.output
    assert champion(uri, name) == "1"
    refused = promote(uri, name, "2")
    assert refused.exit_code == 2
    assert "segm AP 0.1500" in refused.output
    assert "segm AP 0.2000" in refused.output
    assert "-0.0500" in refused.output
    assert champion(uri, name) == "1"
    assert promote(uri, name).exit_code == 0, "the candidate is the latest registered version"
    assert champion(uri, name) == "3"
    assert promote(uri, name, "3").exit_code == 0, "as good as itself"
    assert promote(uri, name, "9").exit_code == 2
    assert promote(uri, "nobody").exit_code == 2
    assert promote(f"sqlite:///{storage}/elsewhere.db", name).exit_code == 2
    assert not (storage / "elsewhere.db").exists()


def test_versions_of_other_data_are_not_promoted(tiny_coco, storage, uri, first, tmp_path):
    name = "others"
    registry.register(first, name)
    assert promote(uri, name).exit_code == 0
    registry.register(tiny_run(tiny_coco, storage, "fewer_labels", 0.9, "data.labeled=0.5"), name)
    refused = promote(uri, name)
    assert refused.exit_code == 2
    assert "different labeled images" in refused.output
    val = json.loads((tiny_coco / "val.json").read_text())
    val["annotations"].pop()
    (tmp_path / "val.json").write_text(json.dumps(val))
    registry.register(tiny_run(tiny_coco, storage, "easier", 0.9, f"data.val={tmp_path}/val.json"), name)
    refused = promote(uri, name)
    assert "different validation annotations" in refused.output
    assert "under another name" in refused.output
    assert champion(uri, name) == "1"


def test_registering_a_checkpoint_twice_gives_one_version(first, uri):
    made = [registry.register(first, "once") for _ in range(2)]
    assert [v.version for v in made] == ["1", "1"]
    assert (made[0].role, made[0].step, made[0].ap) == ("teacher", 2, 0.2)


def test_a_checkpoint_that_was_not_evaluated_is_not_registered(first):
    with pytest.raises(ValueError, match="got no AP of its student"):
        registry.register(first, "unscored", role="student")


def test_the_gallery_shows_ground_truth_and_each_run(tiny_coco, storage, first, tmp_path):
    other = tiny_run(tiny_coco, storage, "other", 0.1, "train.seed=1")
    done = CliRunner().invoke(
        main, ["compare", str(first), str(other), "--out", str(tmp_path), "--images", "2", "--score", "0"]
    )
    assert done.exit_code == 0, done.output
    picture = np.asarray(Image.open(tmp_path / "predictions.png"))
    truth, a, b = np.array_split(picture, 3, axis=1)
    assert truth.shape[0] > 2 * 500
    assert truth.shape == a.shape
    assert (truth != a).any()
    assert (a[: b.shape[0], : b.shape[1]] != b).any()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("verb", ["sync", "register", "promote"])
def test_an_unreachable_server_gives_one_line_quickly(tmp_path, monkeypatch, verb):
    """By default, MLflow's client retries for minutes."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # restored at the end, whatever the command sets
        monkeypatch.delenv(name)
    away = "http://127.0.0.1:1"
    words = ["promote", "shapes", "--tracking", away]
    if verb != "promote":
        config = compose(["synthetic", "mask_rcnn", "supervised", f"tracking.uri={away}"])
        root = open_test_run(tmp_path, "run", config.tracking)
        (root / "config.yaml").write_text(dump(config))
        words = [verb, str(root), *(["--name", "shapes"] if verb == "register" else [])]
    monkeypatch.setattr(registry, "choose_checkpoint", lambda root, *_: root)
    monkeypatch.setattr(registry, "verify", lambda _: None)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MLflow: ")
    assert line.endswith("if its server is down, start it and repeat this command")
