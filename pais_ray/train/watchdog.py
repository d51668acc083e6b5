"""Who watches the ranks from outside: names the one that hangs, takes the stacks, kills it. Ray restarts the group."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray.guards import GuardConfig
from pais_ray.train.heartbeat import STACKS_SIGNAL

STACKS_S = 2.0  # for a live rank to write its stacks


def stuck(pulse: list[dict[str, Any]], limits: GuardConfig) -> dict[str, Any] | None:
    """The sign of life of the rank that hangs, if one does.

    A rank is late when its stage is older than the stage's limit. Those that wait for it in a collective become
    late with it: the guilty one is silent (its process is stopped or gone), else at the earliest step, else in its
    stage for longest.
    """
    late = [b for b in pulse if b["age"] > getattr(limits, f"{b['stage']}_s")]
    if not late:
        return None
    return min(late, key=lambda b: (-round(b["silent"] / 5), b["step"], -b["age"]))


def describe(beat: dict[str, Any], root: Path) -> str:
    quiet = f", without a sign of life for {beat['silent']:.0f} s" if beat["silent"] > 5 else ""
    return (
        f"rank {beat['rank']} hangs: stage {beat['stage']!r} of step {beat['step']} for {beat['age']:.0f} s{quiet} "
        f"(pid {beat['pid']}, node {beat['node']}; limit guards.{beat['stage']}_s). Stacks are in {root / 'stacks'}; "
        "it is killed, and the workers start again from the last checkpoint"
    )


def end(beat: dict[str, Any], pulse: list[dict[str, Any]]) -> None:
    """Has all ranks write their stacks and kills the one of ``beat``, each by a task on its own node."""
    asked = [_signal(b, STACKS_SIGNAL) for b in pulse]
    ray.wait(asked, num_returns=len(asked), timeout=STACKS_S)
    time.sleep(STACKS_S)  # the handlers write to files; there is nobody to ask whether they have
    ray.wait([_signal(beat, signal.SIGKILL)], timeout=10 * STACKS_S)


def _signal(beat: dict[str, Any], number: signal.Signals) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id=beat["node"], soft=False)
    return _kill.options(scheduling_strategy=there).remote(beat["pid"], beat["born"], int(number))


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float, number: int) -> None:
    try:
        if psutil.Process(pid).create_time() == born:
            os.kill(pid, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
