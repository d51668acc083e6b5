"""Hours of continuous training with evaluation, checkpoints and killed workers: does memory stay flat?

    make soak MINUTES=60        (python benchmarks/soak.py --minutes 60 --out soak)

Samples the resident memory of every process of the run and what its object store holds, fits a line to each process's
second half, and writes OUT/soak.json and OUT/soak.png.
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

EVERY_S = 15.0
WARM_UP = 0.5  # share of a process's life that is not fitted: caches fill, allocators settle
LONG_ENOUGH_S = 900.0  # a life shorter than that has no slope an hour
MANY_ENOUGH = 20  # samples, for a line


def words(out: Path) -> list[str]:
    """One worker, so that the soak leaves the machine to others; nano, 64 px, all that a run has. The schedule is for
    a run that ends: of a million steps the warm-up alone is 8000, in which the teacher would propose nothing."""
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


def name_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for mark in ("RayTrainWorker", "TrainController", "Monitor", "gcs_server", "raylet", "log_monitor", "dashboard"):
        if mark in line:
            return mark
    found = re.match(r"ray::(\w+)", line)  # without the method that an actor is in
    return found.group(1) if found else Path(line.split(" ")[0]).name


def sample(tree: list[psutil.Process], began: float, series: dict) -> None:
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            key = f"{name_of(process)} {process.pid}"
            info = process.memory_info()
            series.setdefault(key, []).append((time.monotonic() - began, (info.rss - info.shared) / 2**20))


def object_store(address: str) -> float:
    """MiB that the object store holds now."""
    from ray._private.internal_api import memory_summary

    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(address, stats_only=True))
    assert found, "Ray tells the object store's use in other words"
    return float(found.group(1))


def slope(points: list[tuple[float, float]]) -> float | None:
    """Percent an hour over the second half of a life; None for a short one."""
    t, value = np.array(points).T
    if t[-1] - t[0] < LONG_ENOUGH_S:
        return None
    kept = t >= t[0] + WARM_UP * (t[-1] - t[0])
    if kept.sum() < MANY_ENOUGH:
        return None
    t = t - t[0]
    rate = np.polyfit(t[kept] / 3600, value[kept], 1)[0]
    return float(100 * rate / max(value[kept].mean(), 1.0))


def together(series: dict) -> list[tuple[float, float]]:
    """MiB of all processes at each sample, those included that come and go."""
    total: dict[int, float] = {}
    for points in series.values():
        for t, value in points:
            at = round(t / EVERY_S)  # one sample takes a fraction of a second
            total[at] = total.get(at, 0.0) + value
    return [(at * EVERY_S, value) for at, value in sorted(total.items())]


def draw(series: dict, store: list, kills: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in {**series, "object store": store}.items():
        t, value = np.array(points).T
        axes.plot(t / 60, value, label=name, linewidth=1.2)
    for kill in kills:
        axes.axvline(kill / 60, color="0.6", linestyle=":", linewidth=1)
    axes.set_xlabel("minutes (dotted: a worker was killed)")
    axes.set_ylabel("own resident memory, MiB")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, frameon=False, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=100)


def write(out: Path, series: dict, store: list, kills: list[float]) -> dict:
    """soak.json and soak.png of what has been seen so far; the figures."""
    slopes = {name: value for name, points in series.items() if (value := slope(points)) is not None}
    steps = [json.loads(line)["step"] for line in (out / "runs/soak/metrics.jsonl").read_text().splitlines()]
    ordered = sorted(slopes, key=lambda name: -slopes[name])
    figures = {
        "minutes": round(store[-1][0] / 60, 1),
        "steps": max(steps, default=0),
        "kills_at_min": [round(kill / 60, 1) for kill in kills],
        "percent_an_hour": {name: round(slopes[name], 2) for name in ordered},
        "all_processes_percent_an_hour": slope(together(series)),
        "all_processes_mib_at_end": together(series)[-1][1],
        "mib_at_end": {name: round(series[name][-1][1], 1) for name in ordered},
        "object_store_percent_an_hour": slope(store),
        "object_store_mib_max": max(v for _, v in store),
    }
    (out / "soak.json").write_text(json.dumps({**figures, "series": series, "store": store}))
    draw({name: points for name, points in series.items() if name in slopes}, store, kills, out / "soak.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=2, help="of workers, in the first quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    arguments, chance = words(out), random.Random(args.seed)
    connect.connect()  # as `pais-ray train` would start it
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pais_ray.cli", "train", *arguments]
    series: dict[str, list[tuple[float, float]]] = {}
    store: list[tuple[float, float]] = []
    began, end = time.monotonic(), 60 * args.minutes
    kills = sorted(chance.uniform(0.05, 0.25) * end for _ in range(args.kills))
    made: list[float] = []
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
                        chance.choice(victims).kill()
                        made.append(now)
                        kills.pop(0)
                if (out / "runs/soak/metrics.jsonl").exists() and len(store) % 20 == 0:  # a soak may be cut short
                    write(out, series, store, made)
                time.sleep(max(0.0, EVERY_S - (time.monotonic() - began - now)))
        finally:
            driver.send_signal(signal.SIGTERM)  # asks for a checkpoint
            try:
                driver.wait(timeout=120)
            except subprocess.TimeoutExpired:  # a busy machine; the figures are there
                driver.kill()
                driver.wait()
    ray.shutdown()
    print(json.dumps(write(out, series, store, made), indent=1))


if __name__ == "__main__":
    main()
