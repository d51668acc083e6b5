"""The evaluated checkpoints of a run as MLflow logged models, which the UI ranks. Importing this imports mlflow.

They are external models: path, tags and metrics; no weights are copied. A tag has the state of the checkpoint.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, LoggedModelOutput, Metric, Run

from pais_ray.files.json_lines import Row, milliseconds
from pais_ray.tracking.mlflow_compat import EXTERNAL_MODEL_TAG

ROLES = ("teacher", "student")


@dataclass
class StoredModel:
    """A checkpoint as the store has it."""

    id: str
    tags: dict[str, str]
    times: set[int]  # ms, of the evaluations whose scores are stored


class LoggedModels:
    """The logged models of one run. The scores are of ``dataset``; ``tags`` are those of the run."""

    def __init__(
        self, client: MlflowClient, run: Run, root: Path, tags: dict[str, str], dataset: Dataset | None
    ) -> None:
        self.client, self.root, self.tags, self.dataset = client, root, tags, dataset
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.scores: dict[tuple[str, int], Row] = {}  # (role, step) -> row of metrics.jsonl
        self.models = self._read_models()

    def add_rows(self, rows: list[Row], restarted: bool) -> None:
        """Take rows of metrics.jsonl; ``restarted``: they are the whole file, which replaces earlier rows."""
        if restarted:
            self.scores = {}
        for row in rows:
            for role in ROLES:
                if isinstance(row.get(f"{role}/segm_AP"), int | float):
                    self.scores[role, int(row["step"])] = row

    def update(self) -> int:
        """Bring the store up to date; return the number of checkpoints that are new to it."""
        if not (self.root / "checkpoints").is_dir():  # a search: its score is that of its best trial
            return 0
        before = len(self.models)
        checkpoint_state = self._checkpoint_state()
        for (role, step), row in self.scores.items():
            name = f"{role}-{step:08d}"
            path = self.root / "checkpoints" / f"step_{step:08d}"
            own_tags = {"role": role, "step": str(step), "path": str(path), "checkpoint": checkpoint_state(role, step)}
            model = self.models.get(name) or self._create(name, step, {**self.tags, **own_tags})
            if changed := {k: v for k, v in own_tags.items() if model.tags.get(k) != v}:
                self.client.set_logged_model_tags(model.id, changed)
                model.tags.update(changed)
            self._log_scores(model, role, row)
        return len(self.models) - before

    def _checkpoint_state(self) -> Callable[[str, int], str]:
        """The state of the checkpoint of a role and step: best, last, kept or deleted."""
        on_disk = {int(p.parent.name[5:]) for p in self.root.glob("checkpoints/step_*/manifest.json")}
        best: dict[str, int] = {}
        for (role, step), row in sorted(self.scores.items()):  # the first of equals, as in TrainState
            ap = f"{role}/segm_AP"
            if role not in best or row[ap] > self.scores[role, best[role]][ap]:
                best[role] = step

        def state(role: str, step: int) -> str:
            names = ["best"] * (best[role] == step) + ["last"] * (step == max(on_disk, default=-1))
            return ", ".join(names or ["kept"]) if step in on_disk else "deleted"

        return state

    def _create(self, name: str, step: int, tags: dict[str, str]) -> StoredModel:
        """As mlflow.create_external_model, without its process-wide tracking URI."""
        all_tags = {**tags, EXTERNAL_MODEL_TAG: "true"}
        model = self.client.create_logged_model(
            self.experiment_id, name, self.run_id, all_tags, model_type="checkpoint"
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        self.models[name] = StoredModel(model.model_id, tags, set())
        return self.models[name]

    def _log_scores(self, model: StoredModel, role: str, row: Row) -> None:
        """Log the scores of the role as metrics of the model, unless the store has them."""
        time, step = milliseconds(row), int(row["step"])
        if time in model.times:
            return
        dataset = (None, None) if self.dataset is None else (self.dataset.name, self.dataset.digest)
        metrics = [
            Metric(metric_key(name), float(value), time, step, model.id, *dataset)
            for name, value in row.items()
            if name.startswith(f"{role}/") and "_class/" not in name and isinstance(value, int | float)
        ]
        self.client.log_batch(self.run_id, metrics=metrics)
        model.times.add(time)

    def _read_models(self) -> dict[str, StoredModel]:
        """The logged models of the run in the store, by name."""
        models: dict[str, StoredModel] = {}
        token = None
        while True:
            query = f"source_run_id = '{self.run_id}'"
            page = self.client.search_logged_models([self.experiment_id], query, page_token=token)
            for model in page:
                times = {m.timestamp for m in model.metrics or []}
                models[model.name] = StoredModel(model.model_id, dict(model.tags), times)
            token = page.token
            if not token:
                return models


def metric_key(name: str) -> str:
    """The name with the characters that MLflow rejects replaced; it allows letters, digits, and _ - . space : /"""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
