"""Every private or unstable part of Ray that this package depends on; seen to work in Ray 2.60.0.

No other module imports `ray._private`, `ray.data.datasource` or `ray.data.block`, or sets an environment variable of
Ray that has no documentation. ``tests/cluster/test_ray_compat.py`` checks each part against the installed Ray, so an
update that changes one fails there, with its name. Importing this module does not import ray.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

CLUSTER_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the user's relative paths
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is noticed sooner
    # Ray's head keeps the records of 100,000 past tasks: 20 to 100 MiB per hour of a run, which are never read.
    "RAY_task_events_max_num_task_in_gcs": "1000",
}
LOCAL_CLUSTER_ENVIRONMENT = {
    # The metrics of a local cluster are not collected, and each data set of the stream adds a hundred gauges.
    "RAY_enable_metrics_collection": "0",
}
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0, no output at all: the search prints its own tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
JOB_STOP_SIGNAL = "RAY_JOB_STOP_SIGNAL"
# `ray job stop` then sends SIGINT, as Ctrl-C does, and waits: training stops after its step, with a checkpoint.
JOB_STOP_ENVIRONMENT = {JOB_STOP_SIGNAL: "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "300"}
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job

UPLOAD_LIMIT = 100 * 2**20  # bytes per request to Ray's dashboard (`ray_constants.DASHBOARD_CLIENT_MAX_SIZE`)
JOB_CLIENT_LOGGERS = tuple(f"ray.dashboard.modules.{name}" for name in ("job.sdk", "dashboard_sdk"))
LAST_LOGS = ", last available logs"  # separates cause and log in the message of a failed job

EXECUTION_PAUSE_S = 0.05  # between two rounds of Ray Data's scheduling loop


def set_cluster_environment() -> None:
    """Sets variables for any cluster that this process joins or starts, unless the user has set them."""
    for name, value in CLUSTER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray keeps as many idle processes as CPUs are free. If workers reserve all CPUs, each reading or scoring task would
    # wait seconds for a process to start.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(4, os.cpu_count() or 1)))


def set_local_cluster_environment() -> None:
    """Sets variables for a cluster that this process starts, unless the user has set them."""
    for name, value in LOCAL_CLUSTER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def set_tune_environment() -> None:
    """Sets variables for Ray Tune, unless the user has set them."""
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_job_driver() -> bool:
    """Whether this process is the driver of a submitted job."""
    return JOB_CONFIG in os.environ


def is_stopped_by_sigint() -> bool:
    """Whether `ray job stop` ends this process by SIGINT."""
    return os.environ.get(JOB_STOP_SIGNAL) == "SIGINT"


@contextmanager
def listening_on_loopback() -> Iterator[None]:
    """A cluster that is started inside the block listens on loopback only.

    This is Ray's mode for systems without support for several machines. Ray reads the switch at import time and in
    the processes that it starts, so both the constant and the environment variable are set.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


def draining_nodes() -> dict[str, int]:
    """Node ID -> deadline (ms since the epoch, 0: none) of the nodes that are being drained; requires `ray.init`."""
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes()
    return found


def controller_failure(error: Exception) -> Exception:
    """The cause of a `ray.train.ControllerError`."""
    import ray.train

    assert isinstance(error, ray.train.ControllerError)
    cause: Exception = error.controller_failure
    return cause


@dataclass(frozen=True, kw_only=True)
class Read:
    """A task that reads rows of a data set."""

    read: Callable[[], "Iterable[pa.Table]"]
    num_rows: int


def read_dataset(reads: Sequence[Read], *, concurrency: int) -> "ray.data.Dataset":
    """The data set of all ``reads`` in their order, one task each, at most ``concurrency`` of them at once.

    The tasks reserve no CPU: streams that wait for each other in a collective could otherwise also wait for each
    other's CPUs.
    """
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    tasks = [
        ReadTask(each.read, BlockMetadata(num_rows=each.num_rows, size_bytes=None, exec_stats=None)) for each in reads
    ]

    class StepRows(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
            return tasks

    return ray.data.read_datasource(
        StepRows(), override_num_blocks=len(tasks), num_cpus=0, concurrency=min(concurrency, len(tasks))
    )


def pause_execution_loop(context: "ray.data.DataContext") -> None:
    """Lets Ray Data's scheduling loop rest between two rounds.

    The loop waits only while tasks run. Without a free CPU, or with its output full, it spins in a thread of the
    training process: steps took three times as long.
    """
    context.custom_execution_callback_classes = [ExecutionPause]


class ExecutionPause:
    """An execution callback of Ray Data (`ExecutionCallback`) that sleeps in each round of the scheduling loop."""

    def before_execution_starts(self, executor: object) -> None: ...
    def on_execution_step(self, executor: object) -> None:
        time.sleep(EXECUTION_PAUSE_S)

    def after_execution_succeeds(self, executor: object) -> None: ...
    def after_execution_fails(self, executor: object, error: Exception) -> None: ...
