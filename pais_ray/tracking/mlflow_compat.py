"""Every private or unstable part of MLflow that this package depends on.

No other module imports `mlflow.utils`, `mlflow.system_metrics` or `mlflow.protos`, or repeats a name from this file.
``tests/tracking/test_mlflow_compat.py`` checks each of them against the installed MLflow, so that an update that
changes one fails there, with its name. Importing this module does not import mlflow.
"""

import contextlib
import os
from typing import Protocol

# Tags with a meaning in MLflow's UI (`mlflow.utils.mlflow_tags`). They are stored: never change them.
PARENT_RUN_TAG = "mlflow.parentRunId"
GIT_COMMIT_TAG = "mlflow.source.git.commit"
DATASET_CONTEXT_TAG = "mlflow.data.context"
EXTERNAL_MODEL_TAG = "mlflow.model.isExternal"  # of a logged model without artifacts

ENVIRONMENT = {  # read by MLflow when it is imported or first used
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Fail fast: the tracker retries by itself, and a person who ran a command wants an answer.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # s
}

NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"  # MlflowException.error_code


def set_environment() -> None:
    """Set the environment variables that configure MLflow, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_not_found(error: Exception) -> bool:
    """Whether an exception of the MLflow client means that the requested object does not exist."""
    return getattr(error, "error_code", None) == NOT_FOUND


class Monitor(Protocol):
    """The part of MLflow's `BaseMetricsMonitor` that is used."""

    def collect_metrics(self) -> None: ...
    def aggregate_metrics(self) -> dict[str, float]: ...
    def clear_metrics(self) -> None: ...


class NodeMonitors:
    """MLflow's monitors of this node: CPU, memory, disk, network and, if there are any, NVIDIA GPUs."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Monitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # raised if there is no NVIDIA GPU or driver
            self._monitors.append(GPUMonitor())

    def sample(self) -> dict[str, float]:
        """One sample, under the metric names that MLflow's UI groups as system metrics."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values
