"""A run is tracked in a real store, resumes under its id, and a store that is away costs training nothing."""

import json
import logging
import os
import time

import pytest

from pais_ray import tracking
from pais_ray.tracking import PENDING, Tracker, TrackingConfig, open_run, tracking_uri, ui_command

NOWHERE = TrackingConfig(uri="http://127.0.0.1:1")


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """A storage path whose database exists: making one takes seconds."""
    folder = tmp_path_factory.mktemp("storage")
    config = TrackingConfig()
    assert open_run(config, folder, "first", {}, {}) is not None
    return folder


@pytest.fixture
def run(storage, tmp_path):
    """A run directory under the storage path, and its run."""
    folder = storage / tmp_path.name
    folder.mkdir()
    params = {"optim.lr": 0.01, "data.train": "x" * 1000, "method.tau_cls": 0.35}
    return folder, open_run(TrackingConfig(), storage, folder.name, params, {"fold": "1", "method": "pais"})


def client(storage):
    return tracking._client(tracking_uri(TrackingConfig(), storage))


def history(storage, run_id, name):
    return {m.step: m.value for m in client(storage).get_metric_history(run_id, name)}


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, pais_ray.tracking; sys.exit('mlflow' in sys.modules)"
    assert os.spawnv(os.P_WAIT, os.sys.executable, [os.sys.executable, "-c", code]) == 0


def test_a_run_holds_params_tags_and_metrics_by_absolute_step(storage, run):
    folder, run_id = run
    tracker = Tracker(TrackingConfig(), folder, run_id)
    for step in range(100, 105):
        tracker.log_metrics({"labeled/mask": 1 / step, "teacher/segm_AP_class/it's (odd)": 0.5}, step)
    tracker.set_tags({"checkpoint": "last"})
    tracker.close()
    stored = client(storage).get_run(run_id)
    assert history(storage, run_id, "labeled/mask") == {step: 1 / step for step in range(100, 105)}
    assert history(storage, run_id, "teacher/segm_AP_class/it_s _odd_") == dict.fromkeys(range(100, 105), 0.5)
    assert stored.data.params["optim.lr"] == "0.01"
    assert len(stored.data.params["data.train"]) == 500
    assert stored.data.tags["fold"] == "1"
    assert stored.data.tags["checkpoint"] == "last"
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == folder.name
    assert not (folder / PENDING).exists()


def test_values_that_are_not_finite_are_seen_but_do_not_ruin_a_chart(storage, run):
    folder, run_id = run
    tracker = Tracker(TrackingConfig(), folder, run_id)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"loss": float("nan"), "other": float("inf")}, 2)
    tracker.log_metrics({}, 3)
    tracker.close()
    assert history(storage, run_id, "loss") == {1: 1.0}
    assert history(storage, run_id, "nonfinite/loss") == {2: 1.0}
    assert history(storage, run_id, "nonfinite/other") == {2: 1.0}


def test_a_run_resumes_under_its_id(storage, run):
    folder, run_id = run
    first = Tracker(TrackingConfig(), folder, run_id)
    first.log_metrics({"loss": 2.0}, 10)
    first.close("KILLED")
    assert client(storage).get_run(run_id).info.status == "KILLED"
    again = open_run(
        TrackingConfig(), storage, folder.name, {"optim.lr": 0.01, "method.tau_cls": 0.5, "new": 1}, {}, run_id
    )
    assert again == run_id
    assert client(storage).get_run(run_id).info.status == "RUNNING"
    second = Tracker(TrackingConfig(), folder, run_id)
    second.log_metrics({"loss": 1.0}, 11)
    second.close(None)
    stored = client(storage).get_run(run_id)
    assert history(storage, run_id, "loss") == {10: 2.0, 11: 1.0}
    assert stored.info.status == "RUNNING"
    assert stored.data.params["method.tau_cls"] == "0.35"
    assert stored.data.params["new"] == "1"
    assert stored.data.tags["resumed.method.tau_cls"] == "0.5"
    assert "resumed.optim.lr" not in stored.data.tags


def test_a_run_id_that_the_store_does_not_know_gives_a_new_run(storage, caplog):
    run_id = open_run(TrackingConfig(), storage, "moved", {}, {}, run_id="0" * 32)
    assert run_id not in (None, "0" * 32)
    assert "has no run" in caplog.text


def test_artifacts_lie_beside_the_database(storage, run):
    folder, run_id = run
    (folder / "config.yaml").write_text("a: 1")
    tracker = Tracker(TrackingConfig(), folder, run_id)
    tracker.log_artifact(folder / "config.yaml")
    tracker.log_artifact(folder / "config.yaml", "figures")
    tracker.close()
    assert {f.path for f in client(storage).list_artifacts(run_id)} == {"config.yaml", "figures"}
    assert list((storage / "mlflow_artifacts").rglob("figures/config.yaml"))


def test_a_file_that_is_gone_does_not_hold_up_the_rest(storage, run, caplog):
    folder, run_id = run
    tracker = Tracker(TrackingConfig(), folder, run_id)
    tracker.log_artifact(folder / "none.png")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    assert history(storage, run_id, "loss") == {1: 1.0}
    assert not (folder / PENDING).exists()
    assert "artifact not tracked" in caplog.text


def test_checkpoints_are_logged_models_ranked_by_their_metric(storage, run):
    folder, run_id = run
    tracker = Tracker(TrackingConfig(), folder, run_id)
    for step, ap in ((100, 0.3), (200, 0.2), (100, 0.4)):  # step 100 is made again after a resume
        tracker.log_checkpoint("teacher", folder / f"checkpoint_{step}", step, {"teacher/segm_AP": ap})
    tracker.close()
    run_info = client(storage).get_run(run_id)
    models = client(storage).search_logged_models(
        [run_info.info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "metrics.teacher/segm_AP", "ascending": False}],
    )
    assert [model.name for model in models] == ["teacher-00000100", "teacher-00000200"]
    assert models[0].status == "READY"
    assert models[0].tags["path"] == str(folder / "checkpoint_100")
    assert models[0].tags["role"] == "teacher"
    assert models[0].tags["step"] == "100"
    assert sorted(output.step for output in run_info.outputs.model_outputs) == [100, 200]


def test_a_dead_server_costs_nothing_and_its_metrics_wait(tmp_path, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert open_run(NOWHERE, tmp_path, "run", {"a": 1}, {}) is None
        assert open_run(NOWHERE, tmp_path, "run", {"a": 1}, {}, "abc") == "abc"
        tracker = Tracker(NOWHERE, tmp_path, "abc")
        logged = time.monotonic()
        for step in range(500):
            tracker.log_metrics({"loss": float(step)}, step)
        assert time.monotonic() - logged < 0.5
        tracker.log_artifact("picture.png", "figures")
        tracker.close(timeout=10)
    assert time.monotonic() - started < 10
    lines = [json.loads(line) for line in (tmp_path / PENDING).read_text().splitlines()]
    assert [e["values"]["loss"] for e in lines if e["kind"] == "metrics"] == list(range(500))
    assert [e["kind"] for e in lines if e["kind"] != "metrics"] == ["artifact", "status"]
    warnings = [r for r in caplog.records if r.name == "pais_ray.tracking"]
    assert len(warnings) == 3, "one of each open_run, one of the tracker"
    assert "tracking.uri" in warnings[-1].message


def test_what_waited_is_sent_by_the_next_tracker_without_ending_the_run(storage, run):
    folder, run_id = run
    lost = Tracker(NOWHERE, folder, run_id)
    lost.log_metrics({"loss": 3.0}, 7)
    lost.close("KILLED", timeout=10)
    with (folder / PENDING).open("a") as file:
        file.write('{"kind": "metr')  # cut short by a full disk
    resumed = Tracker(TrackingConfig(), folder, run_id)
    resumed.log_metrics({"loss": 2.0}, 8)
    resumed.close(None)
    assert history(storage, run_id, "loss") == {7: 3.0, 8: 2.0}
    assert client(storage).get_run(run_id).info.status == "RUNNING"
    assert sorted(p.name for p in folder.iterdir()) == []


def test_sending_twice_is_sending_once(storage, run):
    """A process that dies between the store's answer and its own note of it sends again."""
    folder, run_id = run
    lost = Tracker(NOWHERE, folder, run_id)
    lost.log_metrics({"loss": 3.0}, 7)
    lost.log_checkpoint("student", folder / "c", 7, {"student/segm_AP": 0.3})
    lost.close(None, timeout=10)
    waiting = (folder / PENDING).read_text()
    for _ in range(2):
        (folder / PENDING).with_suffix(".sending").write_text(waiting)
        tracker = Tracker(TrackingConfig(), folder, run_id)
        tracker.set_tags({"ok": "yes"})
        tracker.close()
        assert not (folder / PENDING).exists()
    assert len(client(storage).get_metric_history(run_id, "loss")) == 1
    assert len(client(storage).get_metric_history(run_id, "student/segm_AP")) == 1
    assert len(client(storage).get_run(run_id).outputs.model_outputs) == 1


def test_an_event_that_fails_for_ever_is_given_up(storage, run, monkeypatch):
    folder, run_id = run
    send = tracking._Store.send

    def poisoned(self, events):
        if events[0]["kind"] == "tags":
            raise RuntimeError("bug in the store")
        send(self, events)

    monkeypatch.setattr(tracking._Store, "send", poisoned)
    monkeypatch.setattr(tracking, "ATTEMPTS", 1)
    monkeypatch.setattr(tracking, "MAX_FAILURES", 2)
    first = Tracker(TrackingConfig(), folder, run_id)
    first.set_tags({"bad": "1"})
    first.close(None)
    for left in (1, 0):
        assert (folder / PENDING).exists()
        again = Tracker(TrackingConfig(), folder, run_id)
        again.close(None)
        assert (folder / PENDING).exists() == bool(left)


def test_a_store_that_comes_back_gets_what_it_missed(storage, run, monkeypatch):
    folder, run_id = run
    away = [True]
    send = tracking._Store.send

    def sometimes(self, events):
        if away[0]:
            raise ConnectionError("away")
        send(self, events)

    monkeypatch.setattr(tracking._Store, "send", sometimes)
    monkeypatch.setattr(tracking, "ATTEMPTS", 1)
    tracker = Tracker(TrackingConfig(), folder, run_id)
    tracker.log_metrics({"loss": 1.0}, 1)
    deadline = time.monotonic() + 5
    while not (folder / PENDING).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    away[0] = False
    tracker._next_knock = 0.0
    tracker.log_metrics({"loss": 2.0}, 2)
    tracker.close()
    assert history(storage, run_id, "loss") == {1: 1.0, 2: 2.0}
    assert not (folder / PENDING).exists()


def test_a_full_queue_and_a_slow_store_neither_block_nor_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking._Store, "__init__", lambda self, uri, run_id: time.sleep(3))
    tracker = Tracker(NOWHERE, tmp_path, "abc", capacity=5)
    started = time.monotonic()
    for step in range(50):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.close(timeout=0.2)
    tracker.log_metrics({"loss": 1.0}, 99)
    tracker.close()
    assert time.monotonic() - started < 1.5
    steps = [json.loads(line).get("step") for line in (tmp_path / PENDING).read_text().splitlines()]
    assert {s for s in steps if s is not None} == set(range(50))


def test_nothing_to_write_to_is_survived(tmp_path):
    tracker = Tracker(NOWHERE, tmp_path / "not" / "there", "abc")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close(timeout=10)
    assert not (tmp_path / "not").exists()


def test_disabled_tracking_does_nothing(tmp_path):
    off = TrackingConfig(enabled=False)
    assert open_run(off, tmp_path, "run", {}, {}) is None
    tracker = Tracker(off, tmp_path, None)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_the_uri_is_absolute_and_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrackingConfig(uri="sqlite:///m.db").uri == f"sqlite:///{tmp_path}/m.db"
    assert tracking_uri(TrackingConfig(), tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tmp_path.name in ui_command(TrackingConfig(), tmp_path)
    assert ui_command(TrackingConfig(uri="https://me:secret@host/x"), tmp_path) == "https://***@host/x"
    for uri in ("./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(ValueError, match="sqlite"):
            TrackingConfig(uri=uri)
    with pytest.raises(ValueError, match="extra"):
        TrackingConfig(url="x")


def test_secrets_do_not_become_parameters(storage):
    run_id = open_run(TrackingConfig(), storage, "s", {"tracking.uri": "https://me:pw@host"}, {})
    assert client(storage).get_run(run_id).data.params["tracking.uri"] == "https://***@host"
