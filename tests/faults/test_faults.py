"""Runs under scripted faults. `make test` has the first of them; `make test-faults` all, MINUTES long.

Figures go to faults.json in the working directory, for docs/measurements/reliability.md.
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
    """start(name, steps, words...) -> (driver, run directory); nothing of it is left running."""
    drivers = []

    def begin(name: str, steps: int, *more: str):
        driver = Driver(words(tiny_coco, storage, name, steps, *more), cluster["address"], tmp_path / f"{name}.log")
        drivers.append(driver)
        return driver, storage / name

    yield begin
    for driver in drivers:
        if driver.going():
            driver.kill()


def report(**figures) -> None:
    path = Path("faults.json")
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**told, **figures}, indent=1))


def faulty(tmp_path: Path | None, **faults: tuple[int, int]) -> list[str]:
    """Words of the segmentor that fails; name=(first row, rows)."""
    once = [] if tmp_path is None else [f"segmentor.once={tmp_path}"]
    return [
        "segmentor.name=tests.faults.faulty",
        f"segmentor.fault={'+'.join(faults)}",
        f"segmentor.first={[first for first, _ in faults.values()]}",
        f"segmentor.rows={[rows for _, rows in faults.values()]}",
        *once,
    ]


def test_a_bad_day(start, tmp_path):
    """Losses that are not finite, and a rank that stops: the run ends well.

    2 rows a step: rows 20-27 are steps 10-13, of which two in a row send the run back to step 10.
    """
    brief = ("guards.step_timeout_s=15", "guards.evaluate_timeout_s=120", "guards.save_timeout_s=120")
    steps = 40  # some seconds more than what is waited for, so that the rank stops in a step
    bad = faulty(None, nan_loss=(20, 8))
    driver, root = start("bad_day", steps, *bad, "train.max_consecutive_skips=2", *brief)
    # With the checkpoint behind the bad steps written: what comes after the stop has no more of them.
    wait_for(lambda: last_step(root) >= 16 and checkpoint_folder(root, 15).exists(), driver.going)
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
    guilty = int(re.match(r"rank (\d) hangs: stage '(?:step|evaluate|save)'", stall["text"])[1])
    assert 10 <= stall["step"] < steps
    assert steps_logged(root) == list(range(1, steps + 1))
    state = json.loads((newest(root) / "state.json").read_text())
    assert state["rollbacks"] == len(events(root, "rollback"))
    assert state["g_next"] == 2 * (steps + 2 * state["rollbacks"]), "the data went on"
    assert all(torch.isfinite(v).all() for v in weights(root, steps).values() if v.is_floating_point())
    live = (root / "stacks").glob(f"rank{1 - guilty}_*.txt")  # a stopped process writes nothing
    assert any("Thread" in path.read_text() for path in live)
    assert [r["step"] for r in metric_rows(root) if "teacher/segm_AP" in r] == [20, 40]


@slow
def test_memory_that_runs_out(start, tmp_path):
    """In a forward pass a step is skipped on all ranks; in a backward pass the group starts again with half as many
    pseudo-labels as that step had: 100, while the teacher is so young."""
    driver, root = start("memory", 16, *faulty(tmp_path, oom_forward=(6, 1), oom_backward=(12, 1)))
    output = driver.finish()
    assert "a forward pass ran out of memory; the step was skipped" in output
    assert "at most 50 pseudo-labels an image from now on" in output
    state = json.loads((newest(root) / "state.json").read_text())
    assert (state["cap"], state["step"], state["skipped"]) == (50, 16, 1)
    assert [e["step"] for e in events(root, "start")] == [0, 5]
    assert [e.get("cap") for e in events(root, "out_of_memory")] == [None, 50]
    assert max(r.get("pseudo/kept_per_image", 0) for r in metric_rows(root) if r["step"] > 5) <= 50


@slow
def test_what_is_not_finite_is_skipped_by_all_ranks(start):
    """In the teacher's output, in one rank's gradient; and a rank without pseudo-labels for 50 steps is no trouble."""
    faults = {"nan_teacher": (20, 1), "nan_grad": (25, 1), "empty": (40, 100)}
    driver, root = start("not_finite", 80, *faulty(None, **faults))
    driver.finish()
    state = json.loads((newest(root) / "state.json").read_text())
    assert (state["step"], state["rollbacks"]) == (80, 0)
    assert state["skipped"] == 2
    rows = {r["step"]: r for r in metric_rows(root) if "loss" in r}
    assert [rows[s]["pseudo/skipped_steps"] for s in (10, 11, 12, 13)] == [0, 1, 1, 2]
    lacking = [rows[s] for s in range(21, 71)]
    assert all(r["pseudo/empty_image_rate"] >= 0.5 for r in lacking), "one of two ranks"
    assert sum(r["pseudo/kept_per_image"] > 0 for r in lacking) > 10, "and not the other"
    assert all(torch.isfinite(v).all() for v in weights(root, 80).values() if v.is_floating_point())
    report(not_finite={"steps": 80, "skipped": state["skipped"]})


@slow
def test_labeled_images_without_instances_end_the_run_with_the_reason(start):
    driver, root = start("zero", 60, *faulty(None, zero_loss=(0, 1000)), "guards.zero_loss_steps=10")
    assert driver.process.wait() == 1
    assert "no labeled image has had an instance to learn for 10 steps" in driver.output()
    assert last_step(root) == 10


@slow
def test_the_same_seed_gives_the_same_run_to_the_bit(start, storage):
    for name in ("one", "two"):
        driver, _ = start(name, 12)
        driver.finish()
    assert_same_end(storage / "one", storage / "two", 12)


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_coco, storage, tmp_path_factory):
    """undisturbed(steps) -> the run directory of a run that nothing happened to; made once for each length."""

    def of(steps: int) -> Path:
        root = storage / f"undisturbed_{steps}"
        if not root.exists():
            log = tmp_path_factory.mktemp("log") / "log"
            Driver(words(tiny_coco, storage, root.name, steps), cluster["address"], log).finish()
        return root

    return of


@slow
def test_kills_of_random_workers(start, undisturbed):
    """KILLS times (fewer where MINUTES are short) SIGKILL at steps drawn by SEED: the end is as if nothing had been."""
    steps, chance = 200, random.Random(SEED)
    goals = sorted(chance.sample(range(1, steps - 5), KILLS))
    driver, root = start("kills", steps)
    recoveries = []
    until = time.monotonic() + 60 * MINUTES
    for goal in goals:
        if time.monotonic() > until:
            break
        wait_for(lambda goal=goal: last_step(root) >= goal, driver.going)
        recoveries.append(kill_worker(root, psutil.Process(), chance, driver.going))
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    assert len(recoveries) == KILLS or MINUTES < 20, f"{len(recoveries)} kills in {MINUTES} minutes"
    lost, seconds = [r.lost for r in recoveries], sorted(r.seconds for r in recoveries)
    assert max(lost) <= 5 + 5, "the interval and what was made while a checkpoint was written"
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
def test_workers_that_die_while_the_group_is_made(start, undisturbed):
    """Three times, before any of them trains: Ray gives up in some of these moments, the run does not."""
    steps, chance, kills = 40, random.Random(SEED), 3
    driver, root = start("dies_early", steps)
    for _ in range(kills):
        victims = wait_for(lambda: workers(psutil.Process()), driver.going)
        time.sleep(chance.uniform(0, 4))  # somewhere in what a start does
        stop(chance.choice(victims))
        wait_for(lambda gone=victims: not set(gone) & set(workers(psutil.Process())), driver.going)
        assert not checkpoints(root), "it had begun to train"
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    starts, told = len(events(root, "start")), len(events(root, "start_failed"))
    report(early_kills={"kills": kills, "starts_that_trained": starts, "given_up_by_ray": told, "seed": SEED})


@slow
def test_kills_of_the_driver(start, undisturbed):
    """The same command each time."""
    steps, chance, seconds = 40, random.Random(SEED), []
    driver, root = start("driver_kills", steps)
    for _ in range(DRIVER_KILLS):
        goal = last_step(root) + chance.randint(1, 5)
        wait_for(lambda goal=goal: last_step(root) >= goal, driver.going)
        driver.kill()
        began, before = time.monotonic(), len(events(root, "start"))
        driver, _ = start("driver_kills", steps)
        wait_for(lambda before=before: len(events(root, "start")) > before, driver.going)
        resumed = events(root, "start")[-1]["step"]
        wait_for(lambda resumed=resumed: last_step(root) > resumed, driver.going)
        seconds.append(time.monotonic() - began)
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    report(driver_kills={"kills": DRIVER_KILLS, "recovery_s_p50": statistics.median(seconds), "seed": SEED})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x80  # no text any more, where it was one
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip,
    "missing": lambda file: file.unlink(),
}
VICTIMS = ("teacher.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@slow
def test_damaged_checkpoints(start, undisturbed, storage):
    """Truncated, flipped, missing, of four files each: back to the one before; with none left, a refusal."""
    whole, steps = undisturbed(40), 40
    for damage, do in DAMAGES.items():
        for name in VICTIMS:
            root = storage / f"{damage}_{name.split('.')[0]}"
            shutil.copytree(whole, root)
            shutil.rmtree(newest(root))  # the end: there is something to do again
            before = checkpoints(root)[-2].name
            do(newest(root) / name)
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
    """A mount of this test's own, gone at its end; without the right to it a user skips, and CI fails."""
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.environ.get("PAIS_RAY_CI"):
            pytest.fail(f"no mount of our own: {done.stderr}")
        pytest.skip(f"no mount of our own: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", options[-1]], check=False)


@slow
def test_storage_that_is_read_only(start, undisturbed):
    """For two tries at a checkpoint: nothing is lost. From step 22 until after the end: every step is made, the run
    says that its last checkpoint is not there, and the same command makes up for it."""
    steps = 40
    driver, root = start("read_only", steps)
    folder = root / "checkpoints"
    wait_for(lambda: checkpoint_folder(root, 5).exists(), driver.going)
    with mounted("-o", "bind,ro", str(folder), str(folder)):
        wait_for(lambda: "(try 2 of 5)" in driver.output(), driver.going)
    wait_for(lambda: last_step(root) >= 22, driver.going)
    assert not events(root, "checkpoint_failed")
    with mounted("-o", "bind,ro", str(folder), str(folder)):
        assert driver.process.wait() == 1
    assert steps_logged(root) == list(range(1, steps + 1))
    failed = len(events(root, "checkpoint_failed"))
    assert failed >= 3, "of steps 25, 30 and so on"
    last = driver.output().splitlines()[-1]
    assert "step_00000040: the file system is read-only" in last, last
    assert "give the same command again" in last
    driver, _ = start("read_only", steps)
    driver.finish()
    assert_same_end(root, undisturbed(steps), steps)
    report(read_only={"tries_in_vain_then_written": 2, "checkpoints_given_up": failed, "end": "exit 1, then same"})


@slow
def test_a_cluster_of_its_own(tiny_coco, storage, undisturbed, tmp_path):
    """As a user runs it, without a cluster to join: it listens on loopback alone, SIGTERM asks for a checkpoint, and
    a driver that is killed leaves no process. The same command each time."""
    steps, log = 40, tmp_path / "own.log"
    root = storage / "own"
    arguments = words(tiny_coco, storage, "own", steps)
    driver = Driver(arguments, None, log)
    try:
        wait_for(lambda: last_step(root) >= 3, driver.going)
        tree = psutil.Process(driver.process.pid).children(recursive=True)
        listening = {(c.laddr.port, c.laddr.ip.removeprefix("::ffff:"), p.pid) for p in tree for c in listens(p)}
        assert len(listening) > 5, "Ray's servers"
        # torch's rendezvous of a group, in rank 0, knows no address to listen on: docs/guides/security.md.
        open_to_all = [pid for _, address, pid in listening if address not in ("127.0.0.1", "::1")]
        assert len(open_to_all) <= 1
        assert set(open_to_all) <= {p.pid for p in workers(psutil.Process(driver.process.pid))}
        driver.process.send_signal(signal.SIGTERM)
        assert "Resume with:" in driver.finish()
        stopped = newest(root)
        assert 3 <= int(stopped.name[5:]) < steps
        driver = Driver(arguments, None, log)
        wait_for(lambda: len(events(root, "start")) == 2 and newest(root) > stopped, driver.going)
        tree = psutil.Process(driver.process.pid).children(recursive=True)
        driver.kill()
        wait_for(lambda: not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
        driver = Driver(arguments, None, log)
        driver.finish()
    finally:
        if driver.going():
            driver.kill()
    assert_same_end(root, undisturbed(steps), steps)
    report(own_cluster={"listening": len(listening), "of_torch": len(open_to_all), "sigterm": "exit 0", "end": "same"})


def listens(process: psutil.Process) -> list:
    """The sockets on which a process waits for others."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    return []


@slow
def test_a_disk_that_is_full_for_a_while(cluster, tiny_coco, undisturbed, tmp_path):
    """Checkpoints fail and are told with the need; training goes on; with room again the end is the same."""
    room = tmp_path / "room"
    room.mkdir()
    steps, root = 40, room / "full"
    with mounted("-t", "tmpfs", "-o", "size=1500m", "tmpfs", str(room)):
        more = (f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "train.panel_every=4")  # pictures have no room either
        arguments = words(tiny_coco, room, "full", steps, *more)
        driver = Driver(arguments, cluster["address"], tmp_path / "full.log")
        wait_for(lambda: checkpoint_folder(root, 10).exists(), driver.going)
        ballast = room / "ballast"
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass
        wait_for(lambda: "training goes on without it" in driver.output(), driver.going)
        failed_at = last_step(root)
        ballast.unlink()
        output = driver.finish()
        assert "no space left: " in output
        assert "the picture of the pseudo-labels was not written" in output
        assert_same_end(root, undisturbed(steps), steps)
        report(full_disk={"steps_logged_when_given_up": failed_at, "end": "same"})


@slow
def test_a_worker_that_stands_still(start, undisturbed):
    """SIGSTOP for longer than the watchdog allows: it is named, killed, and the run ends as if nothing had been."""
    steps = 40
    driver, root = start("stands_still", steps, "guards.step_timeout_s=15")
    wait_for(lambda: last_step(root) >= 12, driver.going)
    victim = workers(psutil.Process())[0]
    began = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: events(root, "stall"), driver.going)
        noticed = time.monotonic() - began
        driver.finish()
    finally:
        stop(victim)
    assert_same_end(root, undisturbed(steps), steps)
    report(stopped={"limit_s": 15, "noticed_s": noticed})


@slow
def test_a_tracking_server_that_is_away(start, undisturbed, tmp_path):
    """Not up when the run starts, killed in the middle, away at the end: the run is as if nothing had been, and
    `sync` sends what the server lacks."""
    steps, server = 40, mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts"))
    driver, root = start("tracking", steps, f"tracking.uri={server.url}")
    try:
        wait_for(lambda: last_step(root) >= 5, driver.going)
        server.start()
        wait_for(lambda: last_step(root) >= 15, driver.going)
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
