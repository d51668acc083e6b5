"""Nodes that die and join: a cluster of several nodes on loopback, and a run that continues."""

import contextlib
import os
import random
import time

import numpy as np
import pytest

from pais_ray.files.json_lines import metric_rows
from tests.faults.harness import Driver, assert_same_end, events, last_step, steps_logged, words
from tests.faults.test_faults import SEED, report
from tests.support.nodes import Nodes, command_line, nodes, processes
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
NODE_KILLS = 3


@contextlib.contextmanager
def running(cluster: Nodes, arguments, log):
    """The driver as a process on the head node, killed at the end of the block."""
    before = dict(os.environ)
    os.environ.update(cluster.env)
    try:
        driver = Driver(arguments, cluster.gcs, log)
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield driver
    finally:
        if driver.is_running():
            driver.kill()


def busy(cluster: Nodes) -> list[int]:
    """Indices of the nodes with a training process, except the head."""

    def has_worker(index: int) -> bool:
        return any("RayTrainWorker" in " ".join(command_line(p)) for p in processes(cluster.running[index]))

    return [i for i in range(1, len(cluster.running)) if cluster.running[i].poll() is None and has_worker(i)]


def test_nodes_that_die(tiny_coco, tmp_path_factory, tmp_path):
    """Three times a node with a worker dies while others have free resources; each time another node joins."""
    chance, steps, seconds = random.Random(SEED), 60, []
    spread = ("scaling.placement_strategy=SPREAD", "scaling.cpus_per_worker=0.5")
    with nodes(tmp_path_factory.mktemp("n"), cpus=[2, 1, 1]) as cluster:
        with running(cluster, words(tiny_coco, tmp_path, "whole", steps, *spread), tmp_path / "whole.log") as driver:
            driver.finish()
        root = tmp_path / "nodes"
        with running(cluster, words(tiny_coco, tmp_path, "nodes", steps, *spread), tmp_path / "log") as driver:
            for _ in range(NODE_KILLS):
                goal = last_step(root) + chance.randint(2, 8)
                wait_for(lambda goal=goal: last_step(root) >= goal, driver.is_running)
                victim = wait_for(lambda: busy(cluster), driver.is_running)[-1]
                starts, began = len(events(root, "start")), time.monotonic()
                cluster.kill(victim)
                wait_for(lambda starts=starts: len(events(root, "start")) > starts, driver.is_running)
                resumed = events(root, "start")[-1]["step"]
                wait_for(lambda resumed=resumed: last_step(root) > resumed, driver.is_running)
                seconds.append(time.monotonic() - began)
                cluster.join(1)
            driver.finish()
    assert_same_end(root, tmp_path / "whole", steps)
    report(node_kills={"kills": NODE_KILLS, "recovery_s": [round(s, 1) for s in seconds], "seed": SEED})


def test_a_run_without_resources_waits_and_reports_what_it_needs(tiny_coco, tmp_path_factory, tmp_path):
    more = ("scaling.placement_strategy=SPREAD", "scaling.cpus_per_worker=0.8")
    with nodes(tmp_path_factory.mktemp("n"), cpus=[1, 1]) as cluster:
        root = tmp_path / "room"
        with running(cluster, words(tiny_coco, tmp_path, "room", 20, *more), tmp_path / "log") as driver:
            wait_for(lambda: last_step(root) >= 6, driver.is_running)
            cluster.kill(1)
            wait_for(lambda: events(root, "no_room"), driver.is_running)
            assert "waiting for resources: 2 workers of 0.8 CPUs" in driver.output()
            assert "the cluster has 1 of 1.6 CPUs" in driver.output()
            cluster.join(1)
            driver.finish()
    assert steps_logged(root) == list(range(1, 21))


def test_workers_that_leave_and_join(tiny_coco, tmp_path_factory, tmp_path):
    """2 -> 1 -> 2 workers: steps use the same rows, and the loss differs from that of a fixed run by rounding only."""
    steps = 160
    elastic = ("scaling.num_workers=[1,2]", "scaling.cpus_per_worker=0.7", "scaling.resize_check_s=5")
    with nodes(tmp_path_factory.mktemp("n"), cpus=[1, 1]) as cluster:
        fixed = words(tiny_coco, tmp_path, "fixed", steps, "scaling.cpus_per_worker=0.7")
        with running(cluster, fixed, tmp_path / "fixed.log") as driver:
            driver.finish()
        root = tmp_path / "elastic"
        with running(cluster, words(tiny_coco, tmp_path, "elastic", steps, *elastic), tmp_path / "log") as driver:
            wait_for(lambda: last_step(root) >= 12, driver.is_running)
            cluster.kill(1)
            wait_for(lambda: [e for e in events(root, "start") if e["workers"] == 1], driver.is_running)
            alone = last_step(root)
            wait_for(lambda: last_step(root) >= alone + 6, driver.is_running)
            cluster.join(1)
            driver.finish()
    sizes = [e["workers"] for e in events(root, "start")]
    assert (sizes[0], sizes[-1]) == (2, 2)
    assert 1 in sizes
    ours, theirs = ({r["step"]: r for r in metric_rows(run) if "loss" in r} for run in (root, tmp_path / "fixed"))
    assert sorted(ours) == list(range(1, steps + 1))
    # The images of every step are the same: schedules are equal, and losses differ by accumulated rounding errors.
    assert [ours[s]["lr"] for s in ours] == [theirs[s]["lr"] for s in ours]
    assert [ours[s]["ema_decay"] for s in ours] == [theirs[s]["ema_decay"] for s in ours]
    difference = np.array([abs(ours[s]["loss"] - theirs[s]["loss"]) / theirs[s]["loss"] for s in sorted(ours)])
    assert difference.max() < 1e-4
    draw(ours, theirs, events(root, "start"))
    report(
        elastic={
            "sizes": sizes,
            "loss_apart_median": float(np.median(difference)),
            "loss_apart_max": float(difference.max()),
        }
    )


def draw(ours: dict, theirs: dict, starts: list[dict]) -> None:
    """Write elastic.png beside faults.json: both loss curves and their relative difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    steps = sorted(ours)
    for rows, name in ((theirs, "2 workers throughout"), (ours, "2, 1, 2 workers")):
        above.plot(steps, [rows[s]["loss"] for s in steps], label=name, linewidth=1)
    below.semilogy(steps, [abs(ours[s]["loss"] / theirs[s]["loss"] - 1) + 1e-9 for s in steps], linewidth=1)
    for start in starts[1:]:
        for axes in (above, below):
            axes.axvline(start["step"], color="0.6", linestyle=":", linewidth=1)
        above.annotate(f" {start['workers']}", (start["step"], above.get_ylim()[1]), va="top")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.set_ylabel("relative difference")
    below.set_xlabel("step (dotted: the worker group restarted, with its number of workers)")
    figure.savefig("elastic.png", dpi=100)
