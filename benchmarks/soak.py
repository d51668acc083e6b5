"""Memory during hours of continuous training with evaluation, checkpoints and killed workers.

    make soak MINUTES=60        (python benchmarks/soak.py --minutes 60 --out soak)

Samples the resident memory of every process of the run and the use of the object store, fits a line to the second half
of each series, and writes OUT/soak.json and OUT/soak.png.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import ray

from pais_ray.cluster import connect
from pais_ray.data.synthetic import generator

SAMPLE_INTERVAL_S = 15.0
WARM_UP = 0.5  # share of a series that is not fitted, because caches and allocators are still growing
MIN_DURATION_S = 900.0  # of a series with a slope
MIN_SAMPLES = 20  # of a fit


def overrides(out: Path) -> list[str]:
    """A run of one worker with a nano model on 64 px images that uses every part of training.

    The schedule is constant, because the warm-up of a schedule of a million steps would take 8000 steps, in which the
    teacher has no pseudo-labels.
    """
    data = out / "data"
    generator.generate(str(data), train=48, val=8, size=96, seed=3)
    return [
        *("synthetic", "mask_rcnn", "pais", "data.image_size=64", "data.labeled=0.25", "method.burn_in=200"),
        *("method.tau_cls=0.2", "method.ema=0.99", "optim.schedule=constant", "optim.reference.warmup=4"),
        *(f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"),
        *("batch.labeled=1", "batch.unlabeled=1", "train.steps=1000000", "train.eval_every=300"),
        *("train.checkpoint_every=100", "train.log_every=20", "train.panel_every=1000", "run.max_failures=-1"),
        *(f"run.storage_path={out}/runs", "run.name=soak", f"tracking.uri=sqlite:///{out}/mlflow.db"),
        *("scaling.num_workers=1", "train.threads_per_worker=1"),
    ]


def process_name(process: psutil.Process) -> str:
    """The role of a process of Ray or of the run."""
    line = " ".join(process.cmdline())
    for name in ("RayTrainWorker", "TrainController", "Monitor", "gcs_server", "raylet", "log_monitor", "dashboard"):
        if name in line:
            return name
    found = re.match(r"ray::(\w+)", line)  # without the method that the actor is running
    return found.group(1) if found else Path(line.split(" ")[0]).name


def sample(tree: list[psutil.Process], began: float, series: dict) -> None:
    """Append (s, MiB) of each process to its series."""
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            key = f"{process_name(process)} {process.pid}"
            info = process.memory_info()
            series.setdefault(key, []).append((time.monotonic() - began, (info.rss - info.shared) / 2**20))


def object_store(address: str) -> float:
    """MiB in use in the object store."""
    from ray._private.internal_api import memory_summary

    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(address, stats_only=True))
    assert found, "the memory summary of Ray has another format"
    return float(found.group(1))


def slope(points: list[tuple[float, float]]) -> float | None:
    """Growth in percent per hour over the second half of the series; None for a short series."""
    t, value = np.array(points).T
    if t[-1] - t[0] < MIN_DURATION_S:
        return None
    kept = t >= t[0] + WARM_UP * (t[-1] - t[0])
    if kept.sum() < MIN_SAMPLES:
        return None
    t = t - t[0]
    rate = np.polyfit(t[kept] / 3600, value[kept], 1)[0]
    return float(100 * rate / max(value[kept].mean(), 1.0))


def total(series: dict) -> list[tuple[float, float]]:
    """MiB of all processes at each sample, including short-lived processes."""
    sums: dict[int, float] = {}
    for points in series.values():
        for t, value in points:
            at = round(t / SAMPLE_INTERVAL_S)  # taking a sample takes a fraction of a second
            sums[at] = sums.get(at, 0.0) + value
    return [(at * SAMPLE_INTERVAL_S, value) for at, value in sorted(sums.items())]


def draw(series: dict, store: list, kills: list[float], path: Path) -> None:
    """Write the plot of all series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in {**series, "object store": store}.items():
        t, value = np.array(points).T
        axes.plot(t / 60, value, label=name, linewidth=1.2)
    for kill in kills:
        axes.axvline(kill / 60, color="0.6", linestyle=":", linewidth=1)
    axes.set_xlabel("minutes (dotted lines: a worker was killed)")
    axes.set_ylabel("resident memory without shared pages, MiB")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, frameon=False, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=100)


def write(out: Path, series: dict, store: list, kills: list[float]) -> dict:
    """Write soak.json and soak.png of the samples so far; return the results."""
    slopes = {name: value for name, points in series.items() if (value := slope(points)) is not None}
    steps = [json.loads(line)["step"] for line in (out / "runs/soak/metrics.jsonl").read_text().splitlines()]
    ordered = sorted(slopes, key=lambda name: -slopes[name])
    results = {
        "minutes": round(store[-1][0] / 60, 1),
        "steps": max(steps, default=0),
        "kills_at_min": [round(kill / 60, 1) for kill in kills],
        "percent_an_hour": {name: round(slopes[name], 2) for name in ordered},
        "all_processes_percent_an_hour": slope(total(series)),
        "all_processes_mib_at_end": total(series)[-1][1],
        "mib_at_end": {name: round(series[name][-1][1], 1) for name in ordered},
        "object_store_percent_an_hour": slope(store),
        "object_store_mib_max": max(v for _, v in store),
    }
    (out / "soak.json").write_text(json.dumps({**results, "series": series, "store": store}))
    draw({name: points for name, points in series.items() if name in slopes}, store, kills, out / "soak.png")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=2, help="number of workers that are killed in the first quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    arguments, random_state = overrides(out), random.Random(args.seed)
    connect.connect()  # starts Ray as `pais-ray train` does
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pais_ray.cli", "train", *arguments]
    series: dict[str, list[tuple[float, float]]] = {}
    store: list[tuple[float, float]] = []
    began, end = time.monotonic(), 60 * args.minutes
    kills = sorted(random_state.uniform(0.05, 0.25) * end for _ in range(args.kills))
    killed: list[float] = []
    with (out / "log.txt").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while (now := time.monotonic() - began) < end:
                assert driver.poll() is None, (out / "log.txt").read_text()[-2000:]
                tree = psutil.Process().children(recursive=True)
                sample(tree, began, series)
                store.append((now, object_store(address)))
                if kills and now >= kills[0]:
                    victims = [p for p in tree if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]
                    if victims:
                        random_state.choice(victims).kill()
                        killed.append(now)
                        kills.pop(0)
                if (out / "runs/soak/metrics.jsonl").exists() and len(store) % 20 == 0:  # in case of an interruption
                    write(out, series, store, killed)
                time.sleep(max(0.0, SAMPLE_INTERVAL_S - (time.monotonic() - began - now)))
        finally:
            driver.send_signal(signal.SIGTERM)  # requests a checkpoint
            try:
                driver.wait(timeout=120)
            except subprocess.TimeoutExpired:  # on a busy machine; the results are complete
                driver.kill()
                driver.wait()
    ray.shutdown()
    print(json.dumps(write(out, series, store, killed), indent=1))


if __name__ == "__main__":
    main()
