"""A run directory is mirrored in a real store, resumes under its id, and a store that is away costs nothing."""

import json
import logging
import os
import shutil
import time

import pytest

from pais_ray.tracking import tracker as tracker_module
from pais_ray.tracking.record import CARD, read_run_id
from pais_ray.tracking.settings import TrackingConfig, tracking_uri, ui_command
from pais_ray.tracking.tracker import Tracker, open_run, sync
from tests.support.mlflow_runs import client, follow, history, opened, write_checkpoint, write_row

NOWHERE = TrackingConfig(uri="http://127.0.0.1:1")
HERE = TrackingConfig()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A storage path whose database exists: making one takes seconds."""
    folder = tmp_path_factory.mktemp("storage")
    opened(folder, "first")
    return folder


@pytest.fixture(scope="module")
def uri(storage):
    return tracking_uri(HERE, storage)


@pytest.fixture
def root(storage, tmp_path):
    """The directory of an open run, named as the test."""
    return opened(storage, tmp_path.name)


def models_of(uri, root, metric="teacher/segm_AP"):
    """The run's logged models, best first."""
    store = client(uri)
    run = store.get_run(read_run_id(root))
    order = [{"field_name": f"metrics.{metric}", "ascending": False}]
    return store.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", order_by=order)


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, pais_ray.tracking.tracker, pais_ray.tracking.system_metrics; sys.exit('mlflow' in sys.modules)"
    assert os.spawnv(os.P_WAIT, os.sys.executable, [os.sys.executable, "-c", code]) == 0


def test_a_run_holds_params_tags_data_and_metrics_by_absolute_step(uri, root):
    for step in range(100, 105):
        write_row(root, step, **{"labeled/mask": 1 / step, "teacher/segm_AP_class/it's (odd)": 0.5, "gone": None})
    follow(HERE, root)
    stored = client(uri).get_run(read_run_id(root))
    assert history(uri, stored.info.run_id, "labeled/mask") == [(step, 1 / step) for step in range(100, 105)]
    assert len(history(uri, stored.info.run_id, "teacher/segm_AP_class/it_s _odd_")) == 5
    assert not {"gone", "step", "time"} & stored.data.metrics.keys()
    assert stored.data.params["optim.lr"] == "0.01"
    assert len(stored.data.params["data.train"]) == 500
    assert stored.data.tags["fold"] == "1"
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == root.name
    seen = {d.tags[0].value: d.dataset for d in stored.inputs.dataset_inputs}
    assert seen["training"].digest == "a" * 32
    assert json.loads(seen["training"].profile) == {"images": 12, "labeled": 3}
    assert json.loads(seen["validation"].source) == {"uri": "https://***@host/val.json"}


def test_sending_twice_is_sending_once(uri, root):
    write_row(root, 1, loss=3.0)
    write_row(root, 2, loss=2.0, **{"teacher/segm_AP": 0.1, "teacher/bbox_AP": 0.2})
    write_checkpoint(root, 2)
    (root / "figures").mkdir()
    (root / "figures" / "curves.png").write_bytes(b"png")
    first, second = sync(HERE, root), sync(HERE, root)
    assert first == {"metrics": 4, "artifacts": 1, "checkpoints": 1}
    assert second == {"metrics": 0, "artifacts": 0, "checkpoints": 0}
    run_id = read_run_id(root)
    assert history(uri, run_id, "loss") == [(1, 3.0), (2, 2.0)]
    assert history(uri, run_id, "teacher/segm_AP") == [(2, 0.1)]
    run = client(uri).get_run(run_id)
    assert len(run.outputs.model_outputs) == 1
    assert len(run.inputs.dataset_inputs) == 2


def test_a_run_resumes_under_its_id(uri, storage, root):
    write_row(root, 10, loss=2.0)
    follow(HERE, root, "KILLED")
    run_id = read_run_id(root)
    assert client(uri).get_run(run_id).info.status == "KILLED"
    params = {"optim.lr": 0.01, "method.tau_cls": 0.5, "new": 1}
    assert open_run(HERE, storage, root.name, params, {}) == run_id
    assert client(uri).get_run(run_id).info.status == "RUNNING"
    write_row(root, 11, loss=1.0)
    follow(HERE, root, None)
    stored = client(uri).get_run(run_id)
    assert history(uri, run_id, "loss") == [(10, 2.0), (11, 1.0)]
    assert stored.info.status == "RUNNING"
    assert stored.data.params["method.tau_cls"] == "0.35"
    assert stored.data.params["new"] == "1"
    assert stored.data.tags["resumed.method.tau_cls"] == "0.5"
    assert "resumed.optim.lr" not in stored.data.tags


def test_a_run_that_the_store_does_not_know_is_opened_anew_with_all_it_has(uri, root, caplog):
    write_row(root, 1, loss=2.0)
    (root / "mlflow_run_id").write_text("0" * 32)
    card = json.loads((root / CARD).read_text())
    (root / CARD).write_text(json.dumps({**card, "key": "another"}))
    follow(HERE, root)
    assert "has no run" in caplog.text
    assert history(uri, read_run_id(root), "loss") == [(1, 2.0)]


def test_a_run_whose_id_was_lost_is_found_again(uri, root):
    """The store made it, and the answer was lost on the way."""
    run_id = read_run_id(root)
    (root / "mlflow_run_id").unlink()
    write_row(root, 1, loss=2.0)
    follow(HERE, root)
    assert read_run_id(root) == run_id


def test_a_child_is_shown_under_its_parent(uri, storage, root):
    parent = read_run_id(root)
    child = opened(storage, f"{root.name}_child", parent=parent)
    assert client(uri).get_run(read_run_id(child)).data.tags["mlflow.parentRunId"] == parent


def test_papers_and_figures_are_artifacts_without_secrets(uri, storage, root):
    (root / "config.yaml").write_text("tracking: {uri: 'https://me:secret@host'}")
    (root / "figures").mkdir()
    (root / "figures" / "a.png").write_bytes(b"123")
    follow(HERE, root, None)
    (root / "figures" / "a.png").write_bytes(b"1234")
    follow(HERE, root)
    run_id = read_run_id(root)
    assert {f.path for f in client(uri).list_artifacts(run_id)} == {"config.yaml", "figures"}
    assert [(f.path, f.file_size) for f in client(uri).list_artifacts(run_id, "figures")] == [("figures/a.png", 4)]
    stored = next((storage / "mlflow_artifacts").glob(f"{run_id}/**/config.yaml")).read_text()
    assert "secret" not in stored
    assert "https://***@host" in stored


def test_checkpoints_are_logged_models_that_say_what_is_left_of_them(uri, root):
    for step, ap in ((100, 0.1), (200, 0.3), (300, 0.2)):
        write_checkpoint(root, step)
        write_row(root, step, **{"teacher/segm_AP": ap, "teacher/segm_AP_class/a": ap})
    follow(HERE, root, None)
    assert [(m.name, m.tags["checkpoint"]) for m in models_of(uri, root)] == [
        ("teacher-00000200", "best"),
        ("teacher-00000300", "last"),
        ("teacher-00000100", "kept"),
    ]
    shutil.rmtree(root / "checkpoints" / "step_00000100")  # retention
    write_checkpoint(root, 400)
    write_row(root, 400, **{"teacher/segm_AP": 0.4})
    follow(HERE, root)
    models = models_of(uri, root)
    assert [(m.name, m.tags["checkpoint"]) for m in models] == [
        ("teacher-00000400", "best, last"),
        ("teacher-00000200", "kept"),
        ("teacher-00000300", "kept"),
        ("teacher-00000100", "deleted"),
    ]
    best = models[0]
    assert best.status == "READY"
    assert best.tags["path"] == str(root / "checkpoints" / "step_00000400")
    assert (best.tags["role"], best.tags["step"], best.tags["split_sha256"]) == ("teacher", "400", "c" * 64)
    assert [(m.key, m.value, m.dataset_digest) for m in best.metrics] == [("teacher/segm_AP", 0.4, "b" * 32)]
    outputs = client(uri).get_run(read_run_id(root)).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [100, 200, 300, 400]


def test_a_step_that_is_made_again_is_ranked_by_its_last_score(uri, root):
    """metrics.jsonl is written anew where a run goes back to a checkpoint, under a Tracker that goes on."""
    write_checkpoint(root, 1)
    tracker = Tracker(HERE, root)
    write_row(root, 1, loss=1.0, **{"teacher/segm_AP": 0.3})
    write_row(root, 2, loss=9.0)
    tracker.changed()
    while not models_of(uri, root):
        time.sleep(0.05)
    aside = root / "aside"
    aside.write_text("")
    os.replace(aside, root / "metrics.jsonl")
    write_row(root, 1, loss=1.5, **{"teacher/segm_AP": 0.4})
    tracker.close()
    run_id = read_run_id(root)
    assert history(uri, run_id, "loss") == [(1, 1.0), (1, 1.5), (2, 9.0)]
    [model] = models_of(uri, root)
    assert client(uri).get_run(run_id).data.metrics["teacher/segm_AP"] == 0.4
    assert max(model.metrics, key=lambda m: m.timestamp).value == 0.4


def test_half_a_line_waits_for_its_other_half(uri, root):
    tracker = Tracker(HERE, root)
    write_row(root, 1, loss=1.0)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 9e9, ')
        file.flush()
        tracker.changed()
        while not history(uri, read_run_id(root), "loss"):
            time.sleep(0.05)
        file.write('"loss": 2.0}\n')
    tracker.close()
    assert history(uri, read_run_id(root), "loss") == [(1, 1.0), (2, 2.0)]


def test_samples_of_every_node_are_sent_by_one_tracker(uri, root):
    from pais_ray.tracking.system_metrics import NodeSampler

    samplers = [NodeSampler(root, node, 60.0) for node in range(2)]
    for sampler in samplers:
        sampler.close()
    follow(HERE, root)
    metrics = client(uri).get_run(read_run_id(root)).data.metrics
    for node in range(2):
        assert 0 < metrics[f"system/node_{node}/system_memory_usage_percentage"] < 100
        assert f"system/node_{node}/network_receive_megabytes" in metrics
    NodeSampler(root, 0, None).close()
    assert len((root / "system_metrics" / "node_0.jsonl").read_text().splitlines()) == 1


def test_a_bucket_that_is_away_does_not_hold_up_the_metrics(uri, root, monkeypatch, caplog):
    from mlflow import MlflowClient

    def refuse(self, *_):
        raise RuntimeError("no such bucket")

    for name in ("list_artifacts", "log_artifact", "log_text"):
        monkeypatch.setattr(MlflowClient, name, refuse)
    monkeypatch.setattr(tracker_module, "LAST_ATTEMPTS", 1)
    (root / "config.yaml").write_text("a: 1")
    write_row(root, 1, loss=1.0)
    follow(HERE, root)
    assert history(uri, read_run_id(root), "loss") == [(1, 1.0)]
    assert client(uri).get_run(read_run_id(root)).info.status == "FINISHED"
    assert "no such bucket" in caplog.text
    assert "pais-ray sync" in caplog.text


def test_a_dead_server_costs_training_nothing_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        root = opened(tmp_path, "run", NOWHERE)
        assert read_run_id(root) is None
        tracker = Tracker(NOWHERE, root)
        write_row(root, 1, loss=1.0)
        tracker.changed()
        tracker.close("KILLED")
    assert json.loads((root / CARD).read_text())["status"] == "KILLED"
    warnings = [r.message for r in caplog.records if r.name == "pais_ray.tracking.tracker"]
    assert 2 <= len(warnings) <= 3, "of open_run, of the tracker, and its last words"
    assert all("tracking.uri" in w and f"pais-ray sync {root}" in w for w in warnings)


def test_nothing_to_write_to_is_survived(tmp_path):
    tracker = Tracker(NOWHERE, tmp_path / "not" / "there")
    tracker.changed()
    tracker.close()
    assert not (tmp_path / "not").exists()


def test_disabled_tracking_does_nothing(tmp_path):
    off = TrackingConfig(enabled=False)
    assert open_run(off, tmp_path, "run", {}, {}) is None
    tracker = Tracker(off, tmp_path)
    tracker.changed()
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"tracking\.enabled"):
        sync(off, tmp_path)


def test_the_uri_is_absolute_and_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrackingConfig(uri="sqlite:///m.db").uri == f"sqlite:///{tmp_path}/m.db"
    assert tracking_uri(TrackingConfig(), tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tmp_path.name in ui_command(TrackingConfig(), tmp_path)
    database = TrackingConfig(uri="postgresql://me@host/x")  # its user name is no secret, and shown to nobody
    assert "postgresql://***@host/x" in ui_command(database, tmp_path)
    for uri in ("./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(ValueError, match="sqlite"):
            TrackingConfig(uri=uri)
    with pytest.raises(ValueError, match="extra"):
        TrackingConfig(url="x")


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:secret@host/x",
        "https://token@host/x",
        "postgresql://me:s/cret@host/x",
        "postgresql://me:s@cret@host/x",
        "postgresql://host/x?user=me&password=secret",
        "https://host/x?access_token=secret",
    ],
)
def test_an_address_with_a_secret_is_refused(uri):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        TrackingConfig(uri=uri)
    assert "no password here" in str(refused.value)


def test_secrets_do_not_become_parameters(uri, storage):
    given = {"tracking.uri": "https://me:pw@host", "data.train": "https://host/x?sslmode=on&Password=pw&a=b"}
    run_id = open_run(HERE, storage, "s", given, {})
    params = client(uri).get_run(run_id).data.params
    assert params["tracking.uri"] == "https://***@host"
    assert params["data.train"] == "https://host/x?sslmode=on&Password=***&a=b"
    assert "pw" not in (storage / "s" / CARD).read_text()
