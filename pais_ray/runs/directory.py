"""A run directory: its files, what a resumed run may not change, and what earlier starts have left."""

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

LIMIT_FILE = "memory.json"  # the lowered limit of pseudo-labels, for the starts after one that ran out of memory
GROUND_TRUTH = "ground_truth.json"  # validation annotations that do not come from a COCO file


def check_resume(root: Path, config: Config, force: bool) -> None:
    """Refuse to resume a run with other values of settings that belong to its identity, unless ``force``.

    Prints the other settings that have changed. A directory without checkpoints may be started with any settings.
    Raises ConfigError.
    """
    path = root / "config.yaml"
    if not checkpoints(root):
        return
    recorded = load(path)
    changed = changed_identity(recorded, config)
    before, now = flatten(recorded), flatten(config)
    if changed and not force:
        values = ", ".join(f"{key} ({before.get(key)}, now {now.get(key)})" for key in changed)
        raise ConfigError(
            f"{path}: this run was started with different values of {values}; restore them, choose another "
            "run.name, delete the run, or override with --force"
        )
    for key in changed:
        echo(f"forced: {key} has changed since the start of the run")
    for key in sorted(k for k in now if before.get(k) != now[k] and k not in changed):
        echo(f"changed since the start of the run: {key}: {before.get(key)} -> {now[key]}")


def check_workers(config: Config, schedule: Schedule) -> None:
    """Raise ConfigError if there are more workers than rows in a step of this run."""
    rows = rows_per_step(schedule, config)
    if config.scaling.most > rows:
        raise ConfigError(
            f"scaling.num_workers: expected at most {rows}, the number of rows per step that this run was started "
            f"with, got {config.scaling.most}; lower scaling.num_workers, or start a new run"
        )


def check_data(root: Path, data: Data, force: bool) -> None:
    """Raise ConfigError if annotations, shards or scored masks of a run have changed, unless ``force``: labeled images
    could become unlabeled ones and vice versa."""
    path = root / "split.json"
    if force or not checkpoints(root) or not path.exists():
        return
    recorded, present = splits.SplitManifest.from_json(path.read_text(), str(path)), data.manifest
    facts = root / "data.json"
    shards_sha256 = json.loads(facts.read_text())["training"].get("shards_sha256") if facts.exists() else None
    before = (recorded.split.sha256, recorded.source_sha256, shards_sha256)
    now = (present.split.sha256, present.source_sha256, data.facts["training"].get("shards_sha256"))
    changed = None
    if before != now:
        changed = data.train.path
    elif recorded.scored_sha256 != present.scored_sha256:
        changed = "data.pseudo_labels" if data.scored is None else data.scored.path
    if changed is not None:
        raise ConfigError(
            f"{changed}: changed since the start of the run; restore it, choose another run.name, or override with "
            "--force"
        )


def with_recorded_threads(root: Path, config: Config) -> Config:
    """``config`` with the recorded threads per worker if it sets none: the order of floating-point sums depends on
    their number."""
    if config.train.threads_per_worker is not None or not checkpoints(root):
        return config
    return with_threads(config, load(root / "config.yaml").train.threads_per_worker)


def with_threads(config: Config, threads: int | None) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"threads_per_worker": threads})})


def recorded_schedule(root: Path, config: Config) -> Schedule:
    """The schedule that the run was started with: a resumed run keeps learning rates and milestones even if the number
    of workers has changed. A new schedule if --force changed its settings."""
    schedule, path = run_schedule(config), root / "schedule.json"
    if not checkpoints(root) or not path.exists():
        return schedule
    before = load(root / "config.yaml")
    if run_schedule(before) != run_schedule(config.model_copy(update={"scaling": before.scaling})):
        return schedule
    recorded = Schedule.from_json(json.loads(path.read_text()))
    if recorded != schedule:
        echo(f"the schedule from the start of the run is kept ({schedule.images_per_step} images per step now):")
    return recorded


def write_run_directory(root: Path, config: Config, data: Data, schedule: Schedule) -> None:
    """Create the directory and write config.yaml, split.json, schedule.json, data.json and, if needed,
    ground_truth.json. Workers add metrics.jsonl, events.jsonl, checkpoints and figures."""
    if not checkpoints(root):
        (root / LIMIT_FILE).unlink(missing_ok=True)  # of a start without checkpoints, perhaps on a smaller device
    (root / "checkpoints").mkdir(parents=True, exist_ok=True)
    (root / "figures").mkdir(exist_ok=True)
    (root / "stacks").mkdir(exist_ok=True)
    files = {
        "config.yaml": dump(config),
        "split.json": data.manifest.to_json(),
        "schedule.json": json.dumps(schedule.to_json()),
        "data.json": json.dumps(data.facts, indent=1),
    }
    if not isinstance(data.truth, str):
        files[GROUND_TRUTH] = json.dumps(data.truth)
    for name, text in files.items():
        atomic.replace_text(root / name, text)


def read_pseudo_label_limit(root: Path, configured: int) -> int:
    """The limit of pseudo-labels per image: ``configured``, or a lower one that an earlier start wrote."""
    path = root / LIMIT_FILE
    return min(configured, int(json.loads(path.read_text())["cap"])) if path.exists() else configured


def write_pseudo_label_limit(root: Path, limit: int) -> None:
    """Lower the limit for all later starts of the run. Raises OSError."""
    atomic.replace_text(root / LIMIT_FILE, json.dumps({"cap": limit}))


def is_evaluation_due(step: int, config: Config, schedule: Schedule) -> bool:
    """Whether the run is evaluated after ``step`` steps."""
    every = config.train.eval_every
    return step == schedule.steps or bool(every and step and step % every == 0)


def find_unscored_checkpoint(
    root: Path, newest: Path | None, rows: list[dict[str, Any]], config: Config, schedule: Schedule
) -> Path | None:
    """The checkpoint of the last evaluation due until the checkpoint ``newest``, if its scores are not in ``rows`` of
    metrics.jsonl because they were still being computed when the run ended. None if that checkpoint is unusable."""
    if newest is None:
        return None
    step = read_state(newest)["step"]
    every = config.train.eval_every
    due = step if is_evaluation_due(step, config, schedule) else step // every * every if every else 0
    if due == 0:
        return None
    scored = {role for row, role in product(rows, ROLES) if row["step"] == due and f"{role}/segm_AP" in row}
    if len(scored) == len(ROLES):
        return None
    unscored = checkpoint_folder(root, due)
    try:
        verify(unscored)
    except CheckpointError:
        return None
    return unscored


def completed_steps(root: Path) -> int:
    """Steps of the newest usable checkpoint; 0 without one. Raises CheckpointError if none of them is usable."""
    folder, _ = find_resumable_checkpoint(root)
    return 0 if folder is None else int(read_state(folder)["step"])
