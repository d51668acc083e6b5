"""TODO docstring."""

import os
import shlex
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pais_ray.tracking.record import SECRET, without_secrets


class TrackingConfig(BaseModel):
    """Where a run is tracked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="false: metrics.jsonl alone")
    uri: str | None = Field(default=None, description="null: mlflow.db under run.storage_path; or http(s)://SERVER")
    experiment: str = Field(default="pais_ray", description="MLflow's name for a family of runs")
    system_every: float | None = Field(
        default=30.0, gt=0, description="s between samples of each node's CPU, memory, disk, network, GPU; null: none"
    )

    @field_validator("uri")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        """Workers run in other directories, so a relative SQLite path is fixed where it was written."""
        if uri is not None and uri.startswith("sqlite:///"):
            return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
        if uri is not None and SECRET.search(uri):
            remedy = (
                "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN "
                "(PGPASSWORD for PostgreSQL)"
            )
            raise ValueError(f"no password here, it would be written to config.yaml; {remedy}")
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            remedy = "MLflow keeps no runs in plain folders any more"
            raise ValueError(f"expected sqlite:///FILE, http(s)://HOST or a database's, got {uri!r}; {remedy}")
        return uri


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """The URI of the store, the same in every process."""
    return config.uri or f"sqlite:///{storage.absolute()}/mlflow.db"


def ui_command(config: TrackingConfig, storage: Path) -> str:
    """What a person types, or opens, to look at the runs."""
    uri = without_secrets(tracking_uri(config, storage))
    program = Path(sys.executable).with_name("mlflow")  # a .venv is seldom on the PATH
    return uri if uri.startswith("http") else f"{program} ui --backend-store-uri {shlex.quote(uri)}"
