"""MLflow as deployed: several writers, a server that is killed, PostgreSQL and an S3-compatible artifact store."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.tree import compose, dump
from pais_ray.inference.serving import registry
from pais_ray.tracking import tracker as tracker_module
from pais_ray.tracking.record import read_run_id
from pais_ray.tracking.settings import TrackingConfig, tracking_uri
from pais_ray.tracking.tracker import MLflowTracker, sync
from tests.support.mlflow_runs import client, history, open_test_run, tiny_run, write_checkpoint, write_row
from tests.support.servers import mlflow_server, postgres
from tests.support.waiting import wait_for

pytestmark = pytest.mark.server

WRITERS, ROWS, METRICS = 8, 8, 2


def test_eight_writers_on_a_new_sqlite_store_lose_nothing(tmp_path):
    """Real processes, forked from one that has imported mlflow; the database does not exist yet."""
    work = f"""
import os, sys
from pathlib import Path
import pais_ray.tracking.mirror
from pais_ray.tracking.settings import TrackingConfig
from pais_ray.tracking.tracker import MLflowTracker
from tests.support.mlflow_runs import open_test_run, write_row

def write(name):
    root = open_test_run(Path({str(tmp_path)!r}), name)
    tracker = MLflowTracker(TrackingConfig(), root)
    for step in range({ROWS}):
        write_row(root, step, **{{f"loss/{{i}}": step + i / 10 for i in range({METRICS})}})
        tracker.log(step, {{}})
    tracker.close("FINISHED", timeout=120)

writers = []
for i in range({WRITERS}):
    if not (pid := os.fork()):
        write(f"writer_{{i}}")
        os._exit(0)
    writers.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in writers]))
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no writer logged a warning"
    uri = tracking_uri(TrackingConfig(), tmp_path)
    [experiment] = [e for e in client(uri).search_experiments() if e.name == "pais_ray"]
    runs = client(uri).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"writer_{i}" for i in range(WRITERS)]
    for run in runs:
        assert run.info.status == "FINISHED"
        for i in range(METRICS):
            expected = [(step, step + i / 10) for step in range(ROWS)]
            assert history(uri, run.info.run_id, f"loss/{i}") == expected


def test_runs_are_stored_in_postgres_and_s3(tmp_path, bucket, tiny_coco, monkeypatch):
    """The deployment of docs/guides/compare.md: `mlflow server` with PostgreSQL and an S3-compatible artifact store."""
    import boto3

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # MLflow warns if it is unset
    with postgres(tmp_path) as database, mlflow_server(tmp_path, database, f"s3://{bucket}/runs") as server:
        config = TrackingConfig(uri=server.url)
        roots = [
            tiny_run(tiny_coco, tmp_path / "runs", name, ap, f"tracking.uri={server.url}")
            for name, ap in (("a", 0.2), ("b", 0.3))
        ]
        (roots[0] / "figures" / "curves.png").write_bytes(b"a picture")
        assert sync(config, roots[0]) == {"metrics": 0, "artifacts": 1, "checkpoints": 0}
        assert sync(config, roots[0]) == {"metrics": 0, "artifacts": 0, "checkpoints": 0}
        (roots[0] / "mlflow_run_id").unlink()  # the run is then found by its key
        assert sync(config, roots[0]) == {"metrics": 0, "artifacts": 0, "checkpoints": 0}
        store = client(server.url)
        ids = [read_run_id(root) for root in roots]
        for run_id, ap in zip(ids, (0.2, 0.3), strict=True):
            assert history(server.url, run_id, "teacher/segm_AP") == [(2, ap)]
            assert store.get_run(run_id).inputs.dataset_inputs[0].dataset.digest
        versions = [registry.register(root, "shapes") for root in roots]
        registry.promote(server.url, "shapes")
        assert str(store.get_registered_model("shapes").aliases["champion"]) == "2"
        with pytest.raises(registry.PromotionRefusedError, match="worse"):
            registry.promote(server.url, "shapes", versions[0].version)
        keys = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
        for name in ("figures/curves.png", "config.yaml", "teacher.safetensors", "MLmodel"):
            assert any(key.startswith("runs/") and key.endswith(name) for key in keys)
        copy = store.download_artifacts(ids[0], "figures/curves.png", str(tmp_path))
        assert Path(copy).read_bytes() == b"a picture"


def test_a_server_that_starts_late_and_is_killed_gets_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_module, "POLL_INTERVAL", 0.1)
    server = mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts"))
    config = TrackingConfig(uri=server.url)

    def train(root: Path, steps: range) -> None:
        for step in steps:
            write_row(root, step, loss=float(step))
        write_row(root, steps[-1], **{"teacher/segm_AP": steps[-1] / 10})
        write_checkpoint(root, steps[-1])
        (root / "figures").mkdir(exist_ok=True)
        (root / "figures" / f"{steps[-1]}.png").write_bytes(b"png")
        tracker.log(steps[-1], {})

    def is_stored(upto: int, checkpoints: int) -> bool:
        run_id = read_run_id(root)
        if run_id is None or history(server.url, run_id, "loss") != [(i, float(i)) for i in range(1, upto + 1)]:
            return False
        run = client(server.url).get_run(run_id)
        figures = client(server.url).list_artifacts(run_id, "figures")
        return len(run.outputs.model_outputs if run.outputs else []) == len(figures) == checkpoints

    try:
        root = open_test_run(tmp_path / "runs", "run", config)
        assert read_run_id(root) is None, "the server has not started"
        (root / "config.yaml").write_text(dump(compose(["quickstart", f"tracking.uri={server.url}"])))
        tracker = MLflowTracker(config, root)
        train(root, range(1, 4))
        server.start()
        wait_for(lambda: is_stored(3, 1))
        server.kill()
        train(root, range(4, 7))
        tracker.close("FINISHED")
        failed = CliRunner().invoke(main, ["sync", str(root)])
        assert failed.exit_code == 1
        server.start()
        done = CliRunner().invoke(main, ["sync", str(root)])
        assert done.exit_code == 0, done.output
        assert "sent 4 metric values, 1 figures and metadata files, 1 checkpoints" in done.output
        assert is_stored(6, 2)
        assert client(server.url).get_run(read_run_id(root)).info.status == "FINISHED"
        again = CliRunner().invoke(main, ["sync", str(root)])
        assert "MLflow is up to date" in again.output
        assert is_stored(6, 2)
    finally:
        server.kill()
