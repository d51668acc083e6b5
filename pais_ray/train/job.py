"""The inputs of a worker."""

from dataclasses import dataclass
from pathlib import Path

from ray import ObjectRef
from ray.actor import ActorHandle

from pais_ray.config.tree import Config
from pais_ray.data.annotations.records import Category, Record
from pais_ray.data.stream import pipeline
from pais_ray.modeling.optim import Schedule


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to start. It is small: the data are references to Ray's object store."""

    config: Config
    schedule: Schedule
    root: Path  # the run directory, on storage that every node can access
    categories: tuple[Category, ...]
    feed: pipeline.Feed
    val: "ObjectRef[tuple[Record, ...]]"
    ground_truth: str  # path of the validation annotations, COCO JSON
    monitor: ActorHandle  # of driver/monitor.py
    threads: int  # torch threads per worker
