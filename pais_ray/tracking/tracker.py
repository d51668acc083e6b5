"""MLflow: one run per training, an image of its run directory, and never in the way of training.

What a run has to tell lies in its directory; a ``Tracker`` follows it in a thread and sends what is new. While the
store is away nothing is kept for it: the next one that looks at the directory sends whatever the store lacks, be it
the same thread, the next start, or ``sync``. The calls to MLflow are in mirror.py, imported late: it takes seconds.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pais_ray.tracking.record import CARD, RunRecord, Status, read_run_id, without_secrets
from pais_ray.tracking.settings import TrackingConfig, tracking_uri

LOOK_EVERY = 5.0  # s between two looks at the directory that nobody asked for

LAST_ATTEMPTS = 3  # when closing

LONGEST_PAUSE = 300.0  # s between two knocks at a store that is away

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
    """Opens the run of the directory ``storage/run_name``, or opens it again, and returns its id. For the driver.

    ``params`` is flat. Values that differ from those of the first start become tags ``resumed.NAME``: MLflow's
    parameters are written once. ``parent`` is the id of the run that this one is shown under. Where the store does
    not answer, that is a warning; the Tracker goes on trying.
    """
    if not config.enabled:
        return None
    root = storage.absolute() / run_name
    root.mkdir(parents=True, exist_ok=True)
    before = RunRecord.read(root)
    card = RunRecord(
        key=before.key if before else uuid.uuid4().hex,
        name=run_name,
        params={key: without_secrets(str(value)) for key, value in params.items()},
        tags={key: without_secrets(value) for key, value in tags.items()},
        parent=parent,
        datasets=json.loads(without_secrets(json.dumps(datasets or {}))),
    )
    card.write(root)
    try:
        _mirror(config, root)
    except Exception as error:  # whatever the store throws, training goes on
        log.warning(_away(tracking_uri(config, storage), error, root))
    return read_run_id(root)


def sync(config: TrackingConfig, root: Path) -> dict[str, int]:
    """Sends whatever MLflow lacks of the run at ``root``; returns how many metrics, artifacts and checkpoints.

    Raises ValueError where the run was not tracked, and what MLflow raises.
    """
    if not config.enabled or RunRecord.read(root) is None:
        raise ValueError(f"{root}: expected a tracked run, got no {CARD}; train it with tracking.enabled=true")
    mirror = _mirror(config, root)
    mirror.update()
    return dict(mirror.sent)


class Tracker:
    """Follows the run directory and brings to MLflow what is new in it. Nothing here waits for MLflow or raises.

    For one process at a time: rank 0 while training, then the driver.
    """

    def __init__(self, config: TrackingConfig, root: Path) -> None:
        self._config, self._root = config, root.absolute()
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if config.enabled:
            self._thread.start()

    def changed(self) -> None:
        """Says that there is something new; it is sent soon."""
        self._news.set()

    def close(self, status: Status | None = None, timeout: float = 30.0) -> None:
        """Sends what is left, for at most ``timeout`` s. ``status`` is how the run ended: KILLED means stopped on
        purpose, None that it goes on."""
        if not self._config.enabled or self._closing.is_set():
            return
        try:
            card = RunRecord.read(self._root)
            if card is not None and status is not None:
                card.model_copy(update={"status": status}).write(self._root)
        except (OSError, ValueError) as error:
            log.warning(f"{self._root / CARD}: the end of the run is not noted ({error}); free some space")
        self._closing.set()
        self._news.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            uri = without_secrets(tracking_uri(self._config, self._root.parent))
            log.warning(f"tracking: {uri} was still busy after {timeout:g} s; {_remedy(self._root)}")

    def _work(self) -> None:
        mirror: Any = None
        pause = next_knock = 0.0  # s; a pause of zero: all is well
        warned, attempts = False, LAST_ATTEMPTS
        while attempts > 0:
            self._news.wait(0.5 * (LAST_ATTEMPTS - attempts) if self._closing.is_set() else LOOK_EVERY)
            closing = self._closing.is_set()
            self._news.clear()
            if not closing and time.monotonic() < next_knock:
                continue
            try:
                mirror = mirror or _mirror(self._config, self._root)
                mirror.update()
            except Exception as error:
                pause = min(max(LOOK_EVERY, 2 * pause), LONGEST_PAUSE)
                next_knock = time.monotonic() + pause
                attempts -= closing
                if not warned or attempts == 0:
                    log.warning(_away(tracking_uri(self._config, self._root.parent), error, self._root))
                warned = True
            else:
                pause = next_knock = 0.0
                if closing:
                    return


def _mirror(config: TrackingConfig, root: Path) -> Any:
    """The run directory's image in MLflow, opened. Raises what MLflow raises."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from pais_ray.tracking.mirror import Mirror

    return Mirror(tracking_uri(config, root.parent), config.experiment, root)


def _away(uri: str, error: Exception, root: Path) -> str:
    return (
        f"tracking: {without_secrets(uri)} does not take everything ({type(error).__name__}: "
        f"{without_secrets(str(error)):.300}); training goes on. Start the server, free the disk, or set tracking.uri; "
        f"{_remedy(root)}"
    )


def _remedy(root: Path) -> str:
    return f"what is missing there is in {root} and is sent when it answers again, or by `pais-ray sync {root}`"
