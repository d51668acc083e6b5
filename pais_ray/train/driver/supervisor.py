"""What the driver looks after while ranks train: nodes about to go, ranks that hang, a cluster without room."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from pais_ray.cluster import connect
from pais_ray.config.tree import Config
from pais_ray.files.json_lines import JsonlWriter
from pais_ray.train.driver import resources, watchdog

NO_ROOM_S = 15.0  # without a sign of life before the driver looks whether the cluster has room
SILENCE_S = 120.0  # without one, though there is room, before it says so


class Supervisor:
    """Looks after the ranks from outside: nodes about to go, ranks that hang, a cluster without room."""

    def __init__(
        self, monitor: Any, root: Path, config: Config, cpus: float, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self.monitor, self.root, self.config, self.cpus, self.on_event = monitor, root, config, cpus, on_event
        self.leaving: set[str] = set()
        self.alive = self.told = time.monotonic()  # when some rank last gave a sign of life; when its lack was told
        self.step = 0  # of the rank that is furthest behind, as last heard
        self.events = JsonlWriter(root / "events.jsonl")

    def look(self) -> None:
        leaving = set(connect.draining_nodes())
        if leaving - self.leaving:
            self.tell("a node is about to go: a checkpoint is written now", "node_leaving")
            self.monitor.request.remote("save")
        self.leaving = leaving
        pulse = ray.get(self.monitor.pulse.remote())
        now = time.monotonic()
        self.step = min((b["step"] for b in pulse), default=self.step)
        if any(b["silent"] < NO_ROOM_S for b in pulse):
            self.alive = self.told = now
        elif now - self.told > NO_ROOM_S:
            self.look_for_room(now)
        late = watchdog.stuck(pulse, self.config.guards)
        if late is not None:
            self.tell(watchdog.describe(late, self.root), "stall")
            watchdog.end(late, pulse)
            ray.get(self.monitor.silence.remote(None))

    def without_life(self) -> float:
        """Seconds since some rank last gave a sign of life."""
        return time.monotonic() - self.alive

    def look_for_room(self, now: float) -> None:
        """Why no rank gives a sign of life; said again as long as it lasts."""
        lacking = resources.lack_of_room(self.config, self.cpus)
        if lacking is not None:
            self.told = now
            ray.get(self.monitor.silence.remote(None))  # they are gone, and hang in no stage
            self.tell(f"waiting for room: {lacking}; add nodes, or stop and ask for fewer workers", "no_room")
        elif now - self.told > SILENCE_S:
            self.told = now
            free = ray.available_resources()
            self.tell(
                f"no worker has given a sign of life for {now - self.alive:.0f} s, though the cluster is large enough: "
                f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs of it are free now. Other jobs may "
                "hold the rest, or workers hang as they start: `ray status` and Ray's log folder tell",
                "silence",
            )

    def tell(self, text: str, event: str) -> None:
        self.on_event({"text": text})
        self.events.append({"step": self.step, "time": time.time(), "event": event, "text": text})
