"""The load of a node: a thread that samples CPU, memory, disk, network and GPU into a file of the run directory.

There is one sampler per node. The tracker of rank 0 reads the files of all nodes, so no other process connects to
MLflow, and samples taken while the server is unavailable are sent later.
"""

import json
import logging
import threading
import time
from pathlib import Path

from pais_ray.tracking.mlflow_compat import NodeMonitors

FOLDER = "system_metrics"  # in the run directory

log = logging.getLogger(__name__)


class NodeSampler:
    """Samples every ``every`` s until ``close``; never if ``every`` is None. Errors are logged as a warning."""

    def __init__(self, root: Path, node: int, every: float | None) -> None:
        self._path, self._node = root / FOLDER / f"node_{node}.jsonl", f"node_{node}"
        self._every = every or 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        if every:
            self._thread.start()

    def close(self) -> None:
        """Take a last sample and stop."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._every)

    def _run(self) -> None:
        try:
            self._sample_until_closed()
        except Exception as error:  # system metrics must not end training
            log.warning("sampling of %s stopped: %s: %s", self._node, type(error).__name__, error)

    def _sample_until_closed(self) -> None:
        monitors = NodeMonitors()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            step = sum(1 for _ in file)  # continue the numbering of an earlier start
            while True:
                stopped = self._closing.wait(self._every)
                row = {f"system/{self._node}/{name}": value for name, value in monitors.sample().items()}
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
                file.flush()
                step += 1
                if stopped:
                    return
