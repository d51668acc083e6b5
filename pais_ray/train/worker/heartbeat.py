"""A rank says where it is: (step, stage, since), from a thread of its own, so that silence means something.

In answer it hears what the driver wishes, so the training thread asks nobody and waits for nothing.
The thread also lets the rank's Python stacks be asked for from outside, by a signal that needs no thread to answer.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

BEAT_S = 0.5
STACKS_SIGNAL = signal.SIGUSR1


class Heartbeat:
    """Tells ``monitor`` twice a second; ``enter`` and ``within`` are called by the training thread.

    ``attempt`` is a number of this start of the group, higher than that of earlier ones; until the ranks have agreed
    on it, it is 0. ``wish`` is what the driver asked for: "", "save" or "stop".
    """

    def __init__(self, monitor: Any, root: Path, rank: int, node: str) -> None:
        self.monitor = monitor
        self.attempt, self.wish = 0.0, ""
        born = process_start_time(os.getpid())  # with the pid, which may be given to another process later
        self.stacks = stacks_file(root, rank).open("w")  # by pid: the next start keeps it
        self.fixed = {"rank": rank, "node": node, "pid": os.getpid(), "born": born}
        self.fixed["stacks"] = self.stacks.name
        self.at = (0, "first_batch", time.monotonic())
        self.stopped = threading.Event()
        faulthandler.register(STACKS_SIGNAL, self.stacks, all_threads=True)
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.thread.start()

    def enter(self, step: int, stage: str) -> None:
        self.at = (step, stage, time.monotonic())

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """``stage`` until the end of the block, then a step's again."""
        self.enter(self.at[0], stage)
        yield
        self.enter(self.at[0], "step")

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()
        faulthandler.unregister(STACKS_SIGNAL)
        with contextlib.suppress(OSError):  # storage that is gone is told by whom it stops
            self.stacks.close()
            if Path(self.stacks.name).stat().st_size == 0:
                Path(self.stacks.name).unlink()

    def _beat(self) -> None:
        while not self.stopped.is_set():
            step, stage, since = self.at
            here = {"attempt": self.attempt, "step": step, "stage": stage, "age": time.monotonic() - since}
            answer = self.monitor.beat.remote({**self.fixed, **here})
            with contextlib.suppress(ray.exceptions.RayError):  # the driver's node is gone, and this process soon
                if ray.wait([answer], timeout=BEAT_S)[0]:  # on a busy machine the next sign of life must not wait
                    self.wish = ray.get(answer)
            self.stopped.wait(BEAT_S)


def process_start_time(pid: int) -> float:
    """When the process began, in s since this machine did: no change of the clock moves it."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def stacks_file(root: Path, rank: int) -> Path:
    """Where the stacks of this rank's process are written when somebody asks."""
    folder = root / "stacks"
    folder.mkdir(exist_ok=True)
    return folder / f"rank{rank}_{os.getpid()}.txt"
