"""MLflow: one run per training. The only importer of mlflow, and never in the way of training.

The driver opens the run (``open_run``); rank 0 hands its metrics to a ``Tracker``, whose thread does the
talking. What could not be sent waits in ``tracking_pending.jsonl`` of the run directory, until the store
answers again or the next ``Tracker`` of the run starts. mlflow is imported in functions: it takes seconds.
"""

import contextlib
import json
import logging
import math
import os
import queue
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

PENDING = "tracking_pending.jsonl"
ATTEMPTS = 3  # at each event, before the store counts as away
MAX_FAILURES = 10  # of one event on its own, before it is given up for the sake of the others
LONGEST_PAUSE = 300.0  # s between two knocks at a store that is away
MAX_VALUE = 500  # characters of a parameter that the UI still shows
MAX_TAG = 5000  # characters

Event = dict[str, Any]
log = logging.getLogger(__name__)


class TrackingConfig(BaseModel):
    """Where a run is tracked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="false: metrics.jsonl alone")
    uri: str | None = Field(default=None, description="null: mlflow.db under run.storage_path; or http(s)://SERVER")
    experiment: str = Field(default="pais_ray", description="MLflow's name for a family of runs")

    @field_validator("uri")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        """Workers run in other directories, so a relative SQLite path is fixed where it was written."""
        if uri is not None and uri.startswith("sqlite:///"):
            return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            remedy = "MLflow keeps no runs in plain folders any more"
            raise ValueError(f"expected sqlite:///FILE, http(s)://HOST or a database's, got {uri!r}; {remedy}")
        return uri


def tracking_uri(config: TrackingConfig, storage: Path) -> str:
    """The URI of the store, the same in every process."""
    return config.uri or f"sqlite:///{storage.absolute()}/mlflow.db"


def ui_command(config: TrackingConfig, storage: Path) -> str:
    """What a person types, or opens, to look at the runs."""
    uri = _without_secrets(tracking_uri(config, storage))
    program = Path(sys.executable).with_name("mlflow")  # a .venv is seldom on the PATH
    return uri if uri.startswith("http") else f"{program} ui --backend-store-uri {shlex.quote(uri)}"


def open_run(
    config: TrackingConfig,
    storage: Path,
    run_name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str | None:
    """The id of the run: of a new one, or ``run_id`` opened again. Called once, in the driver.

    ``params`` is flat. Values that differ from those of the first start become tags ``resumed.NAME``:
    MLflow's parameters are written once. Where the store does not answer, that is a warning and ``run_id``.
    """
    if not config.enabled:
        return None
    uri = tracking_uri(config, storage)
    try:
        client = _client(uri)
        known = None if run_id is None else _reopened(client, run_id)
        if run_id is None or known is None:
            known = {}
            experiment = _experiment(client, config.experiment, None if uri.startswith("http") else storage)
            run_id = str(client.create_run(experiment, run_name=run_name).info.run_id)
        values = {_name(key): _short(value) for key, value in params.items()}
        changed = {f"resumed.{k}": v for k, v in values.items() if known.get(k, v) != v}
        _describe(client, run_id, {k: v for k, v in values.items() if k not in known}, {**tags, **changed})
        return run_id
    except Exception as error:  # whatever the store throws, training goes on
        log.warning(_away(uri, error))
        return run_id


class Tracker:
    """Takes metrics, artifacts and tags and returns at once; a thread brings them to the store.

    For one process at a time: rank 0 while training, then the driver. Nothing here raises.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_id: str | None, capacity: int = 2000) -> None:
        self._uri = tracking_uri(config, run_dir.absolute().parent)
        self._run_id = run_id
        self._pending = run_dir.absolute() / PENDING
        self._events: queue.Queue[Event | None] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._file = threading.Lock()
        self._in_flight: list[Event] = []
        self._store: _Store | None = None
        self._pause, self._next_knock = 0.0, 0.0  # s; a pause of zero: all is well
        self._clock = 0  # ms, of the last event
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._open = config.enabled
        if self._open:
            self._thread.start()

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics at an absolute step. One that is not finite is logged as ``nonfinite/NAME`` 1: it is seen
        there, while in the metric's own chart it would ruin the scale."""
        finite = {_name(k): float(v) for k, v in values.items() if math.isfinite(v)}
        marks = {f"nonfinite/{_name(k)}": 1.0 for k, v in values.items() if not math.isfinite(v)}
        if finite or marks:
            self._put({"kind": "metrics", "values": finite | marks, "step": int(step)})

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """A local file, which must stay where it is until it was sent."""
        self._put({"kind": "artifact", "path": os.path.abspath(path), "folder": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; the last value counts."""
        self._put({"kind": "tags", "tags": {_name(k): str(v)[:MAX_TAG] for k, v in tags.items()}})

    def log_checkpoint(self, role: str, path: Path | str, step: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint as an external logged model: its path, role and metrics; no weights are copied."""
        finite = {_name(k): float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._put({"kind": "checkpoint", "role": role, "path": str(path), "step": int(step), "values": finite})

    def close(self, status: str | None = "FINISHED", timeout: float = 30.0) -> None:
        """Sends what is left, for at most ``timeout`` s, and gives the run its ``status``: FINISHED, FAILED,
        KILLED (stopped on purpose), or None to leave it running."""
        if not self._open:
            return
        if status is not None:
            self._put({"kind": "status", "status": status})
        self._open = False
        self._closing.set()
        self._next_knock = 0.0  # a last one
        with contextlib.suppress(queue.Full):
            self._events.put(None, timeout=timeout / 4)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._keep([*self._in_flight, *(e for e in _drained(self._events) if e is not None)])
            self._warn("slow", f"{_without_secrets(self._uri)}: still busy after {timeout:g} s")

    def _put(self, event: Event) -> None:
        if not self._open:
            return
        # The store tells two values of a model's metric apart by nothing else, and forgives the same one twice.
        self._clock = max(self._clock + 1, time.time_ns() // 1_000_000)
        event["time"] = self._clock
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._keep([event])

    def _work(self) -> None:
        """The thread: what waited first, then what comes, many metrics in one request."""
        self._replay(of_earlier=True)
        while (event := self._events.get()) is not None:
            events = [event, *_drained(self._events, most=200)]
            self._in_flight = [e for e in events if e is not None]
            self._deliver_all(self._in_flight)
            self._in_flight = []
            if None in events:
                return

    def _deliver_all(self, events: list[Event]) -> None:
        metrics = [e for e in events if e["kind"] == "metrics"]
        if metrics:
            self._deliver(metrics)
        for event in events:
            if event["kind"] != "metrics":
                self._deliver([event])

    def _deliver(self, events: list[Event]) -> None:
        """Sends them, or keeps them in the file: after some attempts, or at once while the store is away."""
        if self._run_id is None or (self._pause and time.monotonic() < self._next_knock):
            return self._keep(events)
        for attempt in range(1 if self._pause else ATTEMPTS):
            try:
                self._store = self._store or _Store(self._uri, self._run_id)
                self._store.send(events)
            except Exception as error:
                if _hopeless(error):
                    return self._drop(events, error)
                failure = error
                if self._closing.wait(0.5 * 2**attempt):
                    break
            else:
                if self._pause:  # the store is back
                    self._pause = 0.0
                    self._replay()
                return
        self._pause = min(max(5.0, 2 * self._pause), LONGEST_PAUSE)
        self._next_knock = time.monotonic() + self._pause
        self._warn("away", _away(self._uri, failure))
        if len(events) == 1:
            events[0]["failed"] = events[0].get("failed", 0) + 1
            if events[0]["failed"] > MAX_FAILURES:
                return self._drop(events, failure)
        self._keep(events)

    def _drop(self, events: list[Event], error: Exception) -> None:
        """One event that no store will ever take must not hold up the others."""
        if len(events) > 1:
            for event in events:
                self._deliver([event])
        else:
            self._warn("refused", f"{events[0]['kind']} not tracked: {_without_secrets(str(error))}")

    def _keep(self, events: Iterable[Event]) -> None:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        try:
            with self._file, self._pending.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            self._warn("lost", f"{self._pending}: cannot keep what was not tracked ({error}); free some space")

    def _replay(self, of_earlier: bool = False) -> None:
        """Sends what waits in the file. Meanwhile it lies in a second one, in case that we die here.

        The status that an earlier process left is void: the run goes on."""
        if self._run_id is None:
            return
        sending, partial = self._pending.with_suffix(".sending"), self._pending.with_suffix(".partial")
        try:
            with self._file:
                events = [*_read_lines(sending), *_read_lines(self._pending)]
                if not events:
                    return
                partial.write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
                os.replace(partial, sending)
                self._pending.unlink(missing_ok=True)
            self._deliver_all([e for e in events if not (of_earlier and e["kind"] == "status")])
            sending.unlink()
        except OSError as error:
            self._warn("pending", f"{self._pending}: cannot be sent ({error}); free some space")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(text)


class _Store:
    """The calls to MLflow for one run. Each raises what MLflow raises."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.client = _client(uri)
        self.run_id = run_id
        self.experiment_id: str = self.client.get_run(run_id).info.experiment_id

    def send(self, events: list[Event]) -> None:
        """Many metrics, or one of the others."""
        from mlflow.entities import Metric, RunTag

        event = events[0]
        if event["kind"] == "metrics":
            metrics = [Metric(k, v, e["time"], e["step"]) for e in events for k, v in e["values"].items()]
            for i in range(0, len(metrics), 1000):  # MLflow's limit of one request
                self.client.log_batch(self.run_id, metrics=metrics[i : i + 1000])
        elif event["kind"] == "tags":
            self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in event["tags"].items()])
        elif event["kind"] == "artifact":
            self.client.log_artifact(self.run_id, event["path"], event["folder"] or None)
        elif event["kind"] == "checkpoint":
            self._checkpoint(event)
        elif event["kind"] == "status":
            self.client.set_terminated(self.run_id, event["status"])

    def _checkpoint(self, event: Event) -> None:
        """What mlflow.create_external_model makes, without its process-wide tracking URI."""
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        name = f"{event['role']}-{event['step']:08d}"
        known = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{self.run_id}'"
        )
        tags = {k: str(event[k]) for k in ("role", "path", "step")}
        if known:  # a step that was made again after a resume
            model_id = known[0].model_id
            self.client.set_logged_model_tags(model_id, tags)
        else:
            model = self.client.create_logged_model(
                self.experiment_id, name, self.run_id, tags | {MLFLOW_MODEL_IS_EXTERNAL: "true"}
            )
            model_id = model.model_id
            self.client.finalize_logged_model(model_id, "READY")
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, event["step"])])
        metrics = [Metric(k, v, event["time"], event["step"], model_id) for k, v in event["values"].items()]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)


def _client(uri: str) -> Any:
    """A client that says nothing by itself and gives up soon: waiting and trying again is our business."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they announce each migration of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _reopened(client: Any, run_id: str) -> dict[str, str] | None:
    """The parameters of a run, which is running again; None where the store has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("tracking: the store has no run %s; a new one is opened", run_id)
        return None
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    client.update_run(run_id, status="RUNNING")
    return dict(run.data.params)


def _describe(client: Any, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    new = [Param(key, value) for key, value in params.items()]
    every = [RunTag(_name(key), str(value)[:MAX_TAG]) for key, value in tags.items()]
    for i in range(0, max(len(new), len(every)), 100):  # MLflow's limit of one request
        client.log_batch(run_id, params=new[i : i + 100], tags=every[i : i + 100])


def _experiment(client: Any, name: str, storage: Path | None) -> str:
    """The experiment's id. A server knows where artifacts go; with a database they go to storage."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = None if storage is None else (storage.absolute() / "mlflow_artifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:  # another driver was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _hopeless(error: Exception) -> bool:
    """Whether trying again cannot help: the event is at fault, not the store."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _away(uri: str, error: Exception) -> str:
    return (
        f"tracking: {_without_secrets(uri)} takes nothing ({type(error).__name__}: "
        f"{_without_secrets(str(error)):.300}); training goes on, metrics are in metrics.jsonl and what is "
        f"missing here waits in {PENDING}. Start the server or free the disk, or set tracking.uri"
    )


def _without_secrets(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _short(value: object) -> str:
    text = _without_secrets(str(value))
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _name(text: str) -> str:
    """A name MLflow takes: letters, digits, and _ - . space : /"""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _drained(events: "queue.Queue[Event | None]", most: int = 10**9) -> list[Event | None]:
    found: list[Event | None] = []
    with contextlib.suppress(queue.Empty):
        while len(found) < most and None not in found[-1:]:
            found.append(events.get_nowait())
    return found


def _read_lines(path: Path) -> list[Event]:
    """The events of a file, without a last line that was cut short."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict) and "kind" in event]
