"""A run directory: whose it is, its papers, and what a later start may not change."""

import json
from itertools import product
from pathlib import Path
from typing import Any

from pais_ray.config.identity import changed_identity, flatten
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config, dump, load, rows_per_step, run_schedule
from pais_ray.data.annotations import splits
from pais_ray.files import atomic
from pais_ray.files.console import echo
from pais_ray.modeling.optim import Schedule
from pais_ray.runs.checkpoints import (
    ROLES,
    CheckpointError,
    checkpoint_folder,
    checkpoints,
    find_resumable_checkpoint,
    read_state,
    verify,
)
from pais_ray.runs.prepare import Data

LIMIT_FILE = "memory.json"  # the cap on pseudo-labels; outlives the rank that ran out of memory

GROUND_TRUTH = "ground_truth.json"  # of the run directory, where the validation data are no COCO file


def check_resume(root: Path, config: Config, force: bool) -> None:
    """Refuses to go on with a run whose identity the new config would change."""
    path = root / "config.yaml"
    if not checkpoints(root):  # nothing was made of it yet
        return
    changed = changed_identity(load(path), config)
    if changed and not force:
        raise ConfigError(
            f"{path}: this run was started with other values of {', '.join(changed)}; "
            "give them as they were, choose another run.name, delete the run, or insist with --force"
        )
    for key in changed:
        echo(f"forced: {key} differs from the run's start")
    before, now = flatten(load(path)), flatten(config)
    for key in sorted(k for k in now if before.get(k) != now[k] and k not in changed):
        echo(f"changed since the start: {key}: {before.get(key)} -> {now[key]}")


def check_workers(config: Config, schedule: Schedule) -> None:
    """Refuses more workers than a step of this run has rows."""
    rows = rows_per_step(schedule, config)
    if config.scaling.most > rows:
        raise ConfigError(
            f"scaling.num_workers: a step of this run has {rows} rows to share, as it began with, and "
            f"{config.scaling.most} workers are asked for; lower scaling.num_workers, or begin a new run"
        )


def with_recorded_threads(root: Path, config: Config) -> Config:
    """``config`` with the threads the run began with, where it names none: sums depend on their number."""
    if config.train.threads_per_worker is not None or not checkpoints(root):
        return config
    return with_threads(config, load(root / "config.yaml").train.threads_per_worker)


def with_threads(config: Config, threads: int | None) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"threads_per_worker": threads})})


def check_data(root: Path, data: Data, force: bool) -> None:
    """Refuses to go on where annotations or scored masks changed under their path: labels could change sides."""
    path = root / "split.json"
    if force or not checkpoints(root) or not path.exists():
        return
    was = splits.SplitManifest.from_json(path.read_text(), str(path))
    now = data.manifest
    changed = None
    facts = root / "data.json"
    shards_sha256 = json.loads(facts.read_text())["training"].get("shards_sha256") if facts.exists() else None
    before = (was.split.sha256, was.source_sha256, shards_sha256)  # other shards: the run's rows hold other images
    if before != (now.split.sha256, now.source_sha256, data.facts["training"].get("shards_sha256")):
        changed = data.train.path
    elif was.scored_sha256 != now.scored_sha256:
        changed = "data.pseudo_labels" if data.scored is None else data.scored.path
    if changed is not None:
        raise ConfigError(
            f"{changed}: changed since the run began; restore it, choose another run.name, or insist with --force"
        )


def recorded_schedule(root: Path, config: Config) -> Schedule:
    """The schedule the run began with: another number of workers must not move lr and milestones under its steps. A
    new one where --force let its settings change."""
    schedule, path = run_schedule(config), root / "schedule.json"
    if not checkpoints(root) or not path.exists():
        return schedule
    before = load(root / "config.yaml")
    if run_schedule(before) != run_schedule(config.model_copy(update={"scaling": before.scaling})):
        return schedule
    began = Schedule.from_json(json.loads(path.read_text()))
    if began != schedule:
        echo(f"schedule as the run began ({schedule.images_per_step} images a step now):")
    return began


def write_run_directory(root: Path, config: Config, data: Data, schedule: Schedule) -> None:
    """config.yaml, split.json, schedule.json, data.json, perhaps ground_truth.json; metrics.jsonl and others follow."""
    if not checkpoints(root):
        (root / LIMIT_FILE).unlink(missing_ok=True)  # of a start of which nothing is left, perhaps on a smaller device
    (root / "checkpoints").mkdir(parents=True, exist_ok=True)
    (root / "figures").mkdir(exist_ok=True)
    (root / "stacks").mkdir(exist_ok=True)
    papers = {
        "config.yaml": dump(config),
        "split.json": data.manifest.to_json(),
        "schedule.json": json.dumps(schedule.to_json()),
        "data.json": json.dumps(data.facts, indent=1),
    }
    if not isinstance(data.truth, str):
        papers[GROUND_TRUTH] = json.dumps(data.truth)
    for name, text in papers.items():
        atomic.replace_text(root / name, text)


def read_pseudo_label_limit(root: Path, configured: int) -> int:
    """The limit of pseudo-labels per image: ``configured``, or a lower one that an earlier start wrote."""
    path = root / LIMIT_FILE
    return min(configured, int(json.loads(path.read_text())["cap"])) if path.exists() else configured


def write_pseudo_label_limit(root: Path, limit: int) -> None:
    """Lower the limit for all later starts of the run. Raises OSError."""
    atomic.replace_text(root / LIMIT_FILE, json.dumps({"cap": limit}))


def is_evaluation_due(step: int, config: Config, schedule: Schedule) -> bool:
    every = config.train.eval_every
    return step == schedule.steps or bool(every and step and step % every == 0)


def find_unscored_checkpoint(
    root: Path, folder: Path | None, rows: list[dict[str, Any]], config: Config, schedule: Schedule
) -> Path | None:
    """The checkpoint of the last evaluation that was due until the one in ``folder``, where its scores are not among
    the logged ``rows``: they were still under way when the run ended. None too where its weights are gone."""
    if folder is None:
        return None
    made = read_state(folder)["step"]
    every = config.train.eval_every
    due = made if is_evaluation_due(made, config, schedule) else made // every * every if every else 0
    if due == 0:
        return None
    there = {role for row, role in product(rows, ROLES) if row["step"] == due and f"{role}/segm_AP" in row}
    if len(there) == len(ROLES):
        return None
    owed = checkpoint_folder(root, due)
    try:
        verify(owed)
    except CheckpointError:
        return None
    return owed


def completed_steps(root: Path) -> int:
    """Steps of the newest good checkpoint; 0 without one."""
    folder, _ = find_resumable_checkpoint(root)
    return 0 if folder is None else int(json.loads((folder / "state.json").read_text())["step"])
