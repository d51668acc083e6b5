"""Rank 0's three places to write to (metrics.jsonl, MLflow, the driver's progress), and means between two lines."""

import math
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pais_ray.files.json_lines import JsonlWriter
from pais_ray.tracking.logger import build_logger
from pais_ray.train.messages import EvaluationScores, Notice, StepProgress
from pais_ray.train.step import Metrics

if TYPE_CHECKING:
    from pais_ray.train.job import Job


class Window:
    """What happened since the last log line: sums on the device, turned to floats once."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.waited = self.elapsed = 0.0
        self.steps = 0

    def add(self, metrics: Metrics, waited: float, elapsed: float) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.waited, self.elapsed, self.steps = self.waited + waited, self.elapsed + elapsed, self.steps + 1

    def means(self, world: int, device: torch.device) -> dict[str, float]:
        """Means over the window's steps and all ranks; per-image and per-label means of the pseudo-labels."""
        names = sorted(self.sums)
        flat = torch.stack([torch.as_tensor(self.sums[n], device=device).double() / self.counts[n] for n in names])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        values = dict(zip(names, flat.tolist(), strict=True))
        images = values.pop("pseudo/images", 0.0)
        if images:
            over, kept = values.pop("pseudo/over_tau_cls"), values.pop("pseudo/kept")
            values["pseudo/over_tau_cls_per_image"] = over / images
            values["pseudo/kept_per_image"] = kept / images
            values["pseudo/in_strong_per_image"] = values.pop("pseudo/in_strong") / images
            values["pseudo/empty_image_rate"] = values.pop("pseudo/empty_images") / images
            values["pseudo/score_mean"] = values.pop("pseudo/score_sum") / over if over else math.nan
            values["pseudo/iou_mean"] = values.pop("pseudo/iou_sum") / over if over else math.nan
        return values

    def times(self, images_per_step: int) -> dict[str, float]:
        step = self.elapsed / max(self.steps, 1)
        return {
            "time/step_s": step,
            "time/img_per_s": images_per_step / step,
            "time/data_wait_share": self.waited / self.elapsed,
        }


class Log:
    """Rank 0's places to write to: metrics.jsonl, events.jsonl, MLflow, and the driver's progress line."""

    def __init__(self, job: "Job", step: int) -> None:
        self.job = job
        self.clock = 0.0  # time of the last line
        self.metrics = JsonlWriter(job.root / "metrics.jsonl")
        self.rewind(step)
        self.events = JsonlWriter(job.root / "events.jsonl")
        self.logger = build_logger(job.config.tracking, job.root)

    def rewind(self, step: int) -> None:
        """Lines of steps that will be made again go, and a half-written last one."""
        self.clock = max([self.clock, *(row.get("time", 0.0) for row in self.metrics.rewind(step))])

    def row(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, null where a value is not finite; MLflow takes it from there. Two lines never
        have the same time: it tells them apart where MLflow asks what it has."""
        plain = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.clock = round(max(time.time(), self.clock + 0.001), 3)
        trouble = self.metrics.append({"step": step, "time": self.clock, **plain})
        if trouble is not None:
            self.job.monitor.publish.remote(Notice(text=trouble))
        self.logger.log(step, plain)

    def event(self, step: int, text: str, fields: dict[str, Any]) -> None:
        """What happened to the run, for people and for events.jsonl; called from the checkpoint thread as well."""
        self.events.append({"step": step, "time": time.time(), **fields, "text": text})
        self.job.monitor.publish.remote(Notice(text=f"step {step}: {text}"))

    def write(self, step: int, values: dict[str, float], *, last: int, eta: float) -> None:
        self.row(step, values)
        self.job.monitor.publish.remote(StepProgress(step=step, last_step=last, eta_s=eta, metrics=values))

    def scores(self, step: int, role: str, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation under ``role/NAME``."""
        values = {f"{role}/{name}": value for name, value in metrics.items()}
        self.row(step, values)
        self.job.monitor.publish.remote(EvaluationScores(step=step, role=role, scores=values))

    def close(self) -> None:
        for lines in (self.metrics, self.events):
            lost = lines.flush()
            if lost is not None:
                self.job.monitor.publish.remote(Notice(text=lost))
        self.logger.close()  # the run may go on: the driver ends it
