"""Runs under scripted faults. `make test` runs the first test; `make test-faults` runs all, for MINUTES minutes.

Measurements are written to faults.json in the working directory, for docs/measurements/reliability.md.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from pais_ray.cli import main
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs.checkpoints import checkpoint_folder, checkpoints
from pais_ray.runs.directory import read_pseudo_label_limit
from pais_ray.tracking.record import read_run_id
from tests.faults.harness import (
    Driver,
    assert_same_end,
    events,
    kill_worker,
    last_step,
    newest,
    steps_logged,
    stop,
    weights,
    words,
    workers,
)
from tests.support.servers import mlflow_server
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]
MINUTES = float(os.environ.get("MINUTES", "20"))
KILLS, DRIVER_KILLS = 20, 5
SEED = int(os.environ.get("SEED", "0"))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def start(cluster, tiny_coco, storage, tmp_path):
    """start(name, steps, words...) -> (driver, run directory). Drivers that still run at the end are killed."""
    drivers = []

    def begin(name: str, steps: int, *more: str):
        driver = Driver(words(tiny_coco, storage, name, steps, *more), cluster["address"], tmp_path / f"{name}.log")
        drivers.append(driver)
        return driver, storage / name

    yield begin
    for driver in drivers:
        if driver.is_running():
            driver.kill()


def report(**figures) -> None:
    path = Path("faults.json")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**earlier, **figures}, indent=1))


def faulty(tmp_path: Path | None, **faults: tuple[int, int]) -> list[str]:
    """Overrides that select the failing segmentor; name=(first row, number of rows)."""
    once = [] if tmp_path is None else [f"segmentor.once={tmp_path}"]
    return [
        "segmentor.name=tests.faults.faulty",
        f"segmentor.fault={'+'.join(faults)}",
        f"segmentor.first={[first for first, _ in faults.values()]}",
        f"segmentor.rows={[rows for _, rows in faults.values()]}",
        *once,
    ]


def test_skipped_steps_and_a_stopped_rank(start, tmp_path):
    """Losses that are not finite, and a stopped process: the run completes.

    With 2 rows per step, rows 20-27 are steps 10-13; two consecutive ones return the run to step 10.
    """
    limits = ("guards.step_timeout_s=15", "guards.evaluate_timeout_s=120", "guards.save_timeout_s=120")
    steps = 40  # enough to continue for some seconds after the wait, so that the rank is stopped during a step
    nan_losses = faulty(None, nan_loss=(20, 8))
    driver, root = start("bad_day", steps, *nan_losses, "train.max_consecutive_skips=2", *limits)
    # Until the checkpoint after the skipped steps is written, so that a restart does not repeat them.
    wait_for(lambda: last_step(root) >= 16 and checkpoint_folder(root, 15).exists(), driver.is_running)
    stopped = workers(psutil.Process())[-1]
    stopped.send_signal(signal.SIGSTOP)
    try:
        output = driver.finish()
    finally:
        stop(stopped)
    assert "back from step 12 to step_00000010" in output
    (back,) = events(root, "rollback")[:1]
    assert (back["from"], back["step"]) == (12, 10)
    stall = events(root, "stall")[0]
    stuck = int(re.match(r"rank (\d) hangs: stage '(?:step|evaluate|save)'", stall["text"])[1])
    assert 10 <= stall["step"] < steps
    assert steps_logged(root) == list(range(1, steps + 1))
    state = json.loads((newest(root) / "state.json").read_text())
    assert state["rollbacks"] == len(events(root, "rollback"))
    assert state["g_next"] == 2 * (steps + 2 * state["rollbacks"]), "the data continued after the skipped steps"
    assert all(torch.isfinite(v).all() for v in weights(root, steps).values() if v.is_floating_point())
    live = (root / "stacks").glob(f"rank{1 - stuck}_*.txt")  # a stopped process writes nothing
    assert any("Thread" in path.read_text() for path in live)
    assert [r["step"] for r in metric_rows(root) if "teacher/segm_AP" in r] == [20, 40]


@slow
def test_out_of_memory(start, tmp_path):
    """In a forward pass, the step is skipped on all ranks. In a backward pass, the group restarts with half as many
    pseudo-labels as the step had: 100, because the teacher is hardly trained."""
    driver, root = start("memory", 16, *faulty(tmp_path, oom_forward=(6, 1), oom_backward=(12, 1)))
    output = driver.finish()
    assert "a forward pass ran out of memory; the step was skipped" in output
    assert "at most 50 pseudo-labels per image from now on" in output
    state = json.loads((newest(root) / "state.json").read_text())
    assert (state["step"], state["skipped"]) == (16, 1)
    assert read_pseudo_label_limit(root, 100) == 50
    assert [e["step"] for e in events(root, "start")] == [0, 5]
    assert [e.get("cap") for e in events(root, "out_of_memory")] == [None, 50]
    assert max(r.get("pseudo/kept_per_image", 0) for r in metric_rows(root) if r["step"] > 5) <= 50


@slow
def test_steps_that_are_not_finite_are_skipped_by_all_ranks(start):
    """NaN in the output of the teacher and in the gradient of one rank. A rank without pseudo-labels is no failure."""
    faults = {"nan_teacher": (20, 1), "nan_grad": (25, 1), "empty": (40, 100)}
    driver, root = start("not_finite", 80, *faulty(None, **faults))
    driver.finish()
    state = json.loads((newest(root) / "state.json").read_text())
    assert (state["step"], state["rollbacks"]) == (80, 0)
    assert state["skipped"] == 2
    rows = {r["step"]: r for r in metric_rows(root) if "loss" in r}
    assert [rows[s]["pseudo/skipped_steps"] for s in (10, 11, 12, 13)] == [0, 1, 1, 2]
    one_rank_empty = [rows[s] for s in range(21, 71)]
    assert all(r["pseudo/empty_image_rate"] >= 0.5 for r in one_rank_empty), "one of two ranks"
    assert sum(r["pseudo/kept_per_image"] > 0 for r in one_rank_empty) > 10, "and not the other"
    assert all(torch.isfinite(v).all() for v in weights(root, 80).values() if v.is_floating_point())
    report(not_finite={"steps": 80, "skipped": state["skipped"]})


@slow
def test_labeled_images_without_instances_end_the_run_with_the_reason(start):
    driver, root = start("zero", 60, *faulty(None, zero_loss=(0, 1000)), "guards.zero_loss_steps=10")
    assert driver.process.wait() == 1
    assert "no labeled image had an instance for 10 steps" in driver.output()
    assert last_step(root) == 10


@slow
def test_the_same_seed_gives_the_same_run_bit_for_bit(start, storage):
    for name in ("one", "two"):
        driver, _ = start(name, 12)
        driver.finish()
    assert_same_end(storage / "one", storage / "two", 12)


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_coco, storage, tmp_path_factory):
    """undisturbed(steps) -> the directory of a run without faults; one run per number of steps."""

    def of(steps: int) -> Path:
        root = storage / f"undisturbed_{steps}"
        if not root.exists():
            log = tmp_path_factory.mktemp("log") / "log"
            Driver(words(tiny_coco, storage, root.name, steps), cluster["address"], log).finish()
        return root

    return of


@slow
def test_kills_of_random_workers(start, undisturbed):
    """KILLS times (fewer if MINUTES are few) SIGKILL at steps drawn with SEED: the result is that of a run without."""
    steps, chance = 200, random.Random(SEED)
    goals = sorted(chance.sample(range(1, steps - 5), KILLS))
    driver, root = start("kills", steps)
    recoveries = []
    until = time.monotonic() + 60 * MINUTES
    for goal in goals:
        if time.monotonic() > until:
            break
        wait_for(lambda goal=goal: last_step(root) >= goal, driver.is_running)
        recoveries.append(kill_worker(root, psutil.Process(), chance, driver.is_running))
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    assert len(recoveries) == KILLS or MINUTES < 20, f"{len(recoveries)} kills in {MINUTES} minutes"
    lost, seconds = [r.lost for r in recoveries], sorted(r.seconds for r in recoveries)
    assert max(lost) <= 5 + 5, "the interval, and the steps during the writing of a checkpoint"
    report(
        worker_kills={
            "kills": len(recoveries),
            "lost_max": max(lost),
            "lost_p95": percentile(sorted(lost), 0.95),
            "recovery_s_p50": statistics.median(seconds),
            "recovery_s_p95": percentile(seconds, 0.95),
            "seed": SEED,
        }
    )


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@slow
def test_workers_that_die_while_the_group_starts(start, undisturbed):
    """Three times, before any worker trains. Ray gives up in some of these cases; the run must not."""
    steps, chance, kills = 40, random.Random(SEED), 3
    driver, root = start("dies_early", steps)
    for _ in range(kills):
        victims = wait_for(lambda: workers(psutil.Process()), driver.is_running)
        time.sleep(chance.uniform(0, 4))  # at a random point of the start
        stop(chance.choice(victims))
        wait_for(lambda gone=victims: not set(gone) & set(workers(psutil.Process())), driver.is_running)
        assert not checkpoints(root), "training had already started"
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    starts, failed = len(events(root, "start")), len(events(root, "start_failed"))
    report(early_kills={"kills": kills, "starts_that_trained": starts, "given_up_by_ray": failed, "seed": SEED})


@slow
def test_kills_of_the_driver(start, undisturbed):
    """The same command each time."""
    steps, chance, seconds = 40, random.Random(SEED), []
    driver, root = start("driver_kills", steps)
    for _ in range(DRIVER_KILLS):
        goal = last_step(root) + chance.randint(1, 5)
        wait_for(lambda goal=goal: last_step(root) >= goal, driver.is_running)
        driver.kill()
        began, before = time.monotonic(), len(events(root, "start"))
        driver, _ = start("driver_kills", steps)
        wait_for(lambda before=before: len(events(root, "start")) > before, driver.is_running)
        resumed = events(root, "start")[-1]["step"]
        wait_for(lambda resumed=resumed: last_step(root) > resumed, driver.is_running)
        seconds.append(time.monotonic() - began)
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    report(driver_kills={"kills": DRIVER_KILLS, "recovery_s_p50": statistics.median(seconds), "seed": SEED})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x80  # a text file is no longer valid UTF-8
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip,
    "missing": lambda file: file.unlink(),
}
VICTIMS = ("teacher.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@slow
def test_damaged_checkpoints(start, undisturbed, storage):
    """Four files, each truncated, with a flipped bit, or missing: the run resumes from the one before. If all are
    damaged, the run is refused."""
    whole, steps = undisturbed(40), 40
    for damage, damage_file in DAMAGES.items():
        for name in VICTIMS:
            root = storage / f"{damage}_{name.split('.')[0]}"
            shutil.copytree(whole, root)
            shutil.rmtree(newest(root))  # the last one, so that there are steps left
            before = checkpoints(root)[-2].name
            damage_file(newest(root) / name)
            driver, _ = start(root.name, steps)
            output = driver.finish()
            assert "checkpoint skipped" in output
            assert f"from {before}" in output
            assert_same_end(root, whole, steps)
    for folder in checkpoints(root):
        (folder / "student.safetensors").write_bytes(b"")
    driver, _ = start(root.name, steps)
    assert driver.process.wait() == 2
    assert "no usable checkpoint" in driver.output()
    fallbacks = len(DAMAGES) * len(VICTIMS)
    report(damaged={"ways": fallbacks, "fallbacks": fallbacks, "all_damaged": "refused, exit code 2"})


@contextlib.contextmanager
def mounted(*options: str):
    """A mount for the duration of the block. Without the permission to mount, the test is skipped; in CI it fails."""
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.environ.get("PAIS_RAY_CI"):
            pytest.fail(f"the test cannot mount: {done.stderr}")
        pytest.skip(f"the test cannot mount: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", options[-1]], check=False)


@slow
def test_storage_that_is_read_only(start, undisturbed):
    """For two attempts to write a checkpoint: nothing is lost. From step 22 until the end: all steps are made, the run
    reports that its last checkpoint is missing, and the same command completes it."""
    steps = 40
    driver, root = start("read_only", steps)
    folder = root / "checkpoints"
    wait_for(lambda: checkpoint_folder(root, 5).exists(), driver.is_running)
    with mounted("-o", "bind,ro", str(folder), str(folder)):
        wait_for(lambda: "(attempt 2 of 5)" in driver.output(), driver.is_running)
    wait_for(lambda: last_step(root) >= 22, driver.is_running)
    assert not events(root, "checkpoint_failed")
    with mounted("-o", "bind,ro", str(folder), str(folder)):
        assert driver.process.wait() == 1
    assert steps_logged(root) == list(range(1, steps + 1))
    failed = len(events(root, "checkpoint_failed"))
    assert failed >= 3, "of steps 25, 30 and so on"
    last = driver.output().splitlines()[-1]
    assert "step_00000040: the file system is read-only" in last, last
    assert "repeat the command" in last
    driver, _ = start("read_only", steps)
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    report(read_only={"tries_in_vain_then_written": 2, "checkpoints_given_up": failed, "end": "exit 1, then same"})


@slow
def test_a_cluster_of_its_own(tiny_coco, storage, undisturbed, tmp_path):
    """As a user runs it, without an existing cluster: it listens on loopback only, SIGTERM stops it with a checkpoint,
    and a killed driver leaves no process. The command is the same each time."""
    steps, log = 40, tmp_path / "own.log"
    root = storage / "own"
    arguments = words(tiny_coco, storage, "own", steps)
    driver = Driver(arguments, None, log)
    try:
        wait_for(lambda: last_step(root) >= 3, driver.is_running)
        tree = psutil.Process(driver.process.pid).children(recursive=True)
        listening = {(c.laddr.port, c.laddr.ip.removeprefix("::ffff:"), p.pid) for p in tree for c in listens(p)}
        assert len(listening) > 5, "Ray's servers"
        # torch's rendezvous in rank 0 listens on all addresses and cannot be configured: docs/guides/security.md.
        open_to_all = [pid for _, address, pid in listening if address not in ("127.0.0.1", "::1")]
        assert len(open_to_all) <= 1
        assert set(open_to_all) <= {p.pid for p in workers(psutil.Process(driver.process.pid))}
        driver.process.send_signal(signal.SIGTERM)
        assert "Resume with:" in driver.finish()
        stopped = newest(root)
        assert 3 <= int(stopped.name[5:]) < steps
        driver = Driver(arguments, None, log)
        wait_for(lambda: len(events(root, "start")) == 2 and newest(root) > stopped, driver.is_running)
        tree = psutil.Process(driver.process.pid).children(recursive=True)
        driver.kill()
        wait_for(lambda: not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
        driver = Driver(arguments, None, log)
        driver.finish()
    finally:
        if driver.is_running():
            driver.kill()
    assert_same_end(root, undisturbed(steps), steps)
    report(own_cluster={"listening": len(listening), "of_torch": len(open_to_all), "sigterm": "exit 0", "end": "same"})


def listens(process: psutil.Process) -> list:
    """The listening sockets of a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    return []


@slow
def test_a_disk_that_is_full_for_a_while(cluster, tiny_coco, undisturbed, tmp_path):
    """Failed checkpoints are reported with the space that they need, and training continues. The result is the same."""
    room = tmp_path / "room"
    room.mkdir()
    steps, root = 40, room / "full"
    with mounted("-t", "tmpfs", "-o", "size=1500m", "tmpfs", str(room)):
        more = (
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
            "train.panel_every=4",
        )  # figures cannot be written either
        arguments = words(tiny_coco, room, "full", steps, *more)
        driver = Driver(arguments, cluster["address"], tmp_path / "full.log")
        wait_for(lambda: checkpoint_folder(root, 10).exists(), driver.is_running)
        ballast = room / "ballast"
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass
        wait_for(lambda: "training continues without it" in driver.output(), driver.is_running)
        failed_at = last_step(root)
        ballast.unlink()
        output = driver.finish()
        assert "no space left: " in output
        assert "the figure of the pseudo-labels was not written" in output
        assert_same_end(root, undisturbed(steps), steps)
        report(full_disk={"steps_logged_when_given_up": failed_at, "end": "same"})


@slow
def test_a_stopped_worker(start, undisturbed):
    """SIGSTOP for longer than the limit of a step: the rank is named and killed, and the result is the same."""
    steps = 40
    driver, root = start("stands_still", steps, "guards.step_timeout_s=15")
    wait_for(lambda: last_step(root) >= 12, driver.is_running)
    victim = workers(psutil.Process())[0]
    began = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: events(root, "stall"), driver.is_running)
        noticed = time.monotonic() - began
        driver.finish()
    finally:
        stop(victim)
    assert_same_end(root, undisturbed(steps), steps)
    report(stopped={"limit_s": 15, "noticed_s": noticed})


@slow
def test_an_unavailable_tracking_server(start, undisturbed, tmp_path):
    """Not running when the run starts, killed in the middle, unavailable at the end: the result of the run is the same,
    and `sync` sends what the server lacks."""
    steps, server = 40, mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts"))
    driver, root = start("tracking", steps, f"tracking.uri={server.url}")
    try:
        wait_for(lambda: last_step(root) >= 5, driver.is_running)
        server.start()
        wait_for(lambda: last_step(root) >= 15, driver.is_running)
        server.kill()
        driver.finish()
        assert_same_end(root, undisturbed(steps), steps)
        server.start()
        done = CliRunner().invoke(main, ["sync", str(root)])
        assert done.exit_code == 0, done.output
        store = MlflowClient(server.url)
        run = store.get_run(read_run_id(root))
        assert [m.step for m in store.get_metric_history(run.info.run_id, "loss")] == list(range(1, steps + 1))
        assert len(run.outputs.model_outputs) == 4, "two roles, scored twice"
    finally:
        server.kill()
    report(tracking_away={"times": 3, "steps_in_mlflow": steps, "end": "same"})
