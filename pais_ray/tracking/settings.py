"""The settings `tracking.*`: which MLflow store a run is written to."""

import os
import shlex
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pais_ray.tracking.record import SECRET, redact_secrets


class TrackingConfig(BaseModel):
    """Where a run is tracked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        default=True,
        description="Whether the run is tracked in MLflow. If false, metrics.jsonl in the run directory is the only "
        "record of metrics. Default: chosen by this project.",
    )
    uri: str | None = Field(
        default=None,
        description="The MLflow tracking URI: http(s)://SERVER, sqlite:///FILE, or that of another database. It must "
        "not contain a password. Default: null, which means the SQLite file mlflow.db in run.storage_path.",
    )
    experiment: str = Field(
        default="pais_ray",
        description="The MLflow experiment that the run belongs to. It is created if it does not exist. Default: "
        "chosen by this project.",
    )
    system_metrics_interval_s: float | None = Field(
        default=30.0,
        gt=0,
        description="Interval between samples of each node's CPU, memory, disk, network and GPU, in seconds. With "
        "null, no samples are taken. Default: chosen by this project.",
    )

    @field_validator("uri")
    @classmethod
    def _make_absolute(cls, uri: str | None) -> str | None:
        """Make a SQLite path absolute, because workers run in other directories. Raise ValueError for other files and
        for a URI that contains a secret."""
        if uri is not None and uri.startswith("sqlite:///"):
            return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
        if uri is not None and SECRET.search(uri):
            raise ValueError(
                "expected a URI without a password or token, because it is written to config.yaml; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN "
                "(PGPASSWORD for PostgreSQL)"
            )
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            raise ValueError(
                f"expected sqlite:///FILE, http(s)://HOST or the URI of a database, got {uri!r}; "
                "MLflow no longer supports plain folders"
            )
        return uri


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """The URI of the store, the same in every process."""
    return config.uri or f"sqlite:///{storage.absolute()}/mlflow.db"


def ui_command(config: TrackingConfig, storage: Path) -> str:
    """The command, or the address, that shows the runs in MLflow's UI."""
    uri = redact_secrets(tracking_uri(config, storage))
    program = Path(sys.executable).with_name("mlflow")  # a virtual environment is often not on the PATH
    return uri if uri.startswith("http") else f"{program} ui --backend-store-uri {shlex.quote(uri)}"
