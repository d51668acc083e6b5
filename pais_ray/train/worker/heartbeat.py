"""A rank reports its step and stage from a separate thread, so that a missing heartbeat means a stopped process.

The answer to a heartbeat carries the driver's requests: the training thread sends no queries and waits for nothing.
This module also registers the signal that makes a process write its Python stacks; it needs no thread to answer.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import ray
from ray.actor import ActorHandle

from pais_ray.train.messages import RankStatus, Requests, Stage

BEAT_S = 0.5  # between two heartbeats
STACKS_SIGNAL = signal.SIGUSR1


class Heartbeat:
    """Sends the rank's status to ``monitor`` twice per second; the training thread calls all public methods.

    ``attempt`` increases with each start of the worker group; it is 0 until the ranks have agreed on it.
    """

    def __init__(self, monitor: ActorHandle, root: Path, rank: int, node: str) -> None:
        self.monitor = monitor
        self.attempt = 0.0
        self.requests = Requests()  # the last answer; written only by the heartbeat thread
        self.saves_done = 0  # written only by the training thread
        self.stacks = stacks_file(root, rank).open("w")  # named by pid, so that a restart keeps earlier files
        pid = os.getpid()
        self.status = partial(
            RankStatus,
            rank=rank,
            node=node,
            pid=pid,
            process_start_time=process_start_time(pid),
            stacks_path=self.stacks.name,
        )
        self.current: tuple[int, Stage, float] = (0, "first_batch", time.monotonic())
        self.closed = threading.Event()
        faulthandler.register(STACKS_SIGNAL, self.stacks, all_threads=True)
        self.thread = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)
        self.thread.start()

    def enter(self, step: int, stage: Stage) -> None:
        """Sets the step and the stage that the rank is in from now on."""
        self.current = (step, stage, time.monotonic())

    @contextmanager
    def within(self, stage: Stage) -> Iterator[None]:
        """The rank is in ``stage`` until the block ends, then in its previous stage, counted from then."""
        step, before, _ = self.current
        self.enter(step, stage)
        try:
            yield
        finally:
            self.enter(step, before)

    def is_stop_requested(self) -> bool:
        """Whether the driver has asked the workers to stop."""
        return self.requests.stop

    def take_save_request(self) -> bool:
        """Whether the driver has asked for a checkpoint; true once per request, even if its answer arrives twice."""
        requests = self.requests
        if requests.save <= max(requests.saves_done, self.saves_done):
            return False
        self.saves_done = requests.save
        return True

    def close(self) -> None:
        """Ends the thread; removes the file for stacks if it is empty."""
        self.closed.set()
        self.thread.join()
        faulthandler.unregister(STACKS_SIGNAL)
        with contextlib.suppress(OSError):  # lost storage is reported by the code that needs it
            self.stacks.close()
            if Path(self.stacks.name).stat().st_size == 0:
                Path(self.stacks.name).unlink()

    def _send_heartbeats(self) -> None:
        while not self.closed.is_set():
            step, stage, since = self.current
            age_s = time.monotonic() - since
            status = self.status(attempt=self.attempt, step=step, stage=stage, age_s=age_s, saves_done=self.saves_done)
            answer = self.monitor.heartbeat.remote(status)
            with contextlib.suppress(ray.exceptions.RayError):  # the driver's node is gone; this process ends soon
                if ray.wait([answer], timeout=BEAT_S)[0]:  # on a busy machine, do not delay the next heartbeat
                    self.requests = ray.get(answer)
            self.closed.wait(BEAT_S)


def process_start_time(pid: int) -> float:
    """When the process started, in s since boot: adjusting the clock does not change it."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def stacks_file(root: Path, rank: int) -> Path:
    """The file that this process writes its Python stacks to when it receives STACKS_SIGNAL."""
    folder = root / "stacks"
    folder.mkdir(exist_ok=True)
    return folder / f"rank{rank}_{os.getpid()}.txt"
