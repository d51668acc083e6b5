"""Real runs under scripted faults: the driver is a separate process, and the test owns the cluster."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from pais_ray.files.json_lines import metric_rows
from pais_ray.runs.checkpoints import checkpoint_folder, checkpoints
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


def words(data: Path, storage: Path, name: str, steps: int, *more: str) -> list[str]:
    """Two workers, nano Mask R-CNN on 64 px images, with pseudo-labels, evaluations and checkpoints."""
    return [
        *("synthetic", "segmentor.name=mask_rcnn", "method.name=pais"),
        *(f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"),
        *("data.image_size=64", "data.labeled=0.25", "batch.labeled=1", "batch.unlabeled=1"),
        *("segmentor.preset=nano", "segmentor.weights=null", "method.burn_in=2", "method.tau_cls=0.05"),
        *(
            "optim.name=sgd",
            "optim.lr=0.005",
            f"train.steps={steps}",
            f"train.eval_every={steps // 2}",
            "train.checkpoint_every=5",
        ),
        *("train.log_every=1", "train.panel_every=null", "train.keep_checkpoints=3", "scaling.num_workers=2"),
        *(f"run.storage_path={storage}", f"run.name={name}", f"tracking.uri=sqlite:///{storage}/mlflow.db"),
        "run.max_failures=-1",
        *more,
    ]


class Driver:
    """`pais-ray train` as a user starts it, with its output in a file; without an address it starts its own cluster."""

    def __init__(self, arguments: list[str], address: str | None, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {} if address is None else {"RAY_ADDRESS": address}
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pais_ray.cli", "train", *arguments],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        return self.log.read_text()

    def finish(self) -> str:
        """Wait for the run to succeed and return the output; the timeout of the test applies."""
        assert self.process.wait() == 0, self.output()[-4000:]
        return self.output()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Recovery:
    """The cost of one kill."""

    at: int  # steps logged before the kill
    resumed: int = -1  # step of the checkpoint that the run resumed from
    seconds: float = 0.0  # until the first new step
    lost: int = field(default=0)


def steps_logged(root: Path) -> list[int]:
    return [row["step"] for row in metric_rows(root) if "loss" in row]


def last_step(root: Path) -> int:
    return max(steps_logged(root), default=0)


def events(root: Path, kind: str | None = None) -> list[dict]:
    path = root / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in found if kind in (None, e["event"])]


def workers(of: psutil.Process) -> list[psutil.Process]:
    """The training processes among the descendants of the process that owns the cluster."""
    found = []
    for process in of.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_worker(root: Path, owner: psutil.Process, chance: random.Random, is_running) -> Recovery:
    """Kill one of the two workers at a random moment; return when the run makes new steps."""
    victims = wait_for(lambda: found if len(found := workers(owner)) == 2 else None, is_running)
    starts = len(events(root, "start"))
    recovery = Recovery(at=last_step(root))
    began = time.monotonic()
    chance.choice(victims).kill()
    wait_for(lambda: len(events(root, "start")) > starts, is_running)
    recovery.resumed = events(root, "start")[-1]["step"]
    wait_for(lambda: last_step(root) > recovery.resumed, is_running)
    recovery.seconds = time.monotonic() - began
    recovery.lost = max(0, recovery.at - recovery.resumed)
    return recovery


def weights(root: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint_folder(root, step)
    return {
        f"{name}.{k}": v
        for name in ("student", "teacher", "optimizer")
        for k, v in load_file(folder / f"{name}.safetensors").items()
    }


def assert_same_end(root: Path, other: Path, step: int) -> None:
    """Student, teacher, optimizer, counters and all logged metrics except times are equal bit for bit."""
    a, b = weights(root, step), weights(other, step)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    states = [json.loads((checkpoint_folder(r, step) / "state.json").read_text()) for r in (root, other)]
    assert states[0] == states[1]
    assert figures(root) == figures(other)


def figures(root: Path) -> list[dict]:
    """The rows of metrics.jsonl without times and system metrics."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time", "system/"))} for row in metric_rows(root)]
    return sorted((r for r in rows if len(r) > 1), key=lambda r: (r["step"], sorted(r)))


def newest(root: Path) -> Path:
    return checkpoints(root)[-1]


def stop(process: psutil.Process) -> None:
    """Kill a process that may be stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)
        process.kill()
