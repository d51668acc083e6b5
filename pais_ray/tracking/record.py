"""The run record: what is logged to MLflow about a run as a whole, stored in its run directory."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pais_ray.files.atomic import replace_text

RECORD_FILE, RUN_ID_FILE = "mlflow_run.json", "mlflow_run_id"  # in the run directory

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

SECRET_KEYS = r"(?:password|passwd|token|secret|access_key|api_key|signature)"

# In a URI: a password, the user of a web server (some take a token there), or a query parameter named as a secret.
SECRET = re.compile(rf"://[^/@]*:[^@]*@|^https?://[^/@]+@|[?&][^=&]*{SECRET_KEYS}=", re.IGNORECASE)


class RunRecord(BaseModel):
    """What is logged to MLflow when a run is opened. Every process that opens the run again reads it."""

    key: str  # identifies the run in MLflow if the response to its creation was lost
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    parent: str | None  # MLflow's id of the parent run
    datasets: dict[str, dict[str, Any]]  # context (training, ...) -> name, source, sha256 and counts
    status: Status = "RUNNING"

    @classmethod
    def read(cls, root: Path) -> "RunRecord | None":
        """The record of the run directory ``root``; None if there is none."""
        path = root / RECORD_FILE
        return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, root: Path) -> None:
        """Write the record atomically: a tracker in another process may be reading it."""
        replace_text(root / RECORD_FILE, self.model_dump_json(indent=1))


def read_run_id(root: Path) -> str | None:
    """MLflow's id of the run at ``root``; None before MLflow has created the run."""
    path = root / RUN_ID_FILE
    return path.read_text().strip() if path.exists() else None


def is_open(root: Path) -> bool:
    """Whether the run at ``root`` was opened and its end is not recorded."""
    record = RunRecord.read(root)
    return record is not None and record.status == "RUNNING"


def redact_secrets(text: str) -> str:
    """The text with the credentials of its URLs replaced by ***: user and password, and secret query parameters."""
    text = re.sub(r"://[^/@\s\"']+@", "://***@", text)
    return re.sub(rf"([?&][^=&\s\"']*{SECRET_KEYS}=)[^&\s\"']+", r"\1***", text, flags=re.IGNORECASE)
