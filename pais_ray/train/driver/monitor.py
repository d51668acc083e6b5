"""Between driver and workers: an actor in a process of its own, so this file imports nothing heavy."""

import queue
import time
from typing import Any

import ray


@ray.remote(num_cpus=0, max_concurrency=8, enable_task_events=False)  # some calls a second, of no interest later
class Monitor:
    """Between driver and workers: progress and signs of life one way, the wish to stop or to save the other."""

    def __init__(self) -> None:
        self.rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.wish = ""  # "", "save" (a checkpoint now, then on) or "stop"
        self.ended = False
        self.beats: dict[int, dict[str, Any]] = {}  # by rank

    def progress(self, row: dict[str, Any]) -> None:
        self.rows.put(row)

    def drain(self) -> list[dict[str, Any]]:
        return [self.rows.get() for _ in range(self.rows.qsize())]

    def fatal(self, message: str, wrong_input: bool) -> None:
        self.ended = True
        self.rows.put({"fatal": message, "wrong_input": wrong_input})

    def has_ended(self) -> bool:
        return self.ended

    def request(self, wish: str) -> None:
        if self.wish != "stop":  # it stays: a checkpoint asked for at the same time comes with it
            self.wish = wish

    def beat(self, beat: dict[str, Any]) -> str:
        """A sign of life: rank, node, pid, attempt, step, stage and its age in s. Answers what is wished."""
        now = time.monotonic()
        if any(beat["attempt"] > b["attempt"] for b in self.beats.values()):
            self.beats.clear()  # a new group of workers: the old one is gone
        self.beats[beat["rank"]] = {**beat, "heard": now}
        return self.wish

    def silence(self, rank: int | None) -> None:
        """The rank has ended its work; with None, as a failure that all of its group share."""
        if rank is None:
            self.beats.clear()
        else:
            self.beats.pop(rank, None)

    def pulse(self) -> list[dict[str, Any]]:
        """The ranks' last signs of life; ``age`` s in their stage by now, ``silent`` s without a sign."""
        now = time.monotonic()
        return [
            {**b, "age": b["age"] + now - b["heard"], "silent": now - b["heard"]} for _, b in sorted(self.beats.items())
        ]
