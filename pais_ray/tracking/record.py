"""TODO docstring."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pais_ray.files.atomic import replace_text

CARD, RUN_ID = "mlflow_run.json", "mlflow_run_id"  # files of the run directory

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

# In a URI: a password, a user of a web server (some take a token there), a parameter that says what it is.
SECRET_KEYS = r"(?:password|passwd|token|secret|access_key|api_key|signature)"

SECRET = re.compile(rf"://[^/@]*:[^@]*@|^https?://[^/@]+@|[?&][^=&]*{SECRET_KEYS}=", re.IGNORECASE)


class RunRecord(BaseModel):
    """What MLflow is told of a run when it is opened, kept in the run directory for whoever opens it."""

    key: str  # finds the run where the answer to its creation was lost
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    parent: str | None  # MLflow's id of the run that this one belongs to
    datasets: dict[str, dict[str, Any]]  # context (training, ...) -> name, source, sha256 and counts
    status: Status = "RUNNING"

    @classmethod
    def read(cls, root: Path) -> "RunRecord | None":
        path = root / CARD
        return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, root: Path) -> None:
        """Whole or not at all: a Tracker elsewhere may be reading it."""
        replace_text(root / CARD, self.model_dump_json(indent=1))


def read_run_id(root: Path) -> str | None:
    """MLflow's id of the run at ``root``, once it is open."""
    path = root / RUN_ID
    return path.read_text().strip() if path.exists() else None


def is_open(root: Path) -> bool:
    """Whether the run at ``root`` was opened and nobody has noted its end."""
    card = RunRecord.read(root)
    return card is not None and card.status == "RUNNING"


def without_secrets(text: str) -> str:
    """The text without the user and password of URLs, and without what their parameters call a secret."""
    text = re.sub(r"://[^/@\s\"']+@", "://***@", text)
    return re.sub(rf"([?&][^=&\s\"']*{SECRET_KEYS}=)[^&\s\"']+", r"\1***", text, flags=re.IGNORECASE)
