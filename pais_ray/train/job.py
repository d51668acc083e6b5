"""TODO docstring."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from pais_ray.config.tree import Config
from pais_ray.data.annotations.records import Category, Record
from pais_ray.data.stream import pipeline
from pais_ray.modeling.optim import Schedule


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. Small: data travels as references into the object store."""

    config: Config
    schedule: Schedule
    root: Path  # the run directory, on storage that every node sees
    categories: tuple[Category, ...]
    feed: pipeline.Feed
    val: "ray.ObjectRef[tuple[Record, ...]]"
    ground_truth: str  # the validation JSON
    monitor: Any  # handle of monitor.Monitor
    threads: int
