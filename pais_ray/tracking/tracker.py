"""MLflow tracking: one MLflow run per training run, mirrored from the run directory in a background thread.

Everything that is tracked is in the run directory first; ``MLflowTracker`` polls the directory and sends what is new.
Nothing is buffered while the store is unavailable: whatever the store lacks is sent at the next opportunity, by the
same thread, by the next start of the run, or by ``sync``. The calls to MLflow are in mirror.py, which is imported late
because that takes seconds.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pais_ray.tracking import mlflow_compat
from pais_ray.tracking.record import RECORD_FILE, RunRecord, Status, read_run_id, redact_secrets
from pais_ray.tracking.settings import TrackingConfig, tracking_uri

if TYPE_CHECKING:
    from pais_ray.tracking.mirror import Mirror

POLL_INTERVAL = 5.0  # s between two polls of the run directory without a notification
CLOSING_ATTEMPTS = 3  # to reach the store when closing
MAX_RETRY_DELAY = 300.0  # s between two attempts to reach an unavailable store
CLOSE_TIMEOUT = 30.0  # s

log = logging.getLogger(__name__)


def open_run(
    config: TrackingConfig,
    storage: Path,
    run_name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    *,
    parent: str | None = None,
    datasets: Mapping[str, Mapping[str, Any]] | None = None,
) -> str | None:
    """Open or reopen the MLflow run of the directory ``storage/run_name`` and return its id. Called by the driver.

    ``params`` is flat. A value that differs from that of the first start becomes a tag ``resumed.NAME``, because
    MLflow parameters cannot change. ``parent`` is the id of the parent run. An unavailable store causes a warning and
    the result None; the tracker keeps trying.
    """
    if not config.enabled:
        return None
    root = storage.absolute() / run_name
    root.mkdir(parents=True, exist_ok=True)
    before = RunRecord.read(root)
    record = RunRecord(
        key=before.key if before else uuid.uuid4().hex,
        name=run_name,
        params={key: redact_secrets(str(value)) for key, value in params.items()},
        tags={key: redact_secrets(value) for key, value in tags.items()},
        parent=parent,
        datasets=json.loads(redact_secrets(json.dumps(datasets or {}))),
    )
    record.write(root)
    try:
        _open_mirror(config, root)
    except Exception as error:  # training must start whatever the store raises
        log.warning(_failure_message(tracking_uri(config, storage), error, root))
    return read_run_id(root)


def sync(config: TrackingConfig, root: Path) -> dict[str, int]:
    """Send everything that MLflow lacks of the run at ``root``; return the number of metrics, artifacts, checkpoints.

    Raises ValueError if the run is not tracked, and the errors of the MLflow client.
    """
    if not config.enabled or RunRecord.read(root) is None:
        raise ValueError(f"{root}: expected a tracked run, got no {RECORD_FILE}; train it with tracking.enabled=true")
    mirror = _open_mirror(config, root)
    mirror.update()
    return dict(mirror.sent)


class MLflowTracker:
    """Mirrors the run directory ``root`` in MLflow from a background thread; a ``MetricsLogger``.

    Its methods neither wait for MLflow (``close``: for ``CLOSE_TIMEOUT`` at most) nor raise. Only one process at a
    time may track a run: rank 0 during training, the driver afterwards.
    """

    def __init__(self, config: TrackingConfig, root: Path) -> None:
        self._config, self._root = config, root.absolute()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Wake the thread. It reads the values from metrics.jsonl, which also has those that MLflow still lacks."""
        self._changed.set()

    def close(self, status: Status | None = None, timeout: float = CLOSE_TIMEOUT) -> None:
        """Send what is left, for at most ``timeout`` s, and stop.

        ``status`` is how the run ended; KILLED means that it was stopped on purpose, None that it continues.
        """
        if self._closing.is_set():
            return
        try:
            record = RunRecord.read(self._root)
            if record is not None and status is not None:
                record.model_copy(update={"status": status}).write(self._root)
        except (OSError, ValueError) as error:
            log.warning(f"{self._root / RECORD_FILE}: the status of the run was not written ({error}); free disk space")
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            uri = redact_secrets(tracking_uri(self._config, self._root.parent))
            log.warning(f"tracking: {uri} did not finish within {timeout:g} s; {_remedy(self._root)}")

    def _run(self) -> None:
        mirror: Mirror | None = None
        delay = next_attempt = 0.0  # s; a delay of zero: the last attempt succeeded
        warned, attempts_left = False, CLOSING_ATTEMPTS
        while attempts_left > 0:
            closing_delay = 0.5 * (CLOSING_ATTEMPTS - attempts_left)
            self._changed.wait(closing_delay if self._closing.is_set() else POLL_INTERVAL)
            closing = self._closing.is_set()
            self._changed.clear()
            if not closing and time.monotonic() < next_attempt:
                continue
            try:
                mirror = mirror or _open_mirror(self._config, self._root)
                mirror.update()
            except Exception as error:  # training must continue whatever the store raises
                delay = min(max(POLL_INTERVAL, 2 * delay), MAX_RETRY_DELAY)
                next_attempt = time.monotonic() + delay
                attempts_left -= closing
                if not warned or attempts_left == 0:
                    log.warning(_failure_message(tracking_uri(self._config, self._root.parent), error, self._root))
                warned = True
            else:
                delay = next_attempt = 0.0
                if closing:
                    return


def _open_mirror(config: TrackingConfig, root: Path) -> "Mirror":
    """Raises the errors of the MLflow client."""
    mlflow_compat.set_environment()
    from pais_ray.tracking.mirror import Mirror

    return Mirror(tracking_uri(config, root.parent), config.experiment, root)


def _failure_message(uri: str, error: Exception, root: Path) -> str:
    return (
        f"tracking: {redact_secrets(uri)} did not accept all data ({type(error).__name__}: "
        f"{redact_secrets(str(error)):.300}); training continues. Start the server, free disk space, or set "
        f"tracking.uri; {_remedy(root)}"
    )


def _remedy(root: Path) -> str:
    return f"the missing data is in {root} and is sent when the server responds again, or by `pais-ray sync {root}`"
