"""Who watches the ranks from outside: names the one that hangs, takes the stacks, kills it. Ray restarts the group."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray.config.sections import GuardConfig
from pais_ray.train.worker.heartbeat import STACKS_SIGNAL, process_start_time

TICK_S = 0.01  # the clock that tells when a process began has ticks of that
STACKS_S = 5.0  # for a live rank to write its stacks
TASK_S = 30.0  # for a task to start: where every CPU is taken it may need a new process first


def stuck(pulse: list[dict[str, Any]], limits: GuardConfig) -> dict[str, Any] | None:
    """The sign of life of the rank that hangs, if one does.

    A rank is late when its stage is older than the stage's limit. Those that wait for it in a collective become
    late with it: the guilty one is silent (its process is stopped or gone), else at the earliest step, else in its
    stage for longest.
    """
    late = [b for b in pulse if b["age"] > getattr(limits, f"{b['stage']}_timeout_s")]
    if not late:
        return None
    # Ranks in a step may be waiting for one that evaluates or saves, within the longer limit of that.
    behind = min(b["step"] for b in pulse)
    if any(b not in late and b["stage"] != "step" and b["step"] == behind for b in pulse):
        return None
    return min(late, key=lambda b: (-round(b["silent"] / 5), b["step"], -b["age"]))


def describe(beat: dict[str, Any], root: Path) -> str:
    quiet = f", without a sign of life for {beat['silent']:.0f} s" if beat["silent"] > 5 else ""
    return (
        f"rank {beat['rank']} hangs: stage {beat['stage']!r} of step {beat['step']} for {beat['age']:.0f} s{quiet} "
        f"(pid {beat['pid']}, node {beat['node']}; limit guards.{beat['stage']}_timeout_s). Stacks are in "
        f"{root / 'stacks'}; it is killed, and the workers start again from the last checkpoint"
    )


def end(beat: dict[str, Any], pulse: list[dict[str, Any]]) -> None:
    """Has all ranks write their stacks and kills the one of ``beat``, each by a task on its own node."""
    asked = [_there(_write_stacks, b).remote(b["pid"], b["born"], b["stacks"]) for b in pulse]
    ray.wait(asked, num_returns=len(asked), timeout=TASK_S + STACKS_S)
    ray.wait([_there(_kill, beat).remote(beat["pid"], beat["born"])], timeout=TASK_S)


def _there(task: Any, beat: dict[str, Any]) -> Any:
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=beat["node"], soft=False))


@ray.remote(num_cpus=0, max_retries=0)
def _write_stacks(pid: int, born: float, path: str) -> None:
    """Returns when they are in ``path``; those of a stopped process never will be."""
    _send(pid, born, STACKS_SIGNAL)
    size, until = 0, time.monotonic() + STACKS_S
    while time.monotonic() < until:
        time.sleep(0.2)  # nobody tells when a handler has ended: its file has then stopped growing
        before, size = size, Path(path).stat().st_size
        if size == before > 0:
            return


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float) -> None:
    _send(pid, born, signal.SIGKILL)


def _send(pid: int, born: float, number: signal.Signals) -> None:
    try:
        if abs(process_start_time(pid) - born) < TICK_S:
            os.kill(pid, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
