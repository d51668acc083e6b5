"""What a rank reports: metrics.jsonl, events.jsonl, MLflow, and messages to the driver."""

import math
import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from pais_ray.files.json_lines import JsonlWriter
from pais_ray.tracking.logger import build_logger
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.job import Job
from pais_ray.train.messages import EvaluationScores, Notice, StepProgress
from pais_ray.train.step_metrics import Metrics, with_pseudo_label_means

EVENTS = "events.jsonl"


class Logger:
    """The logger of the ranks other than 0, which write nothing; rank 0 has a ``RunLogger``."""

    def notice(self, text: str) -> None:
        """Show a line to the user."""

    def event(self, step: int, text: str, fields: dict[str, Any]) -> None:
        """Record an event of the run in events.jsonl, with ``fields``, and show it to the user."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl."""

    def progress(self, step: int, values: dict[str, float], last_step: int) -> None:
        """Write the metrics of the steps since the last line, and show them to the user."""

    def scores(self, step: int, role: str, metrics: dict[str, float]) -> None:
        """Write the metrics of one role's evaluation as ``role/NAME``, and show them to the user."""

    def rewind(self, step: int) -> None:
        """Remove the metrics of steps after ``step``, which will be repeated, and an incomplete last line."""

    def close(self) -> None:
        """Write what is left."""


class RunLogger(Logger):
    """Rank 0's logger. Its methods may be called from the thread that writes checkpoints as well."""

    def __init__(self, job: Job, step: int) -> None:
        self.monitor = job.monitor
        self.last_time = 0.0  # of the newest line of metrics.jsonl
        self.metrics_file = JsonlWriter(job.root / "metrics.jsonl")
        self.rewind(step)
        self.events_file = JsonlWriter(job.root / EVENTS)
        self.tracking = build_logger(job.config.tracking, job.root)

    def notice(self, text: str) -> None:
        self.monitor.publish.remote(Notice(text=text))

    def event(self, step: int, text: str, fields: dict[str, Any]) -> None:
        self.events_file.append({"step": step, "time": time.time(), **fields, "text": text})
        self.notice(f"step {step}: {text}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        # Values that are not finite become null. No two lines have the same time: MLflow identifies them by it.
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.last_time = round(max(time.time(), self.last_time + 0.001), 3)
        error = self.metrics_file.append({"step": step, "time": self.last_time, **finite})
        if error is not None:
            self.notice(error)
        self.tracking.log(step, finite)

    def progress(self, step: int, values: dict[str, float], last_step: int) -> None:
        self.metrics(step, values)
        eta_s = (last_step - step) * values["time/step_s"]
        self.monitor.publish.remote(StepProgress(step=step, last_step=last_step, eta_s=eta_s, metrics=values))

    def scores(self, step: int, role: str, metrics: dict[str, float]) -> None:
        values = {f"{role}/{name}": value for name, value in metrics.items()}
        self.metrics(step, values)
        self.monitor.publish.remote(EvaluationScores(step=step, role=role, scores=values))

    def rewind(self, step: int) -> None:
        times = [row.get("time", 0.0) for row in self.metrics_file.rewind(step)]
        self.last_time = max([self.last_time, *times])

    def close(self) -> None:
        for file in (self.metrics_file, self.events_file):
            error = file.flush()
            if error is not None:
                self.notice(error)
        self.tracking.close()  # without a status: the driver ends the MLflow run


def report_last_event(job: Job, step: int, text: str, fields: dict[str, Any]) -> None:
    """Record an event of any rank that is about to end, and show it to the user."""
    job.monitor.publish.remote(Notice(text=text))
    JsonlWriter(job.root / EVENTS).append({"step": step, "time": time.time(), **fields, "text": text})


class MetricWindow:
    """The steps since the last log line. Metrics are added up on the device and copied to the host once."""

    def __init__(self) -> None:
        self.sums: Metrics = {}
        self.counts: dict[str, int] = {}
        self.data_wait_s = self.elapsed_s = 0.0
        self.steps = self.images = 0

    def add(self, metrics: Metrics, data_wait_s: float, elapsed_s: float, images: int) -> None:
        """Add the metrics of a step with ``images`` images over all ranks. It took ``elapsed_s``, of which it waited
        ``data_wait_s`` for its batches."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.data_wait_s += data_wait_s
        self.elapsed_s += elapsed_s
        self.steps += 1
        self.images += images

    def means(self, group: WorkerGroup) -> dict[str, float]:
        """Means over the steps and over all ranks; of the pseudo-labels, means per image and per prediction."""
        names = sorted(self.sums)
        means = [torch.as_tensor(self.sums[n], device=group.device).double() / self.counts[n] for n in names]
        flat = torch.stack(means)
        if group.world_size > 1:
            dist.all_reduce(flat)
            flat /= group.world_size
        return with_pseudo_label_means(dict(zip(names, flat.tolist(), strict=True)))

    def times(self) -> dict[str, float]:
        return {
            "time/step_s": self.elapsed_s / max(self.steps, 1),
            "time/img_per_s": self.images / self.elapsed_s,
            "time/data_wait_share": self.data_wait_s / self.elapsed_s,
        }


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of the device, or of this process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
