"""The main job on a real cluster: train, resume, kill, evaluate, predict. Every run here is a real one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.tree import compose
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import directory
from pais_ray.runs.checkpoints import checkpoints, newest_verified
from pais_ray.train.driver import launch
from tests.faults.harness import assert_same_end, steps_logged
from tests.support.mlflow_runs import history
from tests.support.servers import mlflow_server
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]
STEPS = 8


def words(data: Path, storage: Path, name: str, *more: str, segmentor: str = "mask_rcnn") -> list[str]:
    """Two workers, 12 images of 96 px, a quarter of them labeled."""
    return [
        *("synthetic", segmentor, "pais"),
        *(f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"),
        *("data.image_size=64", "data.labeled=0.25", "batch.labeled=1", "batch.unlabeled=1"),
        *("segmentor.preset=nano", "segmentor.weights=null", "method.burn_in=2", "method.tau_cls=0.05"),
        *("optim.lr=0.02", f"train.steps={STEPS}", "train.eval_every=4", "train.checkpoint_every=2"),
        *("train.log_every=1", "train.panel_every=6", "train.keep_checkpoints=9", "scaling.num_workers=2"),
        *(f"run.storage_path={storage}", f"run.name={name}", f"tracking.uri=sqlite:///{storage}/mlflow.db"),
        *more,
    ]


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_coco, storage) -> Path:
    result = launch.train(compose(words(tiny_coco, storage, "undisturbed")))
    assert (result.step, result.stopped) == (STEPS, False)
    return storage / "undisturbed"


def test_a_run_writes_its_files(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} >= {
        "config.yaml",
        "split.json",
        "metrics.jsonl",
        "checkpoints",
        "figures",
    }
    assert steps_logged(undisturbed) == list(range(1, STEPS + 1))
    rows = metric_rows(undisturbed)
    for role in ("teacher", "student"):
        assert [r["step"] for r in rows if f"{role}/segm_AP" in r] == [4, STEPS]
    logged = next(r for r in rows if "loss" in r)
    for name in (
        "loss",
        "labeled/mask",
        "lr",
        "ema_decay",
        "grad_norm",
        "time/img_per_s",
        "time/data_wait_share",
    ):
        assert name in logged
    assert any("pseudo/kept_per_image" in r for r in rows)
    figures = {p.name for p in (undisturbed / "figures").iterdir()}
    assert {"curves.png", "pseudo_labels_00000006.png"} <= figures


def test_mlflow_has_the_settings_metrics_and_files_of_the_run(undisturbed, storage):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run((undisturbed / "mlflow_run_id").read_text().strip())
    assert run.info.status == "FINISHED"
    assert run.data.params["method.alpha"] == "4.0"
    split = json.loads((undisturbed / "split.json").read_text())
    expected = {"method": "pais", "segmentor": "mask_rcnn", "preset": "nano", "backbone": "resnet18"}
    expected |= {
        "labels_pct": "25",
        "fold": "1",
        "split_sha256": split["sha256"],
        "data_sha256": split["source_sha256"],
    }
    assert expected.items() <= run.data.tags.items()
    digests = {d.tags[0].value: d.dataset.digest for d in run.inputs.dataset_inputs}
    assert digests == {"training": split["source_sha256"][:32], "validation": run.data.tags["val_sha256"][:32]}
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == list(range(1, STEPS + 1))
    assert {"teacher/segm_AP", "student/bbox_AP50"} <= run.data.metrics.keys()
    assert "system/node_0/cpu_utilization_percentage" in run.data.metrics
    figures = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "figures")}
    assert figures == {"pseudo_labels_00000006.png", "curves.png", "predictions.png"}
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert {m.name for m in models} == {f"{r}-{s:08d}" for r in ("teacher", "student") for s in (4, STEPS)}
    assert all(Path(m.tags["path"]).is_dir() for m in models)


def test_a_finished_run_is_reported_as_finished(undisturbed, tiny_coco, storage, capsys):
    before = newest_verified(undisturbed)[0].stat().st_mtime_ns
    result = launch.train(compose(words(tiny_coco, storage, "undisturbed")))
    assert result.step == STEPS
    assert "is finished" in capsys.readouterr().out
    assert newest_verified(undisturbed)[0].stat().st_mtime_ns == before


def test_changed_identity_is_refused_and_free_fields_are_not(undisturbed, tiny_coco, storage, capsys):
    with pytest.raises(ValueError, match=r"method\.alpha"):
        launch.train(compose(words(tiny_coco, storage, "undisturbed", "method.alpha=2")))
    launch.train(compose(words(tiny_coco, storage, "undisturbed", "train.log_every=5")))
    assert "train.log_every: 1 -> 5" in capsys.readouterr().out


@pytest.mark.slow
def test_stop_at_then_the_same_command_is_one_run(undisturbed, tiny_coco, storage, tmp_path):
    """The MLflow server is unavailable during the first half; it receives everything in the second. The scores of step
    4 are removed, as if the machine had failed with a checkpoint of step 6 while they were being computed."""
    server = mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts"))
    there = f"tracking.uri={server.url}"
    half = launch.train(compose(words(tiny_coco, storage, "halves", "train.stop_at=6", there)))
    assert (half.step, half.run_id) == (6, None)
    log = storage / "halves" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "segm_AP" not in line))
    with server:
        whole = launch.train(compose(words(tiny_coco, storage, "halves", there)))
        assert [s for s, _ in history(server.url, whole.run_id, "loss")] == list(range(1, STEPS + 1))
        assert [s for s, _ in history(server.url, whole.run_id, "teacher/segm_AP")] == [4, STEPS]
    assert_same_end(storage / "halves", undisturbed, STEPS)
    assert steps_logged(storage / "halves") == list(range(1, STEPS + 1))


def train_workers() -> list[psutil.Process]:
    """Training processes among the descendants of this process; another Ray on the machine is ignored."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_worker_does_not_change_the_result(undisturbed, tiny_coco, storage, capsys):
    root = storage / "worker_killed"

    def kill_one() -> None:
        wait_for(lambda: 1 in steps_logged(root))
        victim = train_workers()[-1]
        wait_for(lambda: 3 in steps_logged(root) and checkpoints(root))
        victim.kill()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    # A figure per step takes time, so that the kill happens during the run.
    launch.train(compose(words(tiny_coco, storage, "worker_killed", "train.panel_every=1")))
    assert "resumed at step" in capsys.readouterr().out
    assert_same_end(root, undisturbed, STEPS)
    assert steps_logged(root) == list(range(1, STEPS + 1))


def test_ctrl_c_checkpoints_and_the_printed_command_resumes(undisturbed, tiny_coco, storage, cluster):
    root = storage / "interrupted"
    command = [sys.executable, "-m", "pais_ray.cli", "train", *words(tiny_coco, storage, "interrupted")]
    env = {**os.environ, "RAY_ADDRESS": cluster["address"]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Processes that a shell starts in the background ignore SIGINT, and their children inherit this.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    driver = subprocess.Popen([*command, "train.panel_every=1"], env=env, preexec_fn=heed, **pipes)
    wait_for(lambda: 2 in steps_logged(root), lambda: driver.poll() is None)
    # Suspended until the driver has requested the stop: on a slow machine the run could end before that.
    suspended = train_workers()
    try:
        for worker in suspended:
            worker.suspend()
        driver.send_signal(signal.SIGINT)
        output = ""
        while "stopping after this step" not in output:
            line = driver.stdout.readline()
            assert line, output
            output += line
    finally:
        for worker in suspended:
            worker.resume()
    output += driver.communicate()[0]
    assert driver.returncode == 0, output
    assert "Resume with:" in output
    stopped_at = directory.completed_steps(root)
    assert 2 <= stopped_at < STEPS, output
    launch.train(compose(words(tiny_coco, storage, "interrupted")))
    assert_same_end(root, undisturbed, STEPS)


def test_the_same_command_after_a_killed_driver_gives_the_same_result(undisturbed, tiny_coco, storage, cluster):
    root = storage / "driver_killed"
    command = [sys.executable, "-m", "pais_ray.cli", "train", *words(tiny_coco, storage, "driver_killed")]
    env = {**os.environ, "RAY_ADDRESS": cluster["address"]}
    driver = subprocess.Popen([*command, "train.panel_every=1"], env=env, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(checkpoints(root)) >= 2, lambda: driver.poll() is None)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resumed at step" in again.stdout + again.stderr
    assert_same_end(root, undisturbed, STEPS)


@pytest.mark.slow
def test_knet_trains_evaluates_and_predicts(cluster, tiny_coco, storage):
    """A run stopped half way and resumed equals an undisturbed one; evaluate and predict work on it."""

    def knet(name: str, *more: str) -> list[str]:
        # Pseudo-labels from the first step on: after so few steps the masks of all kernels are empty later.
        loose = ("method.tau_cls=0", "method.tau_iou=0", "method.burn_in=0", "optim.lr=0.001")
        return words(tiny_coco, storage, name, *loose, *more, segmentor="knet")

    launch.train(compose(knet("knet")))
    launch.train(compose(knet("knet_halves", "train.stop_at=4")))
    launch.train(compose(knet("knet_halves")))
    assert_same_end(storage / "knet_halves", storage / "knet", STEPS)
    rows = [r for r in metric_rows(storage / "knet") if "loss" in r]
    assert {"labeled/semantic", "unlabeled/class", "unlabeled/mask"} <= rows[-1].keys()
    assert rows[-1]["unlabeled/semantic"] == 0, "pseudo-labels have no semantic loss"
    assert any(r.get("pseudo/kept_per_image", 0) > 0 for r in rows)
    done = CliRunner().invoke(main, ["evaluate", str(storage / "knet")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["predict", str(storage / "knet"), "--out", str(storage / "knet_out")])
    assert done.exit_code == 0, done.output
    assert len(list((storage / "knet_out" / "overlays").iterdir())) == 4


def test_evaluate_and_predict_a_run(undisturbed, storage, tiny_coco):
    out = storage / "evaluated.json"
    done = CliRunner().invoke(main, ["evaluate", str(undisturbed), "--checkpoint", "last", "--json", str(out)])
    assert done.exit_code == 0, done.output
    scored = json.loads(out.read_text())["segm"]["AP"]
    logged = [r["teacher/segm_AP"] for r in metric_rows(undisturbed) if "teacher/segm_AP" in r]
    assert scored == pytest.approx(logged[-1], abs=1e-9)
    done = CliRunner().invoke(main, ["predict", str(undisturbed), "--out", str(storage / "out"), "--score", "0.05"])
    assert done.exit_code == 0, done.output
    listing = json.loads((storage / "out" / "images.json").read_text())["images"]
    assert len(list((storage / "out" / "overlays").iterdir())) == len(listing) == 4
    results = storage / "out" / "results.json"
    done = CliRunner().invoke(
        main, ["evaluate", "--annotations", f"{tiny_coco}/val.json", "--predictions", str(results)]
    )
    assert done.exit_code == 0, done.output


def test_a_truncated_image_ends_the_run_with_its_name(cluster, tiny_coco, storage, tmp_path):
    data = tmp_path / "broken"
    shutil.copytree(tiny_coco, data)
    victims = sorted((data / "images").iterdir())
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.raises(ValueError, match="|".join(re.escape(v.name) for v in victims)):
        launch.train(compose(words(data, storage, "broken")))
