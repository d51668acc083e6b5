"""Between driver and workers: an actor in a process of its own, so this file imports nothing heavy."""

import queue
from typing import Any

import ray


@ray.remote(num_cpus=0, max_concurrency=4)
class Monitor:
    """Between driver and workers: progress one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.stop = False
        self.ended = False

    def progress(self, row: dict[str, Any]) -> None:
        self.rows.put(row)

    def drain(self) -> list[dict[str, Any]]:
        return [self.rows.get() for _ in range(self.rows.qsize())]

    def fatal(self, message: str, wrong_input: bool) -> None:
        self.ended = True
        self.rows.put({"fatal": message, "wrong_input": wrong_input})

    def has_ended(self) -> bool:
        return self.ended

    def request_stop(self) -> None:
        self.stop = True

    def stop_requested(self) -> bool:
        return self.stop
