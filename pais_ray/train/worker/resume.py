"""Where a start of the workers continues: the checkpoint, and what is known about the run from its directory."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config
from pais_ray.files.json_lines import metric_rows
from pais_ray.modeling.optim import Schedule
from pais_ray.runs.checkpoints import find_resumable_checkpoint
from pais_ray.runs.directory import find_unscored_checkpoint
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.errors import StorageLostError
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState, build_state
from pais_ray.train.worker.evaluation import note_scores


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """What rank 0 has found in the run directory, the same on all ranks."""

    checkpoint: Path | None  # the newest one that verifies; None: the run starts from scratch
    skipped: list[str]  # why newer checkpoints cannot be used
    unscored: Path | None  # the checkpoint of an evaluation whose scores were not ready when the run ended
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    attempt: float  # identifies this start of the worker group; increases with each start


def load_resume_point(root: Path, config: Config, schedule: Schedule, group: WorkerGroup) -> ResumePoint:
    """Find where to continue. Rank 0 reads the directory for all, because Ray's own registry of checkpoints may be
    behind (docs/architecture.md). Also removes incomplete checkpoints of a killed process."""
    if group.rank != 0:
        return group.broadcast(ResumePoint(checkpoint=None, skipped=[], unscored=None, metrics=[], attempt=0.0))
    checkpoint, skipped = find_resumable_checkpoint(root)
    rows = metric_rows(root)
    unscored = find_unscored_checkpoint(root, checkpoint, rows, config, schedule)
    for partial in (root / "checkpoints").glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    return group.broadcast(
        ResumePoint(checkpoint=checkpoint, skipped=skipped, unscored=unscored, metrics=rows, attempt=time.time())
    )


def restore_state(job: Job, resume: ResumePoint, device: torch.device) -> TrainState:
    """Build the state and load the checkpoint, with the scores that were logged after it had been written.

    Raises ConfigError if `segmentor.weights` cannot be read or do not fit, CheckpointError if the checkpoint does not.
    """
    try:
        state = build_state(job.config, job.schedule, len(job.categories), device, pretrained=resume.checkpoint is None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if resume.checkpoint is not None:
        state.load(resume.checkpoint)
    note_scores(state, job.root, resume.metrics)
    return state


def check_storage(root: Path, node_address: str) -> None:
    """Raise StorageLostError if this node cannot read the run directory, which the driver has written."""
    try:
        readable = (root / "config.yaml").exists()
    except OSError:
        readable = False
    if not readable:
        raise StorageLostError(
            f"{root}: the run directory cannot be read on node {node_address}; mount its storage there, and repeat the "
            "command"
        )
