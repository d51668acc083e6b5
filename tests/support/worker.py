"""The parts of a training worker without Ray: rank 0 of one, with a logger and a heartbeat that record their calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pais_ray.config.tree import Config, run_schedule
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.evaluation import RunEvaluator
from pais_ray.train.worker.logger import Logger
from pais_ray.train.worker.recovery import Recovery


class RecordingLogger(Logger):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.scored: list[tuple[int, str]] = []
        self.rewound: list[int] = []

    def event(self, step: int, text: str, fields: dict[str, Any]) -> None:
        self.events.append({"step": step, "text": text, **fields})

    def scores(self, step: int, role: str, metrics: dict[str, float]) -> None:
        self.scored.append((step, role))

    def rewind(self, step: int) -> None:
        self.rewound.append(step)


class RecordingHeartbeat:
    """Without a thread; ``stop`` and ``save`` are what the driver requests."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.stop = self.save = False
        self.attempt = 0.0

    def enter(self, step: int, stage: str) -> None:
        self.stages.append(stage)

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        self.stages.append(stage)
        yield

    def is_stop_requested(self) -> bool:
        return self.stop

    def take_save_request(self) -> bool:
        requested, self.save = self.save, False
        return requested

    def close(self) -> None:
        self.stages.append("closed")


class RecordingMonitor:
    """Stands for the handle of the driver's actor."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.fatal_errors: list[Any] = []
        ignore = SimpleNamespace(remote=lambda *_: None)
        self.forget_rank = self.forget_all_ranks = ignore
        self.publish = SimpleNamespace(remote=self.events.append)
        self.publish_fatal_error = SimpleNamespace(remote=self.fatal_errors.append)
        self.has_fatal_error = SimpleNamespace(remote=lambda: bool(self.fatal_errors))


@dataclass
class Rank:
    """Rank 0 of one at ``root``."""

    root: Path
    config: Config
    state: TrainState
    logger: RecordingLogger = field(default_factory=RecordingLogger)
    heartbeat: RecordingHeartbeat = field(default_factory=RecordingHeartbeat)

    def __post_init__(self) -> None:
        self.group = WorkerGroup(rank=0, world_size=1, device=torch.device("cpu"))
        self.job = Job(
            config=self.config,
            schedule=run_schedule(self.config),
            root=self.root,
            categories=(),
            feed=None,
            val=None,
            ground_truth="",
            monitor=RecordingMonitor(),
            threads=1,
        )
        self.checkpointer = Checkpointer(
            self.root,
            self.config.train.keep_checkpoints,
            self.state,
            self.heartbeat,
            self.group,
            on_event=lambda text, fields: self.logger.event(self.state.step, text, fields),
        )
        guards = Guards(self.config.guards)
        shared = (self.job, self.state, self.group)
        self.evaluator = RunEvaluator(*shared, self.heartbeat, self.logger, self.checkpointer, guards)
        self.recovery = Recovery(*shared, self.logger, self.checkpointer, self.evaluator, guards)
