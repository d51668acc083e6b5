"""The parts of a training worker without Ray: rank 0 of one, with a logger and a heartbeat that record their calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pais_ray.config.tree import Config, run_schedule
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.evaluation import Evaluator
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


@dataclass
class Rank:
    """Rank 0 of one at ``root``."""

    root: Path
    config: Config
    state: TrainState
    logger: RecordingLogger = field(default_factory=RecordingLogger)
    heartbeat: RecordingHeartbeat = field(default_factory=RecordingHeartbeat)
    inputs: dict[str, Any] = field(default_factory=dict)  # fields of the job

    def __post_init__(self) -> None:
        self.group = WorkerGroup(rank=0, world_size=1, device=torch.device("cpu"))
        unused = {"categories": (), "feed": None, "val": None, "ground_truth": "", "monitor": None, "threads": 1}
        schedule = run_schedule(self.config)
        self.job = Job(**{**unused, **self.inputs}, config=self.config, schedule=schedule, root=self.root)
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
        self.evaluator = Evaluator(*shared, self.heartbeat, self.logger, self.checkpointer, guards)
        self.recovery = Recovery(*shared, self.logger, self.checkpointer, self.evaluator, guards)
