"""The mirror of a run directory in MLflow: compares the directory with the store and sends what the store lacks.

Metrics come from metrics.jsonl and system_metrics/, whose rows have the time at which they were written. The store
identifies a value by metric, step and that time, so sending a row again adds nothing. Importing this imports mlflow.
"""

import fcntl
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pais_ray.files.json_lines import JsonlReader, Row, milliseconds
from pais_ray.tracking.logged_models import LoggedModels, metric_key
from pais_ray.tracking.mlflow_compat import DATASET_CONTEXT_TAG, PARENT_RUN_TAG, is_not_found, set_environment
from pais_ray.tracking.record import RUN_ID_FILE, RunRecord, read_run_id, redact_secrets

# Files of a run directory, or of a search directory, that are logged as artifacts with secrets redacted. The files of
# figures/ are logged unchanged.
METADATA_FILES = ("config.yaml", "split.json", "data.json", "best.yaml", "results.json", "results.csv", "table.txt")
KEY_TAG = "pais_ray.key"  # RunRecord.key
METADATA_TAG = "pais_ray.papers"  # digest of the metadata files in the store
MAX_PARAM = 500  # characters of a parameter that the UI shows
MAX_TAG = 5000  # characters
MAX_METRICS, MAX_PARAMS_AND_TAGS = 1000, 100  # per request, limits of MLflow
DIGEST_LENGTH = 32  # characters of the SHA-256 that identifies a data set; MLflow's column holds 36

StoreError = MlflowException  # raised by a store that is unavailable or rejects a request
log = logging.getLogger(__name__)


class Mirror:
    """The mirror of one run directory. Every method raises the errors of the MLflow client and may be repeated.

    Raises ValueError if ``root`` has no run record.
    """

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        record = RunRecord.read(root)
        if record is None:
            raise ValueError(f"{root}: expected a run record, got none; open the run first")
        self.root, self.sent = root, Counter[str](metrics=0, artifacts=0, checkpoints=0)
        self.client = connect(uri)
        artifacts = None if uri.startswith("http") else root.parent / "mlflow_artifacts"
        self.experiment_id = _find_or_create_experiment(self.client, experiment, artifacts)
        run = self._find_run(record.key) or self.client.create_run(
            self.experiment_id, run_name=record.name, tags={KEY_TAG: record.key, **_parent_tag(record)}
        )
        self.run_id = str(run.info.run_id)
        if read_run_id(root) != self.run_id:
            (root / RUN_ID_FILE).write_text(self.run_id)
        self._log_record(run, record)
        self._stored: dict[str, set[tuple[int, int]]] = {}  # metric -> (step, time) that the store had before
        self._unread_histories = set(run.data.metrics)  # metrics whose history was not requested yet
        self._readers: dict[Path, JsonlReader] = {}
        self._figures: dict[str, tuple[int, int | None]] | None = None  # name -> size and, if sent from here, time
        self._metadata: list[tuple[int, int]] | None = None  # size and time of the files when last compared
        self._metadata_digest = run.data.tags.get(METADATA_TAG)
        validation = record.datasets.get("validation")
        dataset = validation and _dataset_input("validation", validation).dataset
        self._logged_models = LoggedModels(self.client, run, root, self._tags, dataset)
        self._status = str(run.info.status)
        self._send_status()

    def update(self) -> None:
        """Send what is new. A part that fails does not prevent the others; the first error is raised at the end."""
        failures: list[Exception] = []
        parts = (
            self._send_metrics,
            self._send_checkpoints,
            self._send_metadata,
            self._send_figures,
            self._send_status,
        )
        for send in parts:
            try:
                send()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _find_run(self, key: str) -> Run | None:
        """The run in the store, found by the recorded id or else by its key."""
        run_id = read_run_id(self.root)
        if run_id is not None:
            try:
                run = self.client.get_run(run_id)
            except MlflowException as error:
                if not is_not_found(error):
                    raise
                log.warning("tracking: the store has no run %s; a new run is created", run_id)
            else:
                if run.info.lifecycle_stage == "deleted":
                    self.client.restore_run(run_id)
                self.experiment_id = run.info.experiment_id
                return run
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _log_record(self, run: Run, record: RunRecord) -> None:
        """Log the parameters, tags and data sets that the store lacks."""
        params = {metric_key(key): _shorten(value) for key, value in record.params.items()}
        changed = {f"resumed.{k}": v for k, v in params.items() if run.data.params.get(k, v) != v}
        self._tags = {metric_key(key): value[:MAX_TAG] for key, value in record.tags.items()}
        tags = {**self._tags, **changed, **_parent_tag(record)}
        new_params = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        new_tags = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for i in range(0, max(len(new_params), len(new_tags)), MAX_PARAMS_AND_TAGS):
            part = slice(i, i + MAX_PARAMS_AND_TAGS)
            self.client.log_batch(self.run_id, params=new_params[part], tags=new_tags[part])
        stored = {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs} if run.inputs else set()
        datasets = [_dataset_input(context, facts) for context, facts in record.datasets.items()]
        datasets = [d for d in datasets if (d.dataset.name, d.dataset.digest) not in stored]
        if datasets:
            self.client.log_inputs(self.run_id, datasets)

    def _send_metrics(self) -> None:
        for path in [self.root / "metrics.jsonl", *sorted(self.root.glob("system_metrics/*.jsonl"))]:
            reader = self._readers.setdefault(path, JsonlReader(path))
            rows = reader.read()
            if path.name == "metrics.jsonl":
                self._logged_models.add_rows(rows, restarted=reader.restarted)
            metrics = [m for row in rows if row["time"] > reader.last_time for m in self._new_metrics(row)]
            for i in range(0, len(metrics), MAX_METRICS):
                self.client.log_batch(self.run_id, metrics=metrics[i : i + MAX_METRICS])
            self.sent["metrics"] += len(metrics)
            reader.commit(rows)

    def _new_metrics(self, row: Row) -> Iterator[Metric]:
        """The metrics of a row that the store may lack. A value that is not finite is null in the row and is left out,
        because it would distort the scale of the metric's chart."""
        step, time = int(row["step"]), milliseconds(row)
        for name, value in row.items():
            if name in ("step", "time") or not isinstance(value, int | float):
                continue
            key = metric_key(name)
            if key in self._unread_histories:
                history = self.client.get_metric_history(self.run_id, key)
                self._stored[key] = {(m.step, m.timestamp) for m in history}
                self._unread_histories.discard(key)
            if (step, time) not in self._stored.get(key, ()):
                yield Metric(key, float(value), time, step)

    def _send_checkpoints(self) -> None:
        self.sent["checkpoints"] += self._logged_models.update()

    def _send_metadata(self) -> None:
        """Send all metadata files if one differs from the stored one. A tag has the digest of the stored files."""
        paths = [path for name in METADATA_FILES if (path := self.root / name).exists()]
        state = [_size_and_time(path) for path in paths]
        if state == self._metadata:
            return
        texts = {path.name: redact_secrets(path.read_text(encoding="utf-8")) for path in paths}
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        if digest != self._metadata_digest:
            for name, text in texts.items():
                self.client.log_text(self.run_id, text, name)
            self.client.set_tag(self.run_id, METADATA_TAG, digest)
            self.sent["artifacts"] += len(texts)
        self._metadata, self._metadata_digest = state, digest

    def _send_figures(self) -> None:
        if self._figures is None:  # the store has the sizes of its files, but not when they were made
            stored = self.client.list_artifacts(self.run_id, "figures")
            self._figures = {Path(f.path).name: (f.file_size, None) for f in stored}
        for path in sorted(self.root.glob("figures/[!.]*")):
            state = _size_and_time(path)
            if self._figures.get(path.name) not in (state, (state[0], None)):
                self.client.log_artifact(self.run_id, str(path), "figures")
                self.sent["artifacts"] += 1
            self._figures[path.name] = state

    def _send_status(self) -> None:
        record = RunRecord.read(self.root)
        if record is None or record.status == self._status:
            return
        if record.status == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, record.status)
        self._status = record.status


def connect(uri: str) -> MlflowClient:
    """A client of the store and its model registry.

    A SQLite file is created or migrated by one process at a time: MLflow's own lock admits two, whose migrations then
    fail.
    """
    for name in ("mlflow", "alembic"):  # they log each migration of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    set_environment()
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)  # the first use creates the registry's tables
    return client


def _find_or_create_experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """The id of the experiment. ``artifacts``: where a new one stores artifacts; None: the server decides."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts and artifacts.as_uri()))
        except MlflowException:  # another process created it at the same time
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _parent_tag(record: RunRecord) -> dict[str, str]:
    return {PARENT_RUN_TAG: record.parent} if record.parent else {}


def _dataset_input(context: str, facts: dict[str, Any]) -> DatasetInput:
    """A data set, identified by our hash of its annotations, with its counts as profile."""
    counts = {k: v for k, v in facts.items() if isinstance(v, int)}
    source = json.dumps({"uri": facts["source"]})
    kind = "http" if "://" in facts["source"] else "local"
    dataset = Dataset(facts["name"], facts["sha256"][:DIGEST_LENGTH], kind, source, profile=json.dumps(counts))
    return DatasetInput(dataset, [InputTag(DATASET_CONTEXT_TAG, context)])


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes, and ns of the last change."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_PARAM else value[: MAX_PARAM - 3] + "..."
