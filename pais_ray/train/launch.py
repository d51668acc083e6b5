"""train(): from a resolved Config to a finished run. The only place that builds a TorchTrainer."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private import ray_constants
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pais_ray import access, gallery, plots, tracking
from pais_ray.config import Config, ConfigError, changed_identity, dump, flatten, load, run_schedule
from pais_ray.data import pipeline, splits
from pais_ray.data.plan import StepPlan
from pais_ray.optim import Schedule
from pais_ray.train import describe, start, watchdog, worker
from pais_ray.train.checkpoints import checkpoint_folder, checkpoints, metric_rows, newest_verified, usable_checkpoint
from pais_ray.train.log import Lines
from pais_ray.train.monitor import Monitor
from pais_ray.train.prepare import Data, check_outlives_job, prepare
from pais_ray.train.state import ROLES

SUMMARY = ("segm AP", "segm AP50", "segm AP75", "bbox AP", "bbox AP50")
PANEL_IMAGES = 4  # validation images in the picture of a run's end
NO_ROOM_S = 15.0  # without a sign of life before the driver looks whether the cluster has room
SILENCE_S = 120.0  # without one, though there is room, before it says so
POLL_S = 0.5  # between two looks at the monitor
LAST_WORDS = 30.0  # s that workers have to end after one of them called its failure fatal
GROUND_TRUTH = "ground_truth.json"  # of the run directory, where the validation data are no COCO file
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


def say(text: str) -> None:
    print(text, flush=True)


def tell(row: dict[str, Any]) -> None:
    """Prints what a worker said."""
    say(progress_line(row))


def progress_line(row: dict[str, Any]) -> str:
    """One line a person can follow: where we are, how it learns, how fast, how long still."""
    if "text" in row:
        return str(row["text"])
    if "role" in row:
        role = row["role"]
        ap = ", ".join(f"{kind} AP {row.get(f'{role}/{kind}_AP', float('nan')):.3f}" for kind in ("segm", "bbox"))
        return f"  evaluation at {row['step']}: {role} {ap}"
    labeled, unlabeled = (
        sum(v for k, v in row.items() if k.startswith(f"{part}/")) for part in ("labeled", "unlabeled")
    )
    kept = row.get("pseudo/kept_per_image")
    minutes, seconds = divmod(int(row["eta"]), 60)
    loss = f"loss {row['loss']:.3f}" if "loss" in row else "no loss, skipped"
    return (
        f"{row['step']:>6}/{row['last']} | {loss} (labeled {labeled:.3f}, unlabeled {unlabeled:.3f})"
        + (f" | {kept:.1f} pseudo-labels/img" if kept is not None else "")
        + f" | lr {row['lr']:.2g} | {row['time/img_per_s']:.1f} img/s"
        + f" | data wait {100 * row['time/data_wait_share']:.0f} %"
        + f" | ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )


def train(
    config: Config,
    *,
    force: bool = False,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    heard: Callable[[dict[str, Any]], None] = tell,
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
    config = recorded_threads(root, config)
    check_resume(root, config, force)
    check_data(root, data, force)
    schedule = kept_schedule(root, run_schedule(config), force)
    check_workers(config, schedule)
    last = min(schedule.steps, config.train.stop_at or schedule.steps)
    done = steps_made(root)
    say(f"run {name}: {len(data.labeled)} labeled + {len(data.unlabeled)} unlabeled images, {len(data.val)} validation")
    if data.scored is not None:
        say(data.scored.summary())
    if data.labeled_groups is not None and len(data.labeled) < len(data.train.records):
        say(f"hint: in {data.train.path} labeled images lie among unlabeled ones, and reading one reads its row group;")
        say("      shards of this split (pais-ray shard ... data.labeled=... or data.split=...) read less")
    say(schedule.explain())
    if done >= last:
        say(f"run {name} is finished: {done} of {schedule.steps} steps made; nothing to do")
        if not (root / "figures" / "curves.png").exists():  # the driver died between the last step and the end
            close_tracking(root, config, "FINISHED")
        return result_of(root, schedule, stopped=False)
    started_here = connect()
    try:
        cpus, threads = worker_resources(config)
        config = with_threads(config, threads)
        write_run_directory(root, config, data, schedule)
        return fit(root, config, data, schedule, cpus, tags or {}, parent, heard, stop or threading.Event())
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
    heard: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> TrainResult:
    """Runs Ray Train to the end, to ``train.stop_at``, or to the user's Ctrl-C."""
    tags = {**describe.tags(config, data.manifest.split, data.facts), **tags}
    tracking.open_run(
        config.tracking, root.parent, root.name, flatten(config), tags, parent=parent, datasets=data.facts
    )
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
        lanes=worker.rows_a_step(schedule, config),
    )
    assert config.train.threads_per_worker is not None
    job = worker.Job(
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
        ground_truth=os.path.abspath(data.truth) if isinstance(data.truth, str) else str(root / GROUND_TRUTH),
        monitor=monitor,
        threads=config.train.threads_per_worker,
    )
    trainer = partial(
        TorchTrainer,
        start.run,
        train_loop_config={"job": ray.put(job)},  # by reference: the controller need not import what it is made of
        torch_config=TorchConfig(backend="nccl" if config.scaling.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if config.scaling.use_gpu else {})},
            elastic_resize_monitor_interval_s=config.scaling.resize_check_s,
            placement_strategy=config.scaling.placement_strategy,
        ),
    )
    status: tracking.Status = "FAILED"
    try:
        last = min(schedule.steps, config.train.stop_at or schedule.steps)
        stopped = follow(trainer, Watch(monitor, root, config, cpus, heard), root, last, stop)
        status = "KILLED" if stopped else "FINISHED"
    finally:
        close_tracking(root, config, status)
    return result_of(root, schedule, stopped=stopped)


def close_tracking(root: Path, config: Config, status: tracking.Status) -> None:
    """Pictures of what there is, and the end of the MLflow run."""
    try:
        rows = metric_rows(root)
        if rows:
            plots.curves(rows, root / "figures" / "curves.png")
        if newest_verified(root)[0] is not None:
            plots.save(gallery.of_run(root, PANEL_IMAGES), root / "figures" / "predictions.png")
    except Exception as error:  # a full disk, say: no picture is worth the run's own outcome
        say(f"not all pictures were drawn: {error}")
    tracking.Tracker(config.tracking, root).close(status)


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


def follow(trainer: Callable[..., TorchTrainer], watch: "Watch", root: Path, last: int, stop: threading.Event) -> bool:
    """Runs the trainer in a thread of its own (its SIGINT handler aborts without a checkpoint; ours asks for one),
    passes on what the workers say and watches over them. Returns whether it was stopped, by the user or by ``stop``;
    raises what training raised."""
    outcome: dict[str, Any] = {}
    done = threading.Event()  # not Thread.join: interrupted, it takes a living thread for dead (Python < 3.13)

    def target() -> None:
        try:
            fit_again(trainer, root, watch.config.run.max_failures, lambda text: watch.tell(text, "start_failed"))
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    asked = 0
    fatal: Exception | None = None
    patience = LAST_WORDS / POLL_S
    with terminating_as_interrupt():
        while not done.is_set() and patience > 0:
            try:
                done.wait(timeout=POLL_S)
                fatal = pass_on(ray.get(watch.monitor.drain.remote()), watch.heard) or fatal
                patience -= fatal is not None
                watch.look()
                if stop.is_set() and not asked:
                    asked = 1
                    ray.get(watch.monitor.request.remote("stop"))
            except KeyboardInterrupt:
                asked += 1
                if asked > 1:
                    raise
                ray.get(watch.monitor.request.remote("stop"))  # what is announced has happened
                say("stopping after this step, with a checkpoint; Ctrl-C again to stop at once")
    fatal = pass_on(ray.get(watch.monitor.drain.remote()), watch.heard) or fatal
    if fatal is not None:
        raise fatal
    if "error" in outcome:
        raise outcome["error"]
    stopped = asked > 0 and steps_made(root) < last
    if stopped:
        watch.heard({"text": f"stopped with a checkpoint in {root / 'checkpoints'}"})
    return stopped


@contextmanager
def terminating_as_interrupt() -> Iterator[None]:
    """SIGTERM, a notice of the end of this machine or job, asks for a checkpoint as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # a search's trials: their driver hears it
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Watch:
    """Looks after the ranks from outside: nodes about to go, ranks that hang, a cluster without room."""

    def __init__(
        self, monitor: Any, root: Path, config: Config, cpus: float, heard: Callable[[dict[str, Any]], None]
    ) -> None:
        self.monitor, self.root, self.config, self.cpus, self.heard = monitor, root, config, cpus, heard
        self.leaving: set[str] = set()
        self.alive = self.told = time.monotonic()  # when some rank last gave a sign of life; when its lack was told
        self.events = Lines(root / "events.jsonl")

    def look(self) -> None:
        leaving = set(draining_nodes())
        if leaving - self.leaving:
            self.tell("a node is about to go: a checkpoint is written now", "node_leaving")
            self.monitor.request.remote("save")
        self.leaving = leaving
        pulse = ray.get(self.monitor.pulse.remote())
        now = time.monotonic()
        if any(b["silent"] < NO_ROOM_S for b in pulse):
            self.alive = self.told = now
        elif now - self.told > NO_ROOM_S:
            self.look_for_room(now)
        late = watchdog.stuck(pulse, self.config.guards)
        if late is not None:
            self.tell(watchdog.describe(late, self.root), "stall")
            watchdog.end(late, pulse)
            ray.get(self.monitor.silence.remote(None))

    def look_for_room(self, now: float) -> None:
        """Why no rank gives a sign of life; said again as long as it lasts."""
        lacking = lack_of_room(self.config, self.cpus)
        if lacking is not None:
            self.told = now
            ray.get(self.monitor.silence.remote(None))  # they are gone, and hang in no stage
            self.tell(f"waiting for room: {lacking}", "no_room")
        elif now - self.told > SILENCE_S:
            self.told = now
            free = ray.available_resources()
            self.tell(
                f"no worker has given a sign of life for {now - self.alive:.0f} s, though the cluster is large enough: "
                f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs of it are free now. Other jobs may "
                "hold the rest, or workers hang as they start: `ray status` and Ray's log folder tell",
                "silence",
            )

    def tell(self, text: str, event: str) -> None:
        self.heard({"text": text})
        self.events.append({"time": time.time(), "event": event, "text": text})


def draining_nodes() -> dict[str, int]:
    """Nodes with a notice of their end -> its deadline, as Ray Train's own watcher asks for them."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def pass_on(rows: list[dict[str, Any]], heard: Callable[[dict[str, Any]], None]) -> Exception | None:
    """Hands progress on; returns what a worker called fatal as the error it is."""
    fatal: Exception | None = None
    for row in rows:
        if "fatal" in row:
            fatal = WrongInput(row["fatal"]) if row["wrong_input"] else TrainingStopped(row["fatal"])
        else:
            heard(row)
    return fatal


def worker_resources(config: Config) -> tuple[float, int]:
    """(CPUs to reserve a worker, torch threads a worker). Reading tasks reserve none, but need some: workers take at
    most what leaves one CPU, half a CPU each on two."""
    workers, total = config.scaling.most, ray.cluster_resources().get("CPU", 1.0)
    cpus = config.scaling.cpus_per_worker
    if cpus is None:
        cpus = min(1.0, max(0.1, (total - 1.0) / workers if total > 1 else 0.5 / workers))
        cpus = float(f"{cpus:.2f}")
    lacking = lack_of_room(config, cpus)
    if lacking is not None:
        raise ConfigError(
            f"scaling.num_workers: {lacking}; lower scaling.num_workers or scaling.cpus_per_worker, "
            "or set scaling.use_gpu=false"
        )
    nodes = max(1, len([n for n in ray.nodes() if n["Alive"]]))
    # Ray's count knows of a container's limits, the system's of this process's.
    cores = min(int(total / nodes) or 1, len(os.sched_getaffinity(0)))
    return cpus, config.train.threads_per_worker or max(1, cores // -(-workers // nodes))


def lack_of_room(config: Config, cpus: float) -> str | None:
    """What the cluster would need for the least number of workers and does not have."""
    least, there = config.scaling.least, ray.cluster_resources()
    need = {"CPU": least * cpus, **({"GPU": float(least)} if config.scaling.use_gpu else {})}
    missing = [f"{there.get(k, 0.0):g} of {v:g} {k}s" for k, v in need.items() if there.get(k, 0.0) < v]
    if not missing:
        return None
    return (
        f"{least} workers of {cpus:g} CPUs{' and a GPU' if config.scaling.use_gpu else ''}; "
        f"the cluster has {' and '.join(missing)}"
    )


def connect() -> bool:
    """Joins the cluster of RAY_ADDRESS, or starts a local one. Returns whether it is ours to stop."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the user's relative paths
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead worker is noticed sooner
    # Ray's head keeps what it knows of past tasks, 100,000 of them: 20 to 100 MiB an hour of a run, for a day, that
    # nobody looks up.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "1000")
    # Ray keeps as many idle processes as CPUs are free. Where workers have them all, each reading or scoring task would
    # wait seconds for a process of its own.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(4, os.cpu_count() or 1)))
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}  # what workers say comes through the Monitor
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return False
    access.ensure_token()
    # Nobody scrapes a local cluster, and every data set of the stream would leave a hundred gauges in Ray's processes.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    with listening_on_loopback():
        ray.init(address="local", **quiet)
    return True


@contextmanager
def listening_on_loopback() -> Iterator[None]:
    """A cluster started within listens on loopback alone: Ray's own way where it does not run over several machines,
    a switch that it reads as it is imported, and in the processes that it starts."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


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
        say(f"forced: {key} differs from the run's start")
    before, now = flatten(load(path)), flatten(config)
    for key in sorted(k for k in now if before.get(k) != now[k] and k not in changed):
        say(f"changed since the start: {key}: {before.get(key)} -> {now[key]}")


def check_workers(config: Config, schedule: Schedule) -> None:
    """Refuses more workers than a step of this run has rows."""
    rows = worker.rows_a_step(schedule, config)
    if config.scaling.most > rows:
        raise ConfigError(
            f"scaling.num_workers: a step of this run has {rows} rows to share, as it began with, and "
            f"{config.scaling.most} workers are asked for; lower scaling.num_workers, or begin a new run"
        )


def recorded_threads(root: Path, config: Config) -> Config:
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


def kept_schedule(root: Path, schedule: Schedule, force: bool) -> Schedule:
    """The schedule the run began with: another number of workers must not move lr and milestones under its steps."""
    path = root / "schedule.json"
    if force or not checkpoints(root) or not path.exists():
        return schedule
    given = json.loads(path.read_text())
    began = Schedule(**{**given, "milestones": tuple(given["milestones"])})
    if began != schedule:
        say(f"schedule as the run began ({schedule.images_per_step} images a step now):")
    return began


def write_run_directory(root: Path, config: Config, data: Data, schedule: Schedule) -> None:
    """config.yaml, split.json, schedule.json, data.json, perhaps ground_truth.json; metrics.jsonl and others follow."""
    (root / "checkpoints").mkdir(parents=True, exist_ok=True)
    (root / "figures").mkdir(exist_ok=True)
    (root / "stacks").mkdir(exist_ok=True)
    papers = {
        "config.yaml": dump(config),
        "split.json": data.manifest.to_json(),
        "schedule.json": json.dumps(asdict(schedule)),
        "data.json": json.dumps(data.facts, indent=1),
    }
    if not isinstance(data.truth, str):
        papers[GROUND_TRUTH] = json.dumps(data.truth)
    for name, text in papers.items():
        aside = root / f".{name}.{os.getpid()}.partial"
        aside.write_text(text)
        os.replace(aside, root / name)


def steps_made(root: Path) -> int:
    """Steps of the newest good checkpoint; 0 without one."""
    folder, _ = usable_checkpoint(root)
    return 0 if folder is None else int(json.loads((folder / "state.json").read_text())["step"])


def result_of(root: Path, schedule: Schedule, *, stopped: bool) -> TrainResult:
    """What the run directory says of the run."""
    last, _ = newest_verified(root)
    state = {} if last is None else json.loads((last / "state.json").read_text())
    scores: dict[str, float] = {}
    for row in metric_rows(root):
        scores |= {k: v for k, v in row.items() if k.startswith(("teacher/", "student/")) and "_class/" not in k}
    best = state.get("best", {}).get("teacher")
    return TrainResult(
        run_id=tracking.read_run_id(root),
        run_dir=str(root),
        step=state.get("step", 0),
        steps=schedule.steps,
        stopped=stopped,
        best_checkpoint=None if best is None else str(checkpoint_folder(root, int(best["step"]))),
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
    lines.append(f"look at it:    {tracking.ui_command(config.tracking, Path(result.run_dir).parent)}")
    return "\n".join(lines)
