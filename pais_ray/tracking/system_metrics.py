"""How busy a node is: a thread that samples CPU, memory, disk, network and GPU into a file of the run directory.

One per node. The tracker of rank 0 follows the files of all nodes, so no other process talks to MLflow, and what is
sampled while it is away is not lost. Samples and their names are MLflow's own, which its UI knows.
"""

import contextlib
import json
import logging
import threading
import time
from pathlib import Path

FOLDER = "system_metrics"  # of the run directory

log = logging.getLogger(__name__)


class NodeSampler:
    """Samples every ``every`` s until ``close``; ``every`` None: never. Trouble is a warning."""

    def __init__(self, root: Path, node: int, every: float | None) -> None:
        self._path, self._node = root / FOLDER / f"node_{node}.jsonl", f"node_{node}"
        self._every = every or 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        if every:
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._every)

    def _work(self) -> None:
        try:
            self._sample()
        except Exception as error:  # no figure of a node is worth the training on it
            log.warning("no more samples of %s: %s: %s", self._node, type(error).__name__, error)

    def _sample(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no NVIDIA GPU here
            monitors.append(GPUMonitor())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            step = sum(1 for _ in file)  # goes on where an earlier start ended
            while True:
                stopped = self._closing.wait(self._every)
                values: dict[str, float] = {}
                for monitor in monitors:
                    monitor.collect_metrics()
                    values |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
                row = {f"system/{self._node}/{name}": value for name, value in values.items()}
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
                file.flush()
                step += 1
                if stopped:
                    return
