"""Contract of pais_ray/cluster/ray_compat.py: each private or unstable part of Ray still behaves as it is used.

A failure after an update of Ray names what changed. All parts worked in Ray 2.60.0.
"""

import ast
import dataclasses
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import ray.train

from pais_ray.cluster import ray_compat

PACKAGE = Path(__file__).resolve().parents[2] / "pais_ray"


def require(condition: bool, what: str) -> None:
    assert condition, f"{what} (worked in Ray 2.60.0, installed is {ray.__version__})"


def ray_sources(*names: str) -> str:
    """The text of modules of the installed Ray."""
    return "".join((Path(ray.__file__).parent / name).read_text() for name in names)


def test_only_this_module_uses_private_names():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "ray_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                private = ("ray._", "ray.data.block", "ray.data.datasource", "ray.dashboard")
                assert not name.startswith(private), f"{path} imports {name}; use cluster/ray_compat.py"


def test_importing_the_module_does_not_import_ray():
    code = "import sys, pais_ray.cluster.ray_compat; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("RAY_CHDIR_TO_TRIAL_DIR", ("train/constants.py", "air/constants.py", "tune/execution/tune_controller.py")),
        ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", ("train/v2/_internal/constants.py",)),
        ("RAY_AIR_NEW_OUTPUT", ("air/constants.py", "tune/experimental/output.py")),
        ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", ("tune/utils/callback.py",)),
        ("RAY_JOB_STOP_SIGNAL", ("dashboard/modules/job/job_supervisor.py",)),
        ("RAY_JOB_STOP_WAIT_TIME_S", ("dashboard/modules/job/job_supervisor.py",)),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", ("_private/runtime_env/constants.py",)),
    ],
)
def test_ray_reads_the_environment_variable(name, sources):
    require(name in ray_sources(*sources), f"{name} is not read in {sources}")


@pytest.mark.parametrize(
    "name", ["task_events_max_num_task_in_gcs", "num_workers_soft_limit", "enable_metrics_collection"]
)
def test_rays_servers_have_the_internal_setting(name):
    """RAY_name sets it; the settings are compiled into Ray's servers."""
    folder = Path(ray.__file__).parent / "core" / "src" / "ray"
    for server in ("raylet/raylet", "gcs/gcs_server"):
        require(name.encode() in (folder / server).read_bytes(), f"{server} has no setting {name}")


def test_variables_of_the_user_are_kept(monkeypatch):
    for name in (*ray_compat.CLUSTER_ENVIRONMENT, "RAY_num_workers_soft_limit"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ray_compat.set_cluster_environment()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


def test_the_switch_for_loopback_is_restored(monkeypatch):
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    require(isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), "ray_constants.ENABLE_RAY_CLUSTER is not a bool")
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    with ray_compat.listening_on_loopback():
        assert (os.environ[name], ray_constants.ENABLE_RAY_CLUSTER) == ("0", False)
    assert (os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER) == (None, True)
    sources = ray_sources("_private/node.py", "_private/services.py")
    require("ENABLE_RAY_CLUSTER" in sources, "Ray's node does not read ENABLE_RAY_CLUSTER")


def test_the_state_of_draining_nodes_can_be_queried():
    from ray._private.state import state

    require(callable(getattr(state, "get_draining_nodes", None)), "ray._private.state.state.get_draining_nodes is gone")


def test_a_node_can_be_drained_with_a_reason_and_a_deadline():
    """By infra/drain_on_notice.sh and infra/rayjob.yaml."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in ("--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"):
        require(option in text, f"`ray drain-node` has no {option}")
    require("DRAIN_NODE_REASON_PREEMPTION" in text, "`ray drain-node` does not take DRAIN_NODE_REASON_PREEMPTION")


def test_the_failure_of_the_controller_is_its_cause():
    cause = ray.exceptions.ActorDiedError()
    require(
        ray_compat.controller_failure(ray.train.ControllerError(cause)) is cause, "ControllerError.controller_failure"
    )


def test_workers_can_be_added_at_an_interval():
    fields = inspect.signature(ray.train.ScalingConfig).parameters
    require("elastic_resize_monitor_interval_s" in fields, "ScalingConfig.elastic_resize_monitor_interval_s is gone")


def test_read_tasks_take_a_function_and_the_number_of_rows():
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    fields = {field.name for field in dataclasses.fields(BlockMetadata)}
    require({"num_rows", "size_bytes", "exec_stats"} <= fields, f"BlockMetadata has {sorted(fields)}")
    require(list(inspect.signature(ReadTask).parameters)[:2] == ["read_fn", "metadata"], "arguments of ReadTask")
    for name in ("get_read_tasks", "estimate_inmemory_data_size"):
        require(hasattr(Datasource, name), f"Datasource.{name} is gone")


def test_execution_callbacks_have_the_methods_that_ray_data_calls():
    from ray.data import DataContext
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    context = DataContext()
    require(hasattr(context, "custom_execution_callback_classes"), "DataContext.custom_execution_callback_classes")
    ray_compat.pause_execution_loop(context)
    assert context.custom_execution_callback_classes == [ray_compat.ExecutionPause]
    for name, method in inspect.getmembers(ExecutionCallback, inspect.isfunction):
        ours = getattr(ray_compat.ExecutionPause, name, None)
        same = ours is not None and len(inspect.signature(ours).parameters) == len(inspect.signature(method).parameters)
        require(same, f"ExecutionCallback.{name}{inspect.signature(method)} is not covered")


def test_the_upload_limit_is_that_of_rays_dashboard():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    require(DASHBOARD_CLIENT_MAX_SIZE == ray_compat.UPLOAD_LIMIT, "DASHBOARD_CLIENT_MAX_SIZE")


def test_the_loggers_of_the_job_client_have_these_names():
    import ray.dashboard.modules.dashboard_sdk
    import ray.dashboard.modules.job.sdk  # noqa: F401

    for name in ray_compat.JOB_CLIENT_LOGGERS:
        require(name in logging.root.manager.loggerDict, f"the logger {name} is gone")


def test_the_message_of_a_failed_job_ends_with_its_last_logs():
    sources = ray_sources("dashboard/modules/job/job_supervisor.py")
    require(ray_compat.LAST_LOGS.lstrip(", ") in sources, f"{ray_compat.LAST_LOGS!r} is not in the message")
