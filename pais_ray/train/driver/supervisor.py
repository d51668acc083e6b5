"""Checks of the driver while ranks train: nodes that are draining, ranks that hang, missing cluster resources."""

import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.actor import ActorHandle

from pais_ray.cluster import ray_compat
from pais_ray.config.tree import Config
from pais_ray.files.json_lines import JsonlWriter
from pais_ray.train.driver import resources, watchdog
from pais_ray.train.messages import Event, Notice

CHECK_RESOURCES_S = 15.0  # without a heartbeat before the driver checks whether the cluster is large enough
REPORT_SILENCE_S = 120.0  # without a heartbeat before the driver reports it, if the cluster is large enough


class Supervisor:
    """Checks the worker group from the driver and reports problems as notices and in events.jsonl."""

    def __init__(
        self, monitor: ActorHandle, root: Path, config: Config, cpus: float, on_event: Callable[[Event], None]
    ) -> None:
        self.monitor, self.root, self.config, self.cpus, self.on_event = monitor, root, config, cpus, on_event
        self.draining: set[str] = set()  # node IDs
        self.last_heartbeat = self.last_report = time.monotonic()
        self.step = 0  # the last known step of the slowest rank
        self.events = JsonlWriter(root / "events.jsonl")

    def check(self) -> None:
        """Runs all checks once: asks for a checkpoint if a node drains, kills a rank that hangs."""
        draining = set(ray_compat.draining_nodes())
        if draining - self.draining:
            self.report("a node is being drained: saving a checkpoint now", "node_leaving")
            self.monitor.request_save.remote()
        self.draining = draining
        statuses = ray.get(self.monitor.rank_statuses.remote())
        now = time.monotonic()
        self.step = min((s.step for s in statuses), default=self.step)
        if any(s.silence_s < CHECK_RESOURCES_S for s in statuses):
            self.last_heartbeat = self.last_report = now
        elif now - self.last_report > CHECK_RESOURCES_S:
            self.report_silence(now)
        stuck = watchdog.find_stuck_rank(statuses, self.config.guards)
        if stuck is not None:
            self.report(watchdog.describe(stuck, self.root), "stall")
            watchdog.kill_rank(stuck, statuses)
            ray.get(self.monitor.forget_all_ranks.remote())

    def seconds_since_heartbeat(self) -> float:
        """Seconds since any rank last sent a heartbeat."""
        return time.monotonic() - self.last_heartbeat

    def report_silence(self, now: float) -> None:
        """Reports why no rank sends heartbeats; repeated while this lasts."""
        shortage = resources.find_shortage(self.config, self.cpus)
        if shortage is not None:
            self.last_report = now
            ray.get(self.monitor.forget_all_ranks.remote())  # the processes are gone: they hang in no stage
            self.report(f"waiting for resources: {shortage}; add nodes, or stop and use fewer workers", "no_room")
        elif now - self.last_report > REPORT_SILENCE_S:
            self.last_report = now
            free = ray.available_resources()
            self.report(
                f"no worker has sent a heartbeat for {now - self.last_heartbeat:.0f} s, although the cluster is large "
                f"enough: {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs are free now. Other jobs "
                "may use the rest, or the workers may hang at their start: see `ray status` and Ray's log directory",
                "silence",
            )

    def report(self, text: str, event: str) -> None:
        """Publishes a notice and appends it to events.jsonl as an event of that name."""
        self.on_event(Notice(text=text))
        self.events.append({"step": self.step, "time": time.time(), "event": event, "text": text})
