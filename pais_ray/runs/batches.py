"""The composition of a run's steps, and its batches in one process without Ray."""

from collections.abc import Iterator

import torch

from pais_ray.config.tree import Config, rows_per_step, run_schedule
from pais_ray.data.stream.batches import load_batches
from pais_ray.data.stream.plan import StepPlan, count_labeled_only_steps, rank_rows
from pais_ray.data.stream.rows import build_tables
from pais_ray.modeling.optim import Schedule
from pais_ray.runs.prepare import Data, prepare
from pais_ray.structures.batch import Batch


def step_plan(config: Config, data: Data, schedule: Schedule) -> StepPlan:
    """The composition of every step row of a run."""
    return StepPlan(
        seed=config.train.seed,
        num_labeled=len(data.labeled),
        num_unlabeled=len(data.unlabeled),
        labeled=config.batch.labeled,
        unlabeled=config.batch.unlabeled,
        labeled_groups=data.labeled_groups,
        unlabeled_groups=data.unlabeled_groups,
        lanes=rows_per_step(schedule, config),
    )


def local_batches(config: Config, device: torch.device | str = "cpu") -> Iterator[list[Batch]]:
    """The micro-batches of every step of a run, from its first step on, for ``train_step``.

    The images are read in this process, without Ray: for notebooks, debugging and tests. The batches are those of a run
    with one worker. Generates the built-in data set if the configuration has no data. Raises ConfigError or DataError.
    """
    config, data = prepare(config)
    schedule = run_schedule(config)
    plan = step_plan(config, data, schedule)
    scored = None if data.scored is None else data.scored.images
    tables = build_tables(data.labeled, data.unlabeled, scored)
    labeled_only = count_labeled_only_steps(config.method.unlabeled_weight, 0, schedule.steps)
    rows = rank_rows(0, schedule.steps, rows_per_step(schedule, config), 1, 0, labeled_only_steps=labeled_only)
    steps = load_batches(plan, tables, rows, config.scaled_views, device)
    return ([batch for batch in step if batch is not None] for step in steps)
