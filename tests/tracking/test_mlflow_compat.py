"""Contracts with MLflow: what ``mlflow_compat`` and the mirror use still exists, and failures name what broke."""

import inspect

import pytest
from mlflow import MlflowClient, environment_variables
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.utils import mlflow_tags

from pais_ray.tracking import mlflow_compat
from tests.support.mlflow_runs import client
from tests.test_architecture import EDGES

PRIVATE = ("mlflow.utils", "mlflow.system_metrics", "mlflow.protos", "mlflow.store", "mlflow.environment_variables")
LOGGED_MODEL_METHODS = {  # experimental methods of MlflowClient -> parameters that are passed, in order
    "create_logged_model": ["experiment_id", "name", "source_run_id", "tags", "params", "model_type"],
    "finalize_logged_model": ["model_id", "status"],
    "set_logged_model_tags": ["model_id", "tags"],
    "delete_logged_model_tag": ["model_id", "key"],
    "log_model_artifacts": ["model_id", "local_dir"],
    "get_logged_model": ["model_id"],
    "log_outputs": ["run_id", "models"],
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("PARENT_RUN_TAG", "MLFLOW_PARENT_RUN_ID"),
        ("GIT_COMMIT_TAG", "MLFLOW_GIT_COMMIT"),
        ("DATASET_CONTEXT_TAG", "MLFLOW_DATASET_CONTEXT"),
        ("EXTERNAL_MODEL_TAG", "MLFLOW_MODEL_IS_EXTERNAL"),
    ],
)
def test_tag_names_are_those_of_mlflow(ours, theirs):
    assert getattr(mlflow_compat, ours) == getattr(mlflow_tags, theirs, f"missing: mlflow.utils.mlflow_tags.{theirs}")


@pytest.mark.parametrize("name", mlflow_compat.ENVIRONMENT)
def test_mlflow_reads_the_environment_variable(name, monkeypatch):
    variable = getattr(environment_variables, name, None)
    assert variable is not None, f"mlflow.environment_variables.{name} is missing"
    monkeypatch.delenv(name, raising=False)
    default = variable.get()
    monkeypatch.setenv(name, mlflow_compat.ENVIRONMENT[name])
    assert variable.get() != default, f"{name}={mlflow_compat.ENVIRONMENT[name]} no longer has an effect"


def test_the_environment_of_the_user_has_priority(monkeypatch):
    for name in mlflow_compat.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    mlflow_compat.set_environment()
    values = {name: environment_variables.__dict__[name].get() for name in mlflow_compat.ENVIRONMENT}
    assert values["MLFLOW_HTTP_REQUEST_TIMEOUT"] == 7
    assert values["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == 0


def test_a_missing_object_raises_the_expected_error_code(uri):
    assert mlflow_compat.NOT_FOUND in ErrorCode.keys()  # noqa: SIM118 (a protobuf enum)
    with pytest.raises(MlflowException) as missing:
        client(uri).get_run("0" * 32)
    assert mlflow_compat.is_not_found(missing.value)
    assert not mlflow_compat.is_not_found(MlflowException("another error"))
    assert not mlflow_compat.is_not_found(ValueError("not of MLflow"))


def test_node_monitors_give_the_metrics_of_the_ui():
    monitors = mlflow_compat.NodeMonitors()
    first, second = monitors.sample(), monitors.sample()
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}
    names |= {"disk_usage_percentage", "network_receive_megabytes", "network_transmit_megabytes"}
    assert names <= first.keys()
    assert names <= second.keys()
    assert all(isinstance(value, int | float) for value in second.values())


@pytest.mark.parametrize("name", LOGGED_MODEL_METHODS)
def test_methods_of_logged_models_take_the_parameters_that_are_passed(name):
    method = getattr(MlflowClient, name, None)
    assert method is not None, f"MlflowClient.{name} is missing"
    found = list(inspect.signature(method).parameters)[1:]
    expected = LOGGED_MODEL_METHODS[name]
    assert found[: len(expected)] == expected, f"MlflowClient.{name} has other parameters"


def test_a_metric_of_a_logged_model_keeps_its_dataset():
    metric = Metric("ap", 0.5, 1, 2, "m-1", "val", "abc")
    assert (metric.model_id, metric.dataset_name, metric.dataset_digest) == ("m-1", "val", "abc")
    assert (LoggedModelOutput("m-1", 3).model_id, LoggedModelOutput("m-1", 3).step) == ("m-1", 3)


def test_only_the_compatibility_module_imports_private_modules_of_mlflow():
    found = {m for m, others in EDGES.items() if any(other.startswith(PRIVATE) for other in others)}
    assert found == {"pais_ray.tracking.mlflow_compat"}
