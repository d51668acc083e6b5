"""Saving checkpoints from rank 0 while training continues."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from pais_ray.runs.checkpoint_writer import CheckpointWriter
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.errors import StorageLostError
from pais_ray.train.state import TrainState
from pais_ray.train.worker.heartbeat import Heartbeat


class Checkpointer:
    """Saves ``state`` from rank 0; on the other ranks its methods do nothing.

    ``keep`` is the number of checkpoints that retention keeps beside the best; ``on_event`` receives the text and the
    fields of events, from the thread of the writer.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        state: TrainState,
        heartbeat: Heartbeat,
        group: WorkerGroup,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.state, self.heartbeat = state, heartbeat
        self.writer = CheckpointWriter(root, keep, on_event) if group.rank == 0 else None

    def save(self, unscored_steps: Collection[int]) -> None:
        """Pass a copy of the state to the writer; waits only if two earlier ones have not been written yet.

        ``unscored_steps`` are steps whose scores are being computed; retention keeps their checkpoints, because one of
        them may become the best.
        """
        if self.writer is not None:
            with self.heartbeat.within("save"):
                self.writer.submit(replace(self.state.snapshot(), unscored_steps=frozenset(unscored_steps)))

    def save_and_wait(self, unscored_steps: Collection[int]) -> None:
        """Save the last checkpoint of a run. Raises StorageLostError if it cannot be written."""
        self.save(unscored_steps)
        self.flush()
        if self.writer is not None and self.writer.failed is not None:
            raise StorageLostError(
                f"{self.writer.failed}. The last checkpoint of the run is missing; repeat the command"
            )

    def flush(self) -> None:
        """Wait until all submitted checkpoints are written or have failed."""
        if self.writer is not None:
            with self.heartbeat.within("save"):
                self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
