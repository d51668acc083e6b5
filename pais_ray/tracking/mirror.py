"""A run directory's image in MLflow: one look at the directory, and what the store lacks is sent.

Metrics come from metrics.jsonl and system_metrics/, whose lines say when they were written: the store tells values
apart by metric, step and that time, so sending twice is sending once. Importing this imports mlflow.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from pais_ray.files.json_lines import JsonlReader, Row, milliseconds
from pais_ray.tracking.logged_models import LoggedModels, clean
from pais_ray.tracking.record import RUN_ID, RunRecord, read_run_id, without_secrets

# Of the run directory, or of a search's; figures/ go as they are.
PAPERS = ("config.yaml", "split.json", "data.json", "best.yaml", "results.json", "results.csv", "table.txt")
KEY, PAPERS_TAG = "pais_ray.key", "pais_ray.papers"  # tags of a run: Card.key, digest of its papers
MAX_VALUE = 500  # characters of a parameter that the UI still shows
MAX_TAG = 5000  # characters
MAX_METRICS, MAX_OTHERS = 1000, 100  # of one request, MLflow's limits
DIGEST = 32  # characters of a SHA-256 that name a data set; MLflow's column has room for 36

StoreError = MlflowException  # what a store raises that is away, or does not take something
log = logging.getLogger(__name__)


class Mirror:
    """The image of one run directory. Every method raises what MLflow raises, and may be called again."""

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        card = RunRecord.read(root)
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
        self._tails: dict[Path, JsonlReader] = {}
        self._figures: dict[str, tuple[int, int | None]] | None = None  # name -> size and, of those sent here, time
        self._papers: list[tuple[int, int]] | None = None
        self._digest = run.data.tags.get(PAPERS_TAG)
        on = card.datasets.get("validation")
        self._ranking = LoggedModels(self.client, run, root, self._tags, on and _dataset("validation", on).dataset)
        self._status = str(run.info.status)
        self._send_status()

    def update(self) -> None:
        """Sends what is new. Each part on its own: what one cannot get rid of does not hold up the others."""
        failures: list[Exception] = []
        parts = (self._send_metrics, self._send_checkpoints, self._send_papers, self._send_figures, self._send_status)
        for part in parts:
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

    def _describe(self, run: Any, card: RunRecord) -> None:
        """Parameters, tags and data sets, as far as the store lacks them."""
        params = {clean(key): _short(value) for key, value in card.params.items()}
        changed = {f"resumed.{k}": v for k, v in params.items() if run.data.params.get(k, v) != v}
        self._tags = {clean(key): value[:MAX_TAG] for key, value in card.tags.items()}
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

    def _send_metrics(self) -> None:
        for path in [self.root / "metrics.jsonl", *sorted(self.root.glob("system_metrics/*.jsonl"))]:
            tail = self._tails.setdefault(path, JsonlReader(path))
            rows = tail.read()
            if path.name == "metrics.jsonl":
                self._ranking.take(rows, anew=tail.anew)
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
            key = clean(name)
            if key in self._old:
                history = self.client.get_metric_history(self.run_id, key)
                self._known[key] = {(m.step, m.timestamp) for m in history}
                self._old.discard(key)
            if (step, time) not in self._known.get(key, ()):
                yield Metric(key, float(value), time, step)

    def _send_checkpoints(self) -> None:
        self.sent["checkpoints"] += self._ranking.send()

    def _send_papers(self) -> None:
        """The run's papers, all of them where one is not as the store has them: a tag says what it has."""
        paths = [path for name in PAPERS if (path := self.root / name).exists()]
        state = [_state(path) for path in paths]
        if state == self._papers:
            return
        texts = {path.name: without_secrets(path.read_text(encoding="utf-8")) for path in paths}
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        if digest != self._digest:
            for name, text in texts.items():
                self.client.log_text(self.run_id, text, name)
            self.client.set_tag(self.run_id, PAPERS_TAG, digest)
            self.sent["artifacts"] += len(texts)
        self._papers, self._digest = state, digest

    def _send_figures(self) -> None:
        if self._figures is None:  # of what is there the store tells the size and not when it was made
            there = self.client.list_artifacts(self.run_id, "figures")
            self._figures = {Path(f.path).name: (f.file_size, None) for f in there}
        for path in sorted(self.root.glob("figures/[!.]*")):
            state = _state(path)
            if self._figures.get(path.name) not in (state, (state[0], None)):
                self.client.log_artifact(self.run_id, str(path), "figures")
                self.sent["artifacts"] += 1
            self._figures[path.name] = state

    def _send_status(self) -> None:
        card = RunRecord.read(self.root)
        if card is None or card.status == self._status:
            return
        if card.status == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, card.status)
        self._status = card.status


def connect(uri: str) -> MlflowClient:
    """A client of the store. A SQLite file is made, or brought up to date, by one process at a time: MLflow's own lock
    lets two in, and they trip over each other's tables."""
    for name in ("mlflow", "alembic"):  # they announce each migration of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    # A client that gives up soon: waiting and trying again is the tracker's business, and of whoever types a command.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)  # the registry's tables are made at its first use
    return client


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


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


def _parent(card: RunRecord) -> dict[str, str]:
    return {MLFLOW_PARENT_RUN_ID: card.parent} if card.parent else {}


def _dataset(context: str, facts: dict[str, Any]) -> DatasetInput:
    """A data set by our hash of its annotations, with its counts as profile."""
    counts = {k: v for k, v in facts.items() if isinstance(v, int)}
    source = json.dumps({"uri": facts["source"]})
    kind = "http" if "://" in facts["source"] else "local"
    dataset = Dataset(facts["name"], facts["sha256"][:DIGEST], kind, source, profile=json.dumps(counts))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _short(value: str) -> str:
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 3] + "..."
