"""A search in MLflow: a parent run, and an end for the runs of trials whose process was stopped."""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pais_ray.config.identity import flatten
from pais_ray.config.tree import load
from pais_ray.search.plan import Plan
from pais_ray.search.scheduler import METRIC
from pais_ray.search.trials import Trial
from pais_ray.tracking import record, tracker
from pais_ray.tracking.logger import build_logger
from pais_ray.train.driver.result import finish_tracking


class Tracked:
    """The parent run of the search, opened again where there is one."""

    def __init__(self, plan: Plan, tags: Mapping[str, str], datasets: Mapping[str, Mapping[str, Any]]) -> None:
        self.plan = plan
        self.config = plan.base.tracking
        params = flatten(plan.base) | {path: str(domain) for path, domain in plan.space.items()}
        everything = {**tags, "kind": "search"}
        name = plan.root.name
        self.run_id = tracker.open_run(self.config, plan.root.parent, name, params, everything, datasets=datasets)
        self.closing = ThreadPoolExecutor(1, thread_name_prefix="close")  # a slow server must not hold up Tune

    def close_trial(self, trial: Trial, status: record.Status) -> None:
        """Pictures and an end for a trial that was stopped, with the reason as a tag; nobody else ends it."""
        root = self.plan.trial_root(trial.id)
        if (root / record.RECORD_FILE).exists():
            self.closing.submit(self._close_trial, root, f"{trial.state} {trial.why}".strip(), status)

    def close(self, result: Mapping[str, Any], status: record.Status) -> None:
        """What came out, and the end of the parent's run, after those of its trials."""
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
    """Tags for the run at ``root``, as far as it is tracked; the next look at it brings them to MLflow."""
    card = record.RunRecord.read(root)
    if card is not None:
        card.model_copy(update={"tags": {**card.tags, **tags}}).write(root)
