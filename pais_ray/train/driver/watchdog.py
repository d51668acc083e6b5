"""Finds the rank that hangs, has all ranks write their Python stacks, and kills it. Ray restarts the worker group."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray.config.sections import GuardConfig
from pais_ray.train.messages import RankStatus
from pais_ray.train.worker.heartbeat import STACKS_SIGNAL, process_start_time

CLOCK_TICK_S = 0.01  # resolution of process start times
STACKS_S = 5.0  # limit for a process to write its stacks
TASK_S = 30.0  # limit for a task to start: if all CPUs are in use, Ray may have to start a process for it
SILENCE_S = 5.0  # without a heartbeat before a process counts as silent


def find_stuck_rank(statuses: Sequence[RankStatus], limits: GuardConfig) -> RankStatus | None:
    """The status of the rank that hangs, or None.

    A rank is late if it has been in its stage for longer than the limit of that stage. Ranks that wait for it in a
    collective become late as well. The rank that hangs is the one without heartbeats (its process is stopped or
    gone), else the one at the earliest step, else the one that has been in its stage for longest.
    """
    late = [s for s in statuses if s.age_s > getattr(limits, f"{s.stage}_timeout_s")]
    if not late:
        return None
    # Ranks in a step may be waiting for a rank that evaluates or saves and is within the longer limit of that stage.
    first_step = min(s.step for s in statuses)
    if any(s not in late and s.stage != "step" and s.step == first_step for s in statuses):
        return None
    return min(late, key=lambda s: (-round(s.silence_s / SILENCE_S), s.step, -s.age_s))


def describe(status: RankStatus, root: Path) -> str:
    """The message for the user about a rank that hangs."""
    silence = f", without a heartbeat for {status.silence_s:.0f} s" if status.silence_s > SILENCE_S else ""
    return (
        f"rank {status.rank} hangs: stage {status.stage!r} of step {status.step} for {status.age_s:.0f} s{silence} "
        f"(pid {status.pid}, node {status.node}; limit guards.{status.stage}_timeout_s). Python stacks are in "
        f"{root / 'stacks'}; the process is killed, and the workers restart from the last checkpoint"
    )


def kill_rank(stuck: RankStatus, statuses: Sequence[RankStatus]) -> None:
    """Has all ranks write their stacks and kills the ``stuck`` one, each by a task on the node of its process."""
    written = [_on_node(_write_stacks, s).remote(s.pid, s.process_start_time, s.stacks_path) for s in statuses]
    ray.wait(written, num_returns=len(written), timeout=TASK_S + STACKS_S)
    ray.wait([_on_node(_kill, stuck).remote(stuck.pid, stuck.process_start_time)], timeout=TASK_S)


def _on_node(task: Any, status: RankStatus) -> Any:
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=status.node, soft=False))


@ray.remote(num_cpus=0, max_retries=0)
def _write_stacks(pid: int, start_time: float, path: str) -> None:
    """Returns when the stacks are in ``path``, or after a time limit: a stopped process never writes them."""
    _send_signal(pid, start_time, STACKS_SIGNAL)
    size, until = 0, time.monotonic() + STACKS_S
    while time.monotonic() < until:
        time.sleep(0.2)  # the end of the signal handler cannot be observed: wait until the file stops growing
        before, size = size, Path(path).stat().st_size
        if size == before > 0:
            return


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, start_time: float) -> None:
    _send_signal(pid, start_time, signal.SIGKILL)


def _send_signal(pid: int, start_time: float, number: signal.Signals) -> None:
    """Signals the process, unless it has ended or its pid now belongs to another process."""
    try:
        if abs(process_start_time(pid) - start_time) < CLOCK_TICK_S:
            os.kill(pid, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
