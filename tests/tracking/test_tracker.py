"""A run directory is mirrored in a real store, resumes under its id, and an unavailable store does no harm."""

import json
import logging
import os
import shutil

import pytest

from pais_ray.tracking import tracker as tracker_module
from pais_ray.tracking.logger import build_logger
from pais_ray.tracking.record import RECORD_FILE, read_run_id
from pais_ray.tracking.settings import TrackingConfig, tracking_uri, ui_command
from pais_ray.tracking.tracker import MLflowTracker, open_run, sync
from tests.support.mlflow_runs import client, history, open_test_run, track_once, write_checkpoint, write_row
from tests.support.waiting import wait_for

UNREACHABLE = TrackingConfig(uri="http://127.0.0.1:1")
DEFAULT = TrackingConfig()


@pytest.fixture
def root(storage, tmp_path):
    """The directory of an open run with the name of the test."""
    return open_test_run(storage, tmp_path.name)


def models_of(uri, root, metric="teacher/segm_AP"):
    """The run's logged models, best first."""
    store = client(uri)
    run = store.get_run(read_run_id(root))
    order = [{"field_name": f"metrics.{metric}", "ascending": False}]
    return store.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", order_by=order)


def test_modules_imported_at_every_start_do_not_import_mlflow():
    modules = "pais_ray.tracking.logger, pais_ray.tracking.mlflow_compat, pais_ray.tracking.system_metrics"
    code = f"import sys, {modules}; sys.exit('mlflow' in sys.modules)"
    assert os.spawnv(os.P_WAIT, os.sys.executable, [os.sys.executable, "-c", code]) == 0


def test_a_run_has_params_tags_datasets_and_metrics_by_absolute_step(uri, root):
    for step in range(100, 105):
        write_row(root, step, **{"labeled/mask": 1 / step, "teacher/segm_AP_class/it's (odd)": 0.5, "gone": None})
    track_once(DEFAULT, root)
    stored = client(uri).get_run(read_run_id(root))
    assert history(uri, stored.info.run_id, "labeled/mask") == [(step, 1 / step) for step in range(100, 105)]
    assert len(history(uri, stored.info.run_id, "teacher/segm_AP_class/it_s _odd_")) == 5
    assert not {"gone", "step", "time"} & stored.data.metrics.keys()
    assert stored.data.params["optim.lr"] == "0.01"
    assert len(stored.data.params["data.train"]) == 500
    assert stored.data.tags["fold"] == "1"
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == root.name
    datasets = {d.tags[0].value: d.dataset for d in stored.inputs.dataset_inputs}
    assert datasets["training"].digest == "a" * 32
    assert json.loads(datasets["training"].profile) == {"images": 12, "labeled": 3}
    assert json.loads(datasets["validation"].source) == {"uri": "https://***@host/val.json"}


def test_syncing_twice_sends_nothing_the_second_time(uri, root):
    write_row(root, 1, loss=3.0)
    write_row(root, 2, loss=2.0, **{"teacher/segm_AP": 0.1, "teacher/bbox_AP": 0.2})
    write_checkpoint(root, 2)
    (root / "figures").mkdir()
    (root / "figures" / "curves.png").write_bytes(b"png")
    first, second = sync(DEFAULT, root), sync(DEFAULT, root)
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
    track_once(DEFAULT, root, "KILLED")
    run_id = read_run_id(root)
    assert client(uri).get_run(run_id).info.status == "KILLED"
    params = {"optim.lr": 0.01, "method.tau_cls": 0.5, "new": 1}
    assert open_run(DEFAULT, storage, root.name, params, {}) == run_id
    assert client(uri).get_run(run_id).info.status == "RUNNING"
    write_row(root, 11, loss=1.0)
    track_once(DEFAULT, root, None)
    stored = client(uri).get_run(run_id)
    assert history(uri, run_id, "loss") == [(10, 2.0), (11, 1.0)]
    assert stored.info.status == "RUNNING"
    assert stored.data.params["method.tau_cls"] == "0.35"
    assert stored.data.params["new"] == "1"
    assert stored.data.tags["resumed.method.tau_cls"] == "0.5"
    assert "resumed.optim.lr" not in stored.data.tags


def test_a_run_missing_from_the_store_is_created_again_with_all_its_data(uri, root, caplog):
    write_row(root, 1, loss=2.0)
    (root / "mlflow_run_id").write_text("0" * 32)
    record = json.loads((root / RECORD_FILE).read_text())
    (root / RECORD_FILE).write_text(json.dumps({**record, "key": "another"}))
    track_once(DEFAULT, root)
    assert "has no run" in caplog.text
    assert history(uri, read_run_id(root), "loss") == [(1, 2.0)]


def test_a_run_whose_id_was_lost_is_found_by_its_key(uri, root):
    """The store created the run, but its response did not arrive."""
    run_id = read_run_id(root)
    (root / "mlflow_run_id").unlink()
    write_row(root, 1, loss=2.0)
    track_once(DEFAULT, root)
    assert read_run_id(root) == run_id


def test_a_child_run_has_the_tag_of_its_parent(uri, storage, root):
    parent = read_run_id(root)
    child = open_test_run(storage, f"{root.name}_child", parent=parent)
    assert client(uri).get_run(read_run_id(child)).data.tags["mlflow.parentRunId"] == parent


def test_metadata_and_figures_are_artifacts_without_secrets(uri, storage, root):
    (root / "config.yaml").write_text("tracking: {uri: 'https://me:secret@host'}")
    (root / "figures").mkdir()
    (root / "figures" / "a.png").write_bytes(b"123")
    track_once(DEFAULT, root, None)
    (root / "figures" / "a.png").write_bytes(b"1234")
    track_once(DEFAULT, root)
    run_id = read_run_id(root)
    assert {f.path for f in client(uri).list_artifacts(run_id)} == {"config.yaml", "figures"}
    assert [(f.path, f.file_size) for f in client(uri).list_artifacts(run_id, "figures")] == [("figures/a.png", 4)]
    stored = next((storage / "mlflow_artifacts").glob(f"{run_id}/**/config.yaml")).read_text()
    assert "secret" not in stored
    assert "https://***@host" in stored


def test_checkpoints_are_logged_models_with_their_state(uri, root):
    for step, ap in ((100, 0.1), (200, 0.3), (300, 0.2)):
        write_checkpoint(root, step)
        write_row(root, step, **{"teacher/segm_AP": ap, "teacher/segm_AP_class/a": ap})
    track_once(DEFAULT, root, None)
    assert [(m.name, m.tags["checkpoint"]) for m in models_of(uri, root)] == [
        ("teacher-00000200", "best"),
        ("teacher-00000300", "last"),
        ("teacher-00000100", "kept"),
    ]
    shutil.rmtree(root / "checkpoints" / "step_00000100")  # retention
    write_checkpoint(root, 400)
    write_row(root, 400, **{"teacher/segm_AP": 0.4})
    track_once(DEFAULT, root)
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


def test_a_repeated_step_is_ranked_by_its_last_score(uri, root):
    """metrics.jsonl is rewritten when a run returns to a checkpoint, while its tracker continues."""
    write_checkpoint(root, 1)
    tracker = MLflowTracker(DEFAULT, root)
    write_row(root, 1, loss=1.0, **{"teacher/segm_AP": 0.3})
    write_row(root, 2, loss=9.0)
    tracker.log(2, {})
    wait_for(lambda: models_of(uri, root))
    replacement = root / "replacement"
    replacement.write_text("")
    os.replace(replacement, root / "metrics.jsonl")
    write_row(root, 1, loss=1.5, **{"teacher/segm_AP": 0.4})
    tracker.close()
    run_id = read_run_id(root)
    assert history(uri, run_id, "loss") == [(1, 1.0), (1, 1.5), (2, 9.0)]
    [model] = models_of(uri, root)
    assert client(uri).get_run(run_id).data.metrics["teacher/segm_AP"] == 0.4
    assert max(model.metrics, key=lambda m: m.timestamp).value == 0.4


def test_a_partial_line_is_sent_once_it_is_complete(uri, root):
    tracker = MLflowTracker(DEFAULT, root)
    write_row(root, 1, loss=1.0)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 9e9, ')
        file.flush()
        tracker.log(2, {})
        wait_for(lambda: history(uri, read_run_id(root), "loss"))
        file.write('"loss": 2.0}\n')
    tracker.close()
    assert history(uri, read_run_id(root), "loss") == [(1, 1.0), (2, 2.0)]


def test_one_tracker_sends_the_samples_of_every_node(uri, root):
    from pais_ray.tracking.system_metrics import NodeSampler

    samplers = [NodeSampler(root, node, 60.0) for node in range(2)]
    for sampler in samplers:
        sampler.close()
    track_once(DEFAULT, root)
    metrics = client(uri).get_run(read_run_id(root)).data.metrics
    for node in range(2):
        assert 0 < metrics[f"system/node_{node}/system_memory_usage_percentage"] < 100
        assert f"system/node_{node}/network_receive_megabytes" in metrics
    NodeSampler(root, 0, None).close()
    assert len((root / "system_metrics" / "node_0.jsonl").read_text().splitlines()) == 1


def test_an_unavailable_artifact_store_does_not_block_metrics(uri, root, monkeypatch, caplog):
    from mlflow import MlflowClient

    def refuse(self, *_):
        raise RuntimeError("no such bucket")

    for name in ("list_artifacts", "log_artifact", "log_text"):
        monkeypatch.setattr(MlflowClient, name, refuse)
    monkeypatch.setattr(tracker_module, "CLOSING_ATTEMPTS", 1)
    (root / "config.yaml").write_text("a: 1")
    write_row(root, 1, loss=1.0)
    track_once(DEFAULT, root)
    assert history(uri, read_run_id(root), "loss") == [(1, 1.0)]
    assert client(uri).get_run(read_run_id(root)).info.status == "FINISHED"
    assert "no such bucket" in caplog.text
    assert "pais-ray sync" in caplog.text


def test_a_store_that_fails_for_a_while_gets_everything_from_the_same_tracker(uri, root, monkeypatch, caplog):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracker_module, "POLL_INTERVAL", 0.05)
    log_batch, failures = MlflowClient.log_batch, []

    def fail(self, *arguments, **keywords):
        failures.append(1)
        raise ConnectionError("server stopped")

    tracker = MLflowTracker(DEFAULT, root)
    write_row(root, 1, loss=1.0)
    wait_for(lambda: history(uri, read_run_id(root), "loss") == [(1, 1.0)])
    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    write_row(root, 2, loss=2.0)
    wait_for(lambda: len(failures) >= 2)
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    write_row(root, 3, loss=3.0)
    wait_for(lambda: history(uri, read_run_id(root), "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)])
    tracker.close()
    assert [r.message.count("server stopped") for r in caplog.records if r.name == "pais_ray.tracking.tracker"] == [1]


def test_an_unreachable_server_causes_warnings_only(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        root = open_test_run(tmp_path, "run", UNREACHABLE)
        assert read_run_id(root) is None
        tracker = MLflowTracker(UNREACHABLE, root)
        write_row(root, 1, loss=1.0)
        tracker.log(1, {"loss": 1.0})
        tracker.close("KILLED")
    assert json.loads((root / RECORD_FILE).read_text())["status"] == "KILLED"
    warnings = [r.message for r in caplog.records if r.name == "pais_ray.tracking.tracker"]
    assert 2 <= len(warnings) <= 3, "one from open_run, one or two from the tracker"
    assert all("tracking.uri" in w and f"pais-ray sync {root}" in w for w in warnings)


def test_a_missing_run_directory_is_tolerated(tmp_path):
    tracker = MLflowTracker(UNREACHABLE, tmp_path / "not" / "there")
    tracker.log(1, {})
    tracker.close()
    assert not (tmp_path / "not").exists()


def test_disabled_tracking_does_nothing(tmp_path):
    off = TrackingConfig(enabled=False)
    assert open_run(off, tmp_path, "run", {}, {}) is None
    logger = build_logger(off, tmp_path)
    logger.log(1, {"loss": 1.0})
    logger.close("FINISHED")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"tracking\.enabled"):
        sync(off, tmp_path)


def test_the_uri_is_absolute_and_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrackingConfig(uri="sqlite:///m.db").uri == f"sqlite:///{tmp_path}/m.db"
    assert tracking_uri(TrackingConfig(), tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tmp_path.name in ui_command(TrackingConfig(), tmp_path)
    database = TrackingConfig(uri="postgresql://me@host/x")  # a user name is no secret, but is not shown either
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
def test_a_uri_with_a_secret_is_refused(uri):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        TrackingConfig(uri=uri)
    assert "without a password" in str(refused.value)


def test_secrets_in_parameters_are_redacted(uri, storage):
    given = {"tracking.uri": "https://me:pw@host", "data.train": "https://host/x?sslmode=on&Password=pw&a=b"}
    run_id = open_run(DEFAULT, storage, "s", given, {})
    params = client(uri).get_run(run_id).data.params
    assert params["tracking.uri"] == "https://***@host"
    assert params["data.train"] == "https://host/x?sslmode=on&Password=***&a=b"
    assert "pw" not in (storage / "s" / RECORD_FILE).read_text()
