"""A store that all tests of tracking share."""

from pathlib import Path

import pytest

from pais_ray.tracking.settings import TrackingConfig, tracking_uri
from tests.support.mlflow_runs import open_test_run


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> Path:
    """A storage path with a database, because creating one takes seconds."""
    folder = tmp_path_factory.mktemp("storage")
    open_test_run(folder, "first")
    return folder


@pytest.fixture(scope="session")
def uri(storage) -> str:
    return tracking_uri(TrackingConfig(), storage)
