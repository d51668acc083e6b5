"""Where a run's metrics go beside metrics.jsonl: an interface of two methods, and the one place that selects it.

To add a destination, implement ``MetricsLogger`` and return it from ``build_logger``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pais_ray.tracking.record import Status
from pais_ray.tracking.settings import TrackingConfig
from pais_ray.tracking.tracker import MLflowTracker


class MetricsLogger(Protocol):
    """A destination of a run's metrics. Its methods neither block training nor raise."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Take the metrics of ``step``, which have just been written to metrics.jsonl; None: not finite."""

    def close(self, status: Status | None = None) -> None:
        """Deliver what is left. ``status`` is how the run ended; None if it continues in another process."""


class NullLogger:
    """The logger of a run that is not tracked."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        pass

    def close(self, status: Status | None = None) -> None:
        pass


def build_logger(config: TrackingConfig, root: Path) -> MetricsLogger:
    """The logger of the run directory ``root``. Only one process at a time may have it: rank 0 or the driver."""
    return MLflowTracker(config, root) if config.enabled else NullLogger()
