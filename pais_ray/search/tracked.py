"""A search in MLflow: a parent run, and an end for the runs of trials whose process was stopped."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pais_ray import tracking
from pais_ray.config import flatten, load
from pais_ray.search.control import METRIC
from pais_ray.search.ledger import Trial
from pais_ray.search.plan import Plan
from pais_ray.train import launch

PARENT = "mlflow.parentRunId"  # the tag by which MLflow's UI nests runs


class Tracked:
    """The parent run of the search, opened again where there is one."""

    def __init__(self, plan: Plan, tags: Mapping[str, str]) -> None:
        self.plan = plan
        self.config = plan.base.tracking
        params = flatten(plan.base) | {path: str(domain) for path, domain in plan.space.items()}
        known = launch.read_run_id(plan.root)
        everything = {**tags, "kind": "search"}
        self.run_id = tracking.open_run(self.config, plan.root.parent, plan.root.name, params, everything, known)
        if self.run_id is not None:
            (plan.root / "mlflow_run_id").write_text(self.run_id)
        self.closing = ThreadPoolExecutor(1, thread_name_prefix="close")  # a slow server must not hold up Tune

    def trial_tags(self) -> dict[str, str]:
        """What makes a trial's run a child of the parent."""
        tags = {"search": self.plan.root.name}
        return tags if self.run_id is None else {**tags, PARENT: self.run_id}

    def close_trial(self, trial: Trial, status: str) -> None:
        """Curves and an end for a trial that was stopped, with the reason as a tag; nobody else ends it."""
        root = self.plan.trial_root(trial.id)
        run_id = launch.read_run_id(root)
        if run_id is not None:
            tags = {"search.state": f"{trial.state} {trial.why}".strip()}
            self.closing.submit(launch.close_tracking, root, load(root / "config.yaml"), run_id, status, tags)

    def close(self, result: Mapping[str, Any], written: list[Path], status: str) -> None:
        """What came out, and the end of the parent's run, after those of its trials."""
        self.closing.shutdown(wait=True)
        tracker = tracking.Tracker(self.config, self.plan.root, self.run_id)
        for path in written:
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else "")
        best = result["best"]
        if best is not None:
            tracker.log_metrics({METRIC: best[METRIC]}, best["step"])
            tracker.set_tags({"best": json.dumps(best["params"])})
        tracker.close(status)
