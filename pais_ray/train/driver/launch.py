"""train(): from a resolved Config to a finished run. The only module that builds a TorchTrainer."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray.cluster import connect, ray_compat
from pais_ray.config.identity import flatten
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config
from pais_ray.data.stream import pipeline
from pais_ray.files.console import echo
from pais_ray.files.json_lines import metric_rows
from pais_ray.modeling.optim import Schedule
from pais_ray.runs import describe, directory, lock
from pais_ray.runs.batches import step_plan
from pais_ray.runs.checkpoints import newest_verified
from pais_ray.runs.prepare import Data, check_outlives_job, find_trained_validation_images, prepare
from pais_ray.tracking import record, tracker
from pais_ray.train.distributed import collective_timeout
from pais_ray.train.driver import resources
from pais_ray.train.driver.monitor import Monitor
from pais_ray.train.driver.progress import print_event
from pais_ray.train.driver.result import TrainResult, finish_tracking, read_result
from pais_ray.train.driver.run_loop import run_until_done
from pais_ray.train.driver.supervisor import Supervisor
from pais_ray.train.job import Job
from pais_ray.train.messages import Event
from pais_ray.train.worker import entrypoint


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a launch works on: the resolved config, its data and schedule, and what the caller wants."""

    root: Path  # the run directory
    config: Config
    data: Data
    schedule: Schedule
    tags: Mapping[str, str]  # for MLflow, in addition to those of the run
    parent: str | None  # ID of the parent run in MLflow
    on_event: Callable[[Event], None]
    stop: threading.Event  # stops the run once set

    @property
    def last_step(self) -> int:
        """The step at which this start ends: ``train.stop_at`` or the end of the schedule."""
        return min(self.schedule.steps, self.config.train.stop_at or self.schedule.steps)


def train(
    config: Config,
    *,
    force: bool = False,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    on_event: Callable[[Event], None] = print_event,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains a run, or resumes the run of the same name, and returns its result.

    ``tags`` are added to the run's tags in MLflow; ``parent`` is the ID of its parent run there. ``on_event``
    receives the events of the workers; by default they are printed. Setting ``stop`` stops the run with a
    checkpoint, as Ctrl-C does. Raises ConfigError or DataError (wrong input) before anything starts,
    InvalidInputError or RunFailedError if a worker reports a fatal error, and ray.train.TrainingFailedError.
    """
    config, root = resolve_run_directory(config)
    config, data = prepare(config)
    config = directory.with_recorded_threads(root, config)
    directory.check_resume(root, config, force)
    directory.check_data(root, data, force)
    schedule = directory.recorded_schedule(root, config)
    directory.check_workers(config, schedule)
    run = RunContext(
        root=root,
        config=config,
        data=data,
        schedule=schedule,
        tags=tags or {},
        parent=parent,
        on_event=on_event,
        stop=stop or threading.Event(),
    )
    print_overview(run)
    if is_finished(run):
        known = record.RunRecord.read(root)
        if known is not None and known.status != "FINISHED":  # the driver ended between the last step and this record
            finish_tracking(root, config, "FINISHED")
        return read_result(root, schedule, stopped=False)
    with lock.lock_run(root):
        is_own_cluster = connect.connect()
        try:
            cpus, threads = resources.worker_resources(config, is_own_cluster=is_own_cluster)
            run = replace(run, config=directory.with_threads(config, threads))
            directory.write_run_directory(root, run.config, data, schedule)
            return fit(run, cpus)
        finally:
            if is_own_cluster:
                ray.shutdown()


def resolve_run_directory(config: Config) -> tuple[Config, Path]:
    """The config with a name for the run, and the run directory. Raises ConfigError for unusable storage."""
    if "://" in config.run.storage_path:
        raise ConfigError(
            f"run.storage_path: expected a path that every node sees, got {config.run.storage_path!r}; "
            "use a shared file system"
        )
    if ray_compat.is_job_driver():
        check_outlives_job(config)
    name = config.run.name or f"{config.segmentor.name}-{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config, Path(config.run.storage_path).absolute() / name


def print_overview(run: RunContext) -> None:
    """Prints the data and the schedule of the run, with hints and warnings about them."""
    data = run.data
    echo(
        f"run {run.root.name}: {len(data.labeled)} labeled + {len(data.unlabeled)} unlabeled images, "
        f"{len(data.val)} validation"
    )
    if data.scored is not None:
        echo(data.scored.summary())
    if data.labeled_groups is not None and len(data.labeled) < len(data.train.records):
        echo(f"hint: {data.train.path} mixes labeled and unlabeled images, and reading one image reads its row group;")
        echo("      shards of this split (pais-ray shard ... data.labeled=... or data.split=...) read less")
    if both := find_trained_validation_images(data):
        echo(f"warning: {len(both)} of {len(data.val)} validation images are also training images, such as {both[0]}:")
        echo("         their AP does not measure generalization (`pais-ray validate` also finds copies of images)")
    echo(run.schedule.explain())


def is_finished(run: RunContext) -> bool:
    """Whether all steps were made and the last evaluation has its scores."""
    done = directory.completed_steps(run.root)
    newest, rows = newest_verified(run.root)[0], metric_rows(run.root)
    if done < run.last_step:
        return False
    if directory.find_unscored_checkpoint(run.root, newest, rows, run.config, run.schedule) is not None:
        return False
    echo(f"run {run.root.name} is finished: {done} of {run.schedule.steps} steps done; nothing to do")
    return True


def fit(run: RunContext, cpus: float) -> TrainResult:
    """Runs Ray Train until the last step or until the run is stopped. Workers reserve ``cpus`` CPUs each."""
    root, config, data = run.root, run.config, run.data
    tags = {**describe.tags(config, data.manifest.split, data.facts), **run.tags}
    tracker.open_run(
        config.tracking, root.parent, root.name, flatten(config), tags, parent=run.parent, datasets=data.facts
    )
    # On the driver's node: the monitor must survive the loss of any other node.
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=node).remote()  # type: ignore[attr-defined]
    trainer = build_trainer(build_job(run, monitor), cpus)
    supervisor = Supervisor(monitor, root, config, cpus, run.on_event)
    status: record.Status = "FAILED"
    try:
        stopped = run_until_done(trainer, supervisor, root, run.last_step, run.stop)
        status = "KILLED" if stopped else "FINISHED"
    finally:
        finish_tracking(root, config, status)
    return read_result(root, run.schedule, stopped=stopped)


def build_job(run: RunContext, monitor: ActorHandle) -> Job:
    """The inputs of the workers; the records of the data set go to the object store."""
    config, data = run.config, run.data
    plan = step_plan(config, data, run.schedule)
    scored = None if data.scored is None else data.scored.images
    # A COCO file, or the one that was written to the run directory.
    truth = os.path.abspath(data.truth) if isinstance(data.truth, str) else str(run.root / directory.GROUND_TRUTH)
    assert config.train.threads_per_worker is not None
    return Job(
        config=config,
        schedule=run.schedule,
        root=run.root,
        categories=data.train.categories,
        feed=pipeline.make_feed(plan, data.labeled, data.unlabeled, scored, config.data.max_pixels),
        val=ray.put(data.val),
        ground_truth=truth,
        monitor=monitor,
        threads=config.train.threads_per_worker,
    )


def build_trainer(job: Job, cpus: float) -> Callable[..., TorchTrainer]:
    """A TorchTrainer that lacks only its ``run_config``."""
    scaling = job.config.scaling
    return partial(
        TorchTrainer,
        entrypoint.run,
        train_loop_config={"job": ray.put(job)},  # by reference: the controller need not import the job's classes
        torch_config=TorchConfig(
            backend="nccl" if scaling.use_gpu else "gloo",
            timeout_s=math.ceil(collective_timeout(job.config.guards).total_seconds()),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if scaling.use_gpu else {})},
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
            placement_strategy=scaling.placement_strategy,
        ),
    )
