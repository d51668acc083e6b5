"""A run directory's image in MLflow: one look at the directory, and what the store lacks is sent.

Metrics come from metrics.jsonl and system_metrics/, whose lines say when they were written: the store tells values
apart by metric, step and that time, so sending twice is sending once. Importing this imports mlflow.
"""

import fcntl
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_PARENT_RUN_ID

from pais_ray.tracking import RUN_ID, Card, read_run_id, without_secrets

PAPERS = ("config.yaml", "split.json", "data.json")  # of the run directory; figures/ go as they are
KEY = "pais_ray.key"  # tag of a run: Card.key
MAX_VALUE = 500  # characters of a parameter that the UI still shows
MAX_TAG = 5000  # characters
MAX_METRICS, MAX_OTHERS = 1000, 100  # of one request, MLflow's limits
DIGEST = 32  # characters of a SHA-256 that name a data set; MLflow's column has room for 36

Row = dict[str, Any]
log = logging.getLogger(__name__)


class Mirror:
    """The image of one run directory. Every method raises what MLflow raises, and may be called again."""

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        card = Card.read(root)
        if card is None:
            raise ValueError(f"{root}: no run was opened there")
        self.root, self.sent = root, Counter[str](metrics=0, artifacts=0, checkpoints=0)
        self.client = connect(uri)
        artifacts = None if uri.startswith("http") else root.parent / "mlflow_artifacts"
        self.experiment_id = _experiment(self.client, experiment, artifacts)
        run = self._found(card.key) or self.client.create_run(
            self.experiment_id, run_name=card.name, tags={KEY: card.key, **_parent(card)}
        )
        self.run_id = str(run.info.run_id)
        if read_run_id(root) != self.run_id:
            (root / RUN_ID).write_text(self.run_id)
        self._describe(run, card)
        self._known: dict[str, set[tuple[int, int]]] = {}  # what the store had before: metric -> steps and times
        self._old = set(run.data.metrics)  # metrics whose history nobody has asked for yet
        self._tails: dict[Path, Tail] = {}
        self._scores: dict[tuple[str, int], Row] = {}  # (role, step) -> line of metrics.jsonl
        self._uploaded = self._artifacts()
        self._models = self._logged_models()
        self._status = str(run.info.status)
        self._send_status()

    def update(self) -> None:
        """Sends what is new. Each part on its own: what one cannot get rid of does not hold up the others."""
        failures: list[Exception] = []
        for part in (self._send_metrics, self._send_checkpoints, self._send_artifacts, self._send_status):
            try:
                part()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _found(self, key: str) -> Any:
        """The run as the store knows it, by the id that was noted or by its key; None where it is not there."""
        run_id = read_run_id(self.root)
        if run_id is not None:
            try:
                run = self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("tracking: the store has no run %s; a new one is opened", run_id)
            else:
                if run.info.lifecycle_stage == "deleted":
                    self.client.restore_run(run_id)
                self.experiment_id = run.info.experiment_id
                return run
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _describe(self, run: Any, card: Card) -> None:
        """Parameters, tags and data sets, as far as the store lacks them."""
        params = {_name(key): _short(value) for key, value in card.params.items()}
        changed = {f"resumed.{k}": v for k, v in params.items() if run.data.params.get(k, v) != v}
        self._tags = {_name(key): value[:MAX_TAG] for key, value in card.tags.items()}
        tags = {**self._tags, **changed, **_parent(card)}
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        told = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for i in range(0, max(len(new), len(told)), MAX_OTHERS):
            self.client.log_batch(self.run_id, params=new[i : i + MAX_OTHERS], tags=told[i : i + MAX_OTHERS])
        seen = {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs} if run.inputs else set()
        datasets = [_dataset(context, facts) for context, facts in card.datasets.items()]
        datasets = [d for d in datasets if (d.dataset.name, d.dataset.digest) not in seen]
        if datasets:
            self.client.log_inputs(self.run_id, datasets)
        self._validation = card.datasets.get("validation")

    def _send_metrics(self) -> None:
        for path in [self.root / "metrics.jsonl", *sorted(self.root.glob("system_metrics/*.jsonl"))]:
            tail = self._tails.setdefault(path, Tail(path))
            rows = tail.read()
            if path.name == "metrics.jsonl":
                self._note_scores(rows, anew=tail.anew)
            metrics = [m for row in rows if row["time"] > tail.until for m in self._metrics(row)]
            for i in range(0, len(metrics), MAX_METRICS):
                self.client.log_batch(self.run_id, metrics=metrics[i : i + MAX_METRICS])
            self.sent["metrics"] += len(metrics)
            tail.taken(rows)

    def _metrics(self, row: Row) -> Iterator[Metric]:
        """Those of a line that the store may lack. A value that is not finite stands as null and is left out: it
        would ruin the scale of the metric's chart."""
        step, time = int(row["step"]), milliseconds(row)
        for name, value in row.items():
            if name in ("step", "time") or not isinstance(value, int | float):
                continue
            key = _name(name)
            if key in self._old:
                history = self.client.get_metric_history(self.run_id, key)
                self._known[key] = {(m.step, m.timestamp) for m in history}
                self._old.discard(key)
            if (step, time) not in self._known.get(key, ()):
                yield Metric(key, float(value), time, step)

    def _note_scores(self, rows: list[Row], anew: bool) -> None:
        if anew:
            self._scores = {}
        for row in rows:
            for role in ("teacher", "student"):
                if isinstance(row.get(f"{role}/segm_AP"), int | float):
                    self._scores[role, int(row["step"])] = row

    def _send_checkpoints(self) -> None:
        """Each scored checkpoint is a logged model, external: its path, tags and metrics; no weights are copied."""
        places = self._places()
        for (role, step), row in self._scores.items():
            name = f"{role}-{step:08d}"
            path = self.root / "checkpoints" / f"step_{step:08d}"
            own = {"role": role, "step": str(step), "path": str(path), "checkpoint": places(role, step)}
            model = self._models.get(name) or self._new_model(name, step, {**self._tags, **own})
            if changed := {k: v for k, v in own.items() if model.tags.get(k) != v}:
                self.client.set_logged_model_tags(model.id, changed)
                model.tags.update(changed)
            self._rank(model, role, row)

    def _places(self) -> Callable[[str, int], str]:
        """What is left of the checkpoint of a role and step: best, last, kept or deleted."""
        there = {int(p.parent.name[5:]) for p in self.root.glob("checkpoints/step_*/manifest.json")}
        best: dict[str, int] = {}
        for (role, step), row in sorted(self._scores.items()):  # of equals the first, as in TrainState
            ap = f"{role}/segm_AP"
            if role not in best or row[ap] > self._scores[role, best[role]][ap]:
                best[role] = step

        def place(role: str, step: int) -> str:
            words = ["best"] * (best[role] == step) + ["last"] * (step == max(there, default=-1))
            return ", ".join(words or ["kept"]) if step in there else "deleted"

        return place

    def _new_model(self, name: str, step: int, tags: dict[str, str]) -> "Ranked":
        """What mlflow.create_external_model makes, without its process-wide tracking URI."""
        model = self.client.create_logged_model(
            self.experiment_id, name, self.run_id, {**tags, MLFLOW_MODEL_IS_EXTERNAL: "true"}, model_type="checkpoint"
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        self._models[name] = Ranked(model.model_id, tags, set())
        self.sent["checkpoints"] += 1
        return self._models[name]

    def _rank(self, model: "Ranked", role: str, row: Row) -> None:
        """The role's scores as metrics of the model, on the validation set."""
        time, step = milliseconds(row), int(row["step"])
        if time in model.times:
            return
        on = _dataset("validation", self._validation).dataset if self._validation else None
        metrics = [
            Metric(_name(k), float(v), time, step, model.id, on and on.name, on and on.digest)
            for k, v in row.items()
            if k.startswith(f"{role}/") and "_class/" not in k and isinstance(v, int | float)
        ]
        self.client.log_batch(self.run_id, metrics=metrics)
        model.times.add(time)

    def _logged_models(self) -> "dict[str, Ranked]":
        """The run's checkpoints in the store, by name."""
        models: dict[str, Ranked] = {}
        token = None
        while True:
            page = self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{self.run_id}'", page_token=token
            )
            for model in page:
                times = {m.timestamp for m in model.metrics or []}
                models[model.name] = Ranked(model.model_id, dict(model.tags), times)
            token = page.token
            if not token:
                return models

    def _send_artifacts(self) -> None:
        figures = sorted(p for p in self.root.glob("figures/*") if not p.name.startswith("."))
        for path in [*(self.root / name for name in PAPERS), *figures]:
            try:
                stat = path.stat()
            except OSError:
                continue
            name = path.relative_to(self.root).as_posix()
            state = (stat.st_size, stat.st_mtime_ns)
            before = self._uploaded.get(name)
            if before == state or (before == (stat.st_size, None) and name not in PAPERS):
                continue
            if name in PAPERS:
                self.client.log_text(self.run_id, without_secrets(path.read_text(encoding="utf-8")), name)
            else:
                self.client.log_artifact(self.run_id, str(path), "figures")
            self._uploaded[name] = state
            self.sent["artifacts"] += 1

    def _artifacts(self) -> dict[str, tuple[int, int | None]]:
        """Names and sizes of the figures in the store; nothing tells when they were made."""
        found = self.client.list_artifacts(self.run_id, "figures")
        return {f.path: (f.file_size, None) for f in found if not f.is_dir}

    def _send_status(self) -> None:
        card = Card.read(self.root)
        if card is None or card.status == self._status:
            return
        if card.status == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, card.status)
        self._status = card.status


@dataclass
class Ranked:
    """A checkpoint as the store knows it."""

    id: str
    tags: dict[str, str]
    times: set[int]  # ms, of the evaluations that it has the scores of


class Tail:
    """New whole lines of a file that grows, and that is written anew where a run goes back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.until = -1.0  # time of the last line that was sent
        self.anew = True  # the last read began at the file's beginning
        self._inode, self._offset = -1, 0
        self._next = (-1, 0)

    def read(self) -> list[Row]:
        """The lines since ``taken``, or all of them where the file was written anew."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self.anew = stat.st_ino != self._inode or stat.st_size < self._offset
                start = 0 if self.anew else self._offset
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._next = (stat.st_ino, start + len(whole))
        return [row for line in whole.splitlines() if (row := _row(line)) is not None]

    def taken(self, rows: list[Row]) -> None:
        """The lines were sent: the next ``read`` goes on after them."""
        self._inode, self._offset = self._next
        self.until = max([self.until, *(row["time"] for row in rows)])


def connect(uri: str) -> MlflowClient:
    """A client of the store. A SQLite file is made, or brought up to date, by one process at a time: MLflow's own lock
    lets two in, and they trip over each other's tables."""
    for name in ("mlflow", "alembic"):  # they announce each migration of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)  # the registry's tables are made at its first use
    return client


def milliseconds(row: Row) -> int:
    """When a line was written, as MLflow has it."""
    return round(1000 * row["time"])


def _experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """The experiment's id. A server knows where artifacts go; with a database they go beside the runs."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts and artifacts.as_uri()))
        except MlflowException:  # another driver was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _parent(card: Card) -> dict[str, str]:
    return {MLFLOW_PARENT_RUN_ID: card.parent} if card.parent else {}


def _dataset(context: str, facts: dict[str, Any]) -> DatasetInput:
    """A data set by our hash of its annotations, with its counts as profile."""
    counts = {k: v for k, v in facts.items() if isinstance(v, int)}
    source = json.dumps({"uri": facts["source"]})
    kind = "http" if "://" in facts["source"] else "local"
    dataset = Dataset(facts["name"], facts["sha256"][:DIGEST], kind, source, profile=json.dumps(counts))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _row(line: bytes) -> Row | None:
    """A line of metrics, or None: half a line that a killed writer left, say."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "time"} <= row.keys() else None


def _short(value: str) -> str:
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 3] + "..."


def _name(text: str) -> str:
    """A name MLflow takes: letters, digits, and _ - . space : /"""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]
