"""A search in MLflow: a parent run, and the end of the runs of trials that were stopped."""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pais_ray.config.identity import flatten
from pais_ray.config.tree import load
from pais_ray.search.plan import SearchPlan
from pais_ray.search.scheduler import METRIC
from pais_ray.search.trials import Trial
from pais_ray.tracking import record, tracker
from pais_ray.tracking.logger import build_logger
from pais_ray.train.driver.result import finish_tracking


class SearchTracker:
    """The parent run of a search; a resumed search reopens it."""

    def __init__(self, plan: SearchPlan, tags: Mapping[str, str], datasets: Mapping[str, Mapping[str, Any]]) -> None:
        self.plan = plan
        self.config = plan.base.tracking
        params = flatten(plan.base) | {path: str(domain) for path, domain in plan.space.items()}
        all_tags = {**tags, "kind": "search"}
        name = plan.root.name
        self.run_id = tracker.open_run(self.config, plan.root.parent, name, params, all_tags, datasets=datasets)
        self.closing = ThreadPoolExecutor(1, thread_name_prefix="close")  # a slow server must not block Tune

    def close_trial(self, trial: Trial, status: record.Status) -> None:
        """Draws the figures of a trial that was stopped and ends its run, with the reason as a tag."""
        root = self.plan.trial_root(trial.id)
        if (root / record.RECORD_FILE).exists():
            self.closing.submit(self._close_trial, root, f"{trial.state} {trial.why}".strip(), status)

    def close(self, result: Mapping[str, Any], status: record.Status) -> None:
        """Logs the result and ends the parent run, after the runs of its trials."""
        self.closing.shutdown(wait=True)
        best = result["best"]
        if best is not None:
            row = {"step": best["step"], "time": round(time.time(), 3), METRIC: best[METRIC]}
            with (self.plan.root / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            add_tags(self.plan.root, {"best": json.dumps(best["params"])})
        build_logger(self.config, self.plan.root).close(status)

    def _close_trial(self, root: Path, state: str, status: record.Status) -> None:
        add_tags(root, {"search.state": state})
        finish_tracking(root, load(root / "config.yaml"), status)


def add_tags(root: Path, tags: Mapping[str, str]) -> None:
    """Adds tags to the run in ``root`` if it is tracked; the next synchronization sends them to MLflow."""
    known = record.RunRecord.read(root)
    if known is not None:
        known.model_copy(update={"tags": {**known.tags, **tags}}).write(root)
