"""The scored checkpoints of a run as MLflow's logged models, which its UI ranks. Importing this imports mlflow.

They are external models: path, tags and metrics; no weights are copied. A tag says what is left of the checkpoint.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, LoggedModelOutput, Metric
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from pais_ray.files.json_lines import Row, milliseconds

ROLES = ("teacher", "student")


@dataclass
class Model:
    """A checkpoint as the store knows it."""

    id: str
    tags: dict[str, str]
    times: set[int]  # ms, of the evaluations that it has the scores of


class LoggedModels:
    """The logged models of one run. ``on`` is the data set of the scores, ``tags`` are the run's."""

    def __init__(self, client: MlflowClient, run: Any, root: Path, tags: dict[str, str], on: Dataset | None) -> None:
        self.client, self.root, self.tags, self.on = client, root, tags, on
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.scores: dict[tuple[str, int], Row] = {}  # (role, step) -> line of metrics.jsonl
        self.models = self._known()

    def take(self, rows: list[Row], anew: bool) -> None:
        """Lines of metrics.jsonl; ``anew`` where they are all there are."""
        if anew:
            self.scores = {}
        for row in rows:
            for role in ROLES:
                if isinstance(row.get(f"{role}/segm_AP"), int | float):
                    self.scores[role, int(row["step"])] = row

    def send(self) -> int:
        """Brings the store up to date; returns how many checkpoints are new to it."""
        if not (self.root / "checkpoints").is_dir():  # a search: its score is its best trial's
            return 0
        before = len(self.models)
        places = self._places()
        for (role, step), row in self.scores.items():
            name = f"{role}-{step:08d}"
            path = self.root / "checkpoints" / f"step_{step:08d}"
            own = {"role": role, "step": str(step), "path": str(path), "checkpoint": places(role, step)}
            model = self.models.get(name) or self._new(name, step, {**self.tags, **own})
            if changed := {k: v for k, v in own.items() if model.tags.get(k) != v}:
                self.client.set_logged_model_tags(model.id, changed)
                model.tags.update(changed)
            self._rank(model, role, row)
        return len(self.models) - before

    def _places(self) -> Callable[[str, int], str]:
        """What is left of the checkpoint of a role and step: best, last, kept or deleted."""
        there = {int(p.parent.name[5:]) for p in self.root.glob("checkpoints/step_*/manifest.json")}
        best: dict[str, int] = {}
        for (role, step), row in sorted(self.scores.items()):  # of equals the first, as in TrainState
            ap = f"{role}/segm_AP"
            if role not in best or row[ap] > self.scores[role, best[role]][ap]:
                best[role] = step

        def place(role: str, step: int) -> str:
            words = ["best"] * (best[role] == step) + ["last"] * (step == max(there, default=-1))
            return ", ".join(words or ["kept"]) if step in there else "deleted"

        return place

    def _new(self, name: str, step: int, tags: dict[str, str]) -> Model:
        """What mlflow.create_external_model makes, without its process-wide tracking URI."""
        told = {**tags, MLFLOW_MODEL_IS_EXTERNAL: "true"}
        made = self.client.create_logged_model(self.experiment_id, name, self.run_id, told, model_type="checkpoint")
        self.client.finalize_logged_model(made.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, step)])
        self.models[name] = Model(made.model_id, tags, set())
        return self.models[name]

    def _rank(self, model: Model, role: str, row: Row) -> None:
        """The role's scores as metrics of the model."""
        time, step = milliseconds(row), int(row["step"])
        if time in model.times:
            return
        on = (None, None) if self.on is None else (self.on.name, self.on.digest)
        metrics = [
            Metric(clean(name), float(value), time, step, model.id, *on)
            for name, value in row.items()
            if name.startswith(f"{role}/") and "_class/" not in name and isinstance(value, int | float)
        ]
        self.client.log_batch(self.run_id, metrics=metrics)
        model.times.add(time)

    def _known(self) -> dict[str, Model]:
        """The run's checkpoints in the store, by name."""
        models: dict[str, Model] = {}
        token = None
        while True:
            query = f"source_run_id = '{self.run_id}'"
            page = self.client.search_logged_models([self.experiment_id], query, page_token=token)
            for model in page:
                times = {m.timestamp for m in model.metrics or []}
                models[model.name] = Model(model.model_id, dict(model.tags), times)
            token = page.token
            if not token:
                return models


def clean(name: str) -> str:
    """A name MLflow takes: letters, digits, and _ - . space : /"""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
