"""The actor between driver and workers. It runs in a separate process, so this module imports nothing heavy."""

import queue
import time
from dataclasses import replace

import ray

from pais_ray.train.messages import Event, FatalError, Message, RankStatus, Requests


@ray.remote(num_cpus=0, max_concurrency=8, enable_task_events=False)  # several short calls per second
class Monitor:
    """Passes events and heartbeats from the workers to the driver, and requests from the driver to the workers."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.stop = False
        self.saves = self.saves_done = 0  # requests for a checkpoint: made, served
        self.failed = False
        self.statuses: dict[int, tuple[RankStatus, float]] = {}  # rank -> its last heartbeat, and when it arrived

    def publish(self, event: Event) -> None:
        self.messages.put(event)

    def publish_fatal_error(self, error: FatalError) -> None:
        self.failed = True
        self.messages.put(error)

    def has_fatal_error(self) -> bool:
        return self.failed

    def take_messages(self) -> list[Message]:
        """All messages since the last call."""
        return [self.messages.get() for _ in range(self.messages.qsize())]

    def request_stop(self) -> None:
        """Asks the workers to stop after a step, with a checkpoint. The request cannot be withdrawn."""
        self.stop = True

    def request_save(self) -> None:
        """Asks the workers for a checkpoint now; training continues after it."""
        self.saves += 1

    def heartbeat(self, status: RankStatus) -> Requests:
        """Records the status of a rank and returns what is requested of it."""
        if any(status.attempt > known.attempt for known, _ in self.statuses.values()):
            self.statuses.clear()  # a new worker group has replaced the old one
        self.statuses[status.rank] = status, time.monotonic()
        if status.saves_done > self.saves_done:  # a new worker must not serve it again
            self.saves_done = status.saves_done
        return Requests(stop=self.stop, save=self.saves, saves_done=self.saves_done)

    def forget_rank(self, rank: int) -> None:
        """The rank has ended its work."""
        self.statuses.pop(rank, None)

    def forget_all_ranks(self) -> None:
        """The worker group has failed or is gone."""
        self.statuses.clear()

    def rank_statuses(self) -> list[RankStatus]:
        """The last status of each rank, in the order of ranks; ages and silences are as of now."""
        now = time.monotonic()
        return [
            replace(status, age_s=status.age_s + now - arrived, silence_s=now - arrived)
            for _, (status, arrived) in sorted(self.statuses.items())
        ]
