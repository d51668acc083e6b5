"""train(): from a resolved Config to a finished run. The only place that builds a TorchTrainer."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray.cluster import connect
from pais_ray.config.identity import flatten
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config, rows_per_step
from pais_ray.data.stream import pipeline
from pais_ray.data.stream.plan import StepPlan
from pais_ray.figures import canvas, charts
from pais_ray.files.console import echo
from pais_ray.files.json_lines import metric_rows
from pais_ray.modeling.optim import Schedule
from pais_ray.reports import gallery
from pais_ray.runs import describe, directory, lock
from pais_ray.runs.checkpoints import ROLES, best_checkpoint, newest_verified
from pais_ray.runs.prepare import Data, check_outlives_job, learned_from_too, prepare
from pais_ray.tracking import record, settings, tracker
from pais_ray.tracking.logger import build_logger
from pais_ray.train.driver import resources
from pais_ray.train.driver.monitor import Monitor
from pais_ray.train.driver.progress import print_event
from pais_ray.train.driver.supervisor import Supervisor
from pais_ray.train.job import Job
from pais_ray.train.messages import Event, FatalError, Message, Notice
from pais_ray.train.worker import entrypoint, loop

SUMMARY = ("segm AP", "segm AP50", "segm AP75", "bbox AP", "bbox AP50")
PANEL_IMAGES = 4  # validation images in the picture of a run's end
POLL_S = 0.5  # between two looks at the monitor
STOPPING = "stopping after this step or the next one, with a checkpoint"
NOBODY_S = 30.0  # without a sign of life after which a wish to stop is heard by nobody
LAST_WORDS = 30.0  # s that workers have to end after one of them called its failure fatal
ATTEMPT_FOLDER = ".ray"  # Ray's own bookkeeping, beside ours; every start of the driver has a name of its own


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to; the content of ``--json``."""

    run_id: str | None
    run_dir: str
    step: int
    steps: int
    stopped: bool
    best_checkpoint: str | None
    last_checkpoint: str | None
    scores: dict[str, float]  # the last evaluation, ``teacher/segm_AP`` ...

    def to_json(self) -> dict[str, Any]:
        head = {k: v for k, v in vars(self).items() if k != "scores"}
        return {**head, "teacher/segm_AP": None, "student/segm_AP": None, **self.scores}


class WrongInput(ValueError):
    """What a worker found wrong with the user's input, in its words."""


class TrainingStopped(RuntimeError):
    """Training ended itself, with the reason as its message."""


def train(
    config: Config,
    *,
    force: bool = False,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    on_event: Callable[[Event], None] = print_event,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains, or resumes the run of that name, and returns what came out.

    ``tags`` are for MLflow, beside the run's own, as is the id of the ``parent`` run; ``heard`` gets what the
    workers say, by default to print it. ``stop``, once set, stops the run as Ctrl-C does, with a checkpoint.
    Raises ConfigError or DataError (wrong input) before anything starts, and ray.train.TrainingFailedError.
    """
    if "://" in config.run.storage_path:
        raise ConfigError(
            f"run.storage_path: expected a path that every node sees, got {config.run.storage_path!r}; mount the bucket"
        )
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # Ray sets it for a job's program
        check_outlives_job(config)
    name = config.run.name or f"{config.segmentor.name}-{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    root = Path(config.run.storage_path).absolute() / name
    config, data = prepare(config)
    config = directory.recorded_threads(root, config)
    directory.check_resume(root, config, force)
    directory.check_data(root, data, force)
    schedule = directory.kept_schedule(root, config)
    directory.check_workers(config, schedule)
    last = min(schedule.steps, config.train.stop_at or schedule.steps)
    done = directory.steps_made(root)
    echo(
        f"run {name}: {len(data.labeled)} labeled + {len(data.unlabeled)} unlabeled images, {len(data.val)} validation"
    )
    if data.scored is not None:
        echo(data.scored.summary())
    if data.labeled_groups is not None and len(data.labeled) < len(data.train.records):
        echo(
            f"hint: in {data.train.path} labeled images lie among unlabeled ones, and reading one reads its row group;"
        )
        echo("      shards of this split (pais-ray shard ... data.labeled=... or data.split=...) read less")
    if both := learned_from_too(data):
        echo(f"warning: {len(both)} of {len(data.val)} validation images are trained on as well, {both[0]} among them:")
        echo("         their AP says little about new images (`pais-ray validate` finds copies under other names, too)")
    echo(schedule.explain())
    newest, rows = newest_verified(root)[0], metric_rows(root)
    if done >= last and directory.evaluation_owed(root, newest, rows, config, schedule) is None:
        echo(f"run {name} is finished: {done} of {schedule.steps} steps made; nothing to do")
        card = record.RunRecord.read(root)
        if card is not None and card.status != "FINISHED":  # the driver died, or was stopped, after the last step
            close_tracking(root, config, "FINISHED")
        return result_of(root, schedule, stopped=False)
    with lock.lock_run(root):
        started_here = connect.connect()
        try:
            cpus, threads = resources.worker_resources(config, is_own_cluster=started_here)
            config = directory.with_threads(config, threads)
            directory.write_run_directory(root, config, data, schedule)
            return fit(root, config, data, schedule, cpus, tags or {}, parent, on_event, stop or threading.Event())
        finally:
            if started_here:
                ray.shutdown()


def fit(
    root: Path,
    config: Config,
    data: Data,
    schedule: Schedule,
    cpus: float,
    tags: Mapping[str, str],
    parent: str | None,
    on_event: Callable[[Event], None],
    stop: threading.Event,
) -> TrainResult:
    """Runs Ray Train to the end, to ``train.stop_at``, or to the user's Ctrl-C."""
    tags = {**describe.tags(config, data.manifest.split, data.facts), **tags}
    tracker.open_run(config.tracking, root.parent, root.name, flatten(config), tags, parent=parent, datasets=data.facts)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # outlives other nodes
    plan = StepPlan(
        seed=config.train.seed,
        num_labeled=len(data.labeled),
        num_unlabeled=len(data.unlabeled),
        labeled=config.batch.labeled,
        unlabeled=config.batch.unlabeled,
        labeled_groups=data.labeled_groups,
        unlabeled_groups=data.unlabeled_groups,
        lanes=rows_per_step(schedule, config),
    )
    assert config.train.threads_per_worker is not None
    job = Job(
        config=config,
        schedule=schedule,
        root=root,
        categories=data.train.categories,
        feed=pipeline.make_feed(
            plan,
            data.labeled,
            data.unlabeled,
            None if data.scored is None else data.scored.images,
            config.data.max_pixels,
        ),
        val=ray.put(data.val),
        ground_truth=os.path.abspath(data.truth) if isinstance(data.truth, str) else str(root / directory.GROUND_TRUTH),
        monitor=monitor,
        threads=config.train.threads_per_worker,
    )
    trainer = partial(
        TorchTrainer,
        entrypoint.run,
        train_loop_config={"job": ray.put(job)},  # by reference: the controller need not import what it is made of
        torch_config=TorchConfig(
            backend="nccl" if config.scaling.use_gpu else "gloo",
            timeout_s=math.ceil(loop.collective_timeout(config).total_seconds()),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if config.scaling.use_gpu else {})},
            elastic_resize_monitor_interval_s=config.scaling.resize_check_s,
            placement_strategy=config.scaling.placement_strategy,
        ),
    )
    status: record.Status = "FAILED"
    try:
        last = min(schedule.steps, config.train.stop_at or schedule.steps)
        stopped = follow(trainer, Supervisor(monitor, root, config, cpus, on_event), root, last, stop)
        status = "KILLED" if stopped else "FINISHED"
    finally:
        close_tracking(root, config, status)
    return result_of(root, schedule, stopped=stopped)


def close_tracking(root: Path, config: Config, status: record.Status) -> None:
    """Pictures of what there is, and the end of the MLflow run."""
    try:
        rows = metric_rows(root)
        if rows:
            charts.curves(rows, root / "figures" / "curves.png")
        if newest_verified(root)[0] is not None:
            canvas.save(gallery.of_run(root, PANEL_IMAGES), root / "figures" / "predictions.png")
    except Exception as error:  # a full disk, say: no picture is worth the run's own outcome
        echo(f"not all pictures were drawn: {error}")
    build_logger(config.tracking, root).close(status)


def fit_again(trainer: Callable[..., TorchTrainer], root: Path, max_failures: int, tell: Callable[[str], None]) -> None:
    """``trainer`` to its end. Ray starts a group again whose workers die in training, but gives up where one dies while
    the group is made: that is tried again here, up to ``max_failures`` times (-1: without end)."""
    failures = 0
    while True:
        run_config = ray.train.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}_{failures}",
            storage_path=str(root / ATTEMPT_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        )
        try:
            trainer(run_config=run_config).fit()
            return
        except ray.train.ControllerError as error:
            failures += 1
            if not died_at_start(error.controller_failure) or 0 <= max_failures < failures:
                raise
            tell(f"a worker died while the group was made; the workers start again ({type(error).__name__})")


def died_at_start(error: Exception) -> bool:
    """The death of a worker, or what it meant to another one that was about to meet it."""
    met = isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RuntimeError)
    return met or isinstance(error, ray.exceptions.RayActorError)


def follow(
    trainer: Callable[..., TorchTrainer], supervisor: Supervisor, root: Path, last: int, stop: threading.Event
) -> bool:
    """Runs the trainer in a thread of its own (its SIGINT handler aborts without a checkpoint; ours asks for one),
    passes on what the workers say and watches over them. Returns whether it was stopped, by the user or by ``stop``;
    raises what training raised."""
    outcome: dict[str, Any] = {}
    done = threading.Event()  # not Thread.join: interrupted, it takes a living thread for dead (Python < 3.13)

    def target() -> None:
        try:
            fit_again(
                trainer, root, supervisor.config.run.max_failures, lambda text: supervisor.report(text, "start_failed")
            )
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    asked = False
    fatal: Exception | None = None
    collective_timeout = LAST_WORDS / POLL_S
    with terminating_as(stop):
        while not done.is_set() and collective_timeout > 0:
            try:
                done.wait(timeout=POLL_S)
                fatal = pass_on(ray.get(supervisor.monitor.take_messages.remote()), supervisor.on_event) or fatal
                collective_timeout -= fatal is not None
                supervisor.check()
                if stop.is_set() and not asked:
                    ray.get(supervisor.monitor.request_stop.remote())  # what is announced has happened
                    asked = True
                    supervisor.on_event(Notice(text=f"{STOPPING}; Ctrl-C again to stop at once"))
                elif (
                    asked and supervisor.seconds_since_heartbeat() > NOBODY_S
                ):  # there is nothing newer than the last checkpoint
                    supervisor.on_event(Notice(text="there is no worker to make another checkpoint"))
                    break
            except KeyboardInterrupt:
                if stop.is_set():
                    raise
                stop.set()
    fatal = pass_on(ray.get(supervisor.monitor.take_messages.remote()), supervisor.on_event) or fatal
    if fatal is not None:
        raise fatal
    if "error" in outcome:
        raise outcome["error"]
    stopped = asked and directory.steps_made(root) < last
    if stopped:
        made = newest_verified(root)[0]
        where = "before the first checkpoint" if made is None else f"with a checkpoint in {root / 'checkpoints'}"
        supervisor.on_event(Notice(text=f"stopped {where}"))
    return stopped


@contextmanager
def terminating_as(stop: threading.Event) -> Iterator[None]:
    """SIGTERM, a notice of the end of this machine or job, asks for a checkpoint as Ctrl-C does, however often it
    comes: some send it twice."""
    if threading.current_thread() is not threading.main_thread():  # a search's trials: their driver hears it
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pass_on(messages: list[Message], on_event: Callable[[Event], None]) -> Exception | None:
    """Passes events to ``on_event``; returns a fatal error as the exception to raise."""
    fatal: Exception | None = None
    for message in messages:
        if isinstance(message, FatalError):
            fatal = WrongInput(message.text) if message.is_input_error else TrainingStopped(message.text)
        else:
            on_event(message)
    return fatal


def result_of(root: Path, schedule: Schedule, *, stopped: bool) -> TrainResult:
    """What the run directory says of the run."""
    last, _ = newest_verified(root)
    state = {} if last is None else json.loads((last / "state.json").read_text())
    scores: dict[str, float] = {}
    for row in metric_rows(root):
        scores |= {k: v for k, v in row.items() if k.startswith(("teacher/", "student/")) and "_class/" not in k}
    best = None if last is None else best_checkpoint(root, last, "teacher")
    return TrainResult(
        run_id=record.read_run_id(root),
        run_dir=str(root),
        step=state.get("step", 0),
        steps=schedule.steps,
        stopped=stopped,
        best_checkpoint=None if best is None else str(best),
        last_checkpoint=None if last is None else str(last),
        scores=scores,
    )


def summary(result: TrainResult, config: Config) -> str:
    """What a person wants to know at the end: the AP table, where the run lies, how to look at it."""
    lines = []
    if "teacher/segm_AP" in result.scores:
        lines.append(f"{'':8}" + "".join(f"{name:>12}" for name in SUMMARY))
        for role in ROLES:
            figures = [result.scores.get(f"{role}/{name.replace(' ', '_')}") for name in SUMMARY]
            lines.append(f"{role:8}" + "".join(f"{'-' if v is None else f'{v:.3f}':>12}" for v in figures))
    lines.append(f"run directory: {result.run_dir}")
    lines.append(f"look at it:    {settings.ui_command(config.tracking, Path(result.run_dir).parent)}")
    return "\n".join(lines)
