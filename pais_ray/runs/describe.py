"""Describe a run, so that runs can be found and compared: its data, tags, schedule and code. Does not import Ray."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from pais_ray.config.data_section import DataConfig
from pais_ray.config.tree import Config
from pais_ray.data.annotations.records import CocoDataset
from pais_ray.data.annotations.splits import Split
from pais_ray.data.shards.dataset import ShardDataset
from pais_ray.data.sources.scored_masks import ScoredFile
from pais_ray.tracking.mlflow_compat import GIT_COMMIT_TAG

GIT_TIMEOUT = 10.0  # s; enough for a checkout on slow storage
# They depend on scaling.num_workers, which does not belong to the identity of a run.
SCHEDULE = ("images_per_step", "steps", "lr")
Facts = dict[str, dict[str, Any]]  # use of the data -> name, source, sha256 of the annotations, counts


def facts(
    data: DataConfig, train: CocoDataset, val: CocoDataset, split: Split, scored: ScoredFile | None = None
) -> Facts:
    """The data of a run by their use: the contents of data.json."""
    parts = {"training": _fact(train.path, train.sha256, len(train.records))}
    parts["training"]["labeled"] = len(split.labeled_ids)
    if isinstance(train, ShardDataset):
        parts["training"]["shards_sha256"] = train.manifest_sha256
    if data.unlabeled is not None and split.unlabeled_sha256 is not None:
        parts["unlabeled"] = _fact(data.unlabeled, split.unlabeled_sha256, len(split.unlabeled_ids))
    else:
        parts["training"]["unlabeled"] = len(split.unlabeled_ids)
    if scored is not None:
        parts["scored"] = _fact(scored.path, scored.sha256, len(scored.images))
    parts["validation"] = _fact(val.path, val.sha256, len(val.records))
    return parts


def tags(config: Config, split: Split, data: Facts) -> dict[str, str]:
    """The tags by which runs are filtered in MLflow."""
    commit = git_commit()
    found = {
        "labels_pct": f"{100 * split.labeled:g}",
        "fold": str(split.fold),
        "split_sha256": split.sha256,
        "data_sha256": data["training"]["sha256"],
        "val_sha256": data["validation"]["sha256"],
        "scored_sha256": data["scored"]["sha256"] if "scored" in data else None,
        "segmentor": config.segmentor.name,
        "backbone": getattr(config.segmentor, "backbone", None),
        "preset": getattr(config.segmentor, "preset", None),
        "method": config.method.name,
        "git_commit": commit,
        GIT_COMMIT_TAG: commit and commit.removesuffix("-dirty"),
    }
    return {name: value for name, value in found.items() if value is not None}


def schedule(root: Path) -> dict[str, Any]:
    """The resolved schedule of the run at ``root``, by dotted name. Runs with other values are not repetitions."""
    recorded = json.loads((root / "schedule.json").read_text())
    return {f"schedule.{name}": recorded[name] for name in SCHEDULE}


def git_commit() -> str | None:
    """The commit of this code, ``-dirty`` if files were changed; None if the code is not in its own git checkout."""
    package = Path(__file__).resolve().parents[1]
    tracked = (
        "ls-files",
        "--error-unmatch",
        "__init__.py",
    )  # fails if installed inside the checkout of another project
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        for arguments in (tracked, describe):
            command = ["git", "-C", str(package), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _fact(path: str, sha256: str, images: int) -> dict[str, Any]:
    name = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
    source = path if "://" in path else os.path.abspath(path)
    return {"name": name, "source": source, "sha256": sha256, "images": images}
