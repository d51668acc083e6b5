"""train(): from a resolved Config to a finished run. The only place that builds a TorchTrainer."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from pais_ray import plots, tracking
from pais_ray.config import Config, ConfigError, changed_identity, dump, flatten, load, run_schedule
from pais_ray.data import pipeline, splits
from pais_ray.data.plan import StepPlan
from pais_ray.optim import Schedule
from pais_ray.train import worker
from pais_ray.train.monitor import Monitor
from pais_ray.train.prepare import Data, prepare
from pais_ray.train.state import ROLES, checkpoint_folder, checkpoints, metric_rows, newest_verified, usable_checkpoint

SUMMARY = ("segm AP", "segm AP50", "segm AP75", "bbox AP", "bbox AP50")
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
    return (
        f"{row['step']:>6}/{row['last']} | loss {row['loss']:.3f} (labeled {labeled:.3f}, unlabeled {unlabeled:.3f})"
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
    heard: Callable[[dict[str, Any]], None] = tell,
) -> TrainResult:
    """Trains, or resumes the run of that name, and returns what came out.

    ``tags`` are for MLflow, beside the run's own; ``heard`` gets what the workers say, by default to print it.
    Raises ConfigError or DataError (wrong input) before anything starts, and ray.train.TrainingFailedError.
    """
    if "://" in config.run.storage_path:
        raise ConfigError(
            f"run.storage_path: expected a path that every node sees, got {config.run.storage_path!r}; mount the bucket"
        )
    name = config.run.name or f"{config.segmentor.name}-{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    root = Path(config.run.storage_path).absolute() / name
    config, data = prepare(config)
    check_resume(root, config, force)
    check_data(root, data, force)
    schedule = kept_schedule(root, run_schedule(config), force)
    last = min(schedule.steps, config.train.stop_at or schedule.steps)
    done = steps_made(root)
    say(f"run {name}: {len(data.labeled)} labeled + {len(data.unlabeled)} unlabeled images, {len(data.val)} validation")
    say(schedule.explain())
    if done >= last:
        say(f"run {name} is finished: {done} of {schedule.steps} steps made; nothing to do")
        if not (root / "figures" / "curves.png").exists():  # the driver died between the last step and the end
            close_tracking(root, config, read_run_id(root), "FINISHED")
        return result_of(root, schedule, run_id=read_run_id(root), stopped=False)
    write_run_directory(root, config, data, schedule)
    started_here = connect()
    try:
        return fit(root, config, data, schedule, tags or {}, heard)
    finally:
        if started_here:
            ray.shutdown()


def fit(
    root: Path,
    config: Config,
    data: Data,
    schedule: Schedule,
    tags: Mapping[str, str],
    heard: Callable[[dict[str, Any]], None],
) -> TrainResult:
    """Runs Ray Train to the end, to ``train.stop_at``, or to the user's Ctrl-C."""
    run_id = tracking.open_run(
        config.tracking,
        Path(config.run.storage_path).absolute(),
        root.name,
        flatten(config),
        {**run_tags(config, data), **tags},
        read_run_id(root),
    )
    if run_id is not None:
        (root / "mlflow_run_id").write_text(run_id)
    monitor = Monitor.remote()  # type: ignore[attr-defined]
    plan = StepPlan(
        seed=config.train.seed,
        num_labeled=len(data.labeled),
        num_unlabeled=len(data.unlabeled),
        labeled=config.batch.labeled,
        unlabeled=config.batch.unlabeled,
    )
    cpus, threads = worker_resources(config)
    job = worker.Job(
        config=config,
        schedule=schedule,
        root=root,
        categories=data.train.categories,
        feed=pipeline.make_feed(plan, data.labeled, data.unlabeled),
        val=ray.put(data.val),
        ground_truth=os.path.abspath(data.truth) if isinstance(data.truth, str) else str(root / GROUND_TRUTH),
        monitor=monitor,
        tracking_run=run_id,
        threads=threads,
    )
    trainer = TorchTrainer(
        worker.run,
        train_loop_config={"job": ray.put(job)},  # by reference: the controller need not import what it is made of
        torch_config=TorchConfig(backend="nccl" if config.scaling.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if config.scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}",
            storage_path=str(root / ATTEMPT_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
        ),
    )
    status = "FAILED"
    try:
        stopped = follow(trainer, monitor, root, min(schedule.steps, config.train.stop_at or schedule.steps), heard)
        status = "KILLED" if stopped else "FINISHED"
    finally:
        close_tracking(root, config, run_id, status)
    return result_of(root, schedule, run_id=run_id, stopped=stopped)


def close_tracking(
    root: Path, config: Config, run_id: str | None, status: str, tags: Mapping[str, str] | None = None
) -> None:
    """Curves of what there is, the run's papers as artifacts, and the end of the MLflow run."""
    rows = metric_rows(root)
    tracker = tracking.Tracker(config.tracking, root, run_id)
    if tags:
        tracker.set_tags(tags)
    try:
        if rows:
            plots.curves(rows, root / "figures" / "curves.png")
            tracker.log_artifact(root / "figures" / "curves.png", "figures")
    except Exception as error:  # a full disk, say: no picture is worth the run's own outcome
        say(f"no curves were drawn: {error}")
    last, _ = newest_verified(root)
    if last is not None:
        tracker.log_checkpoint("last", str(last), int(last.name.split("_")[1]), {})
    tracker.close(status)


def follow(trainer: TorchTrainer, monitor: Any, root: Path, last: int, heard: Callable[[dict[str, Any]], None]) -> bool:
    """Runs the trainer in a thread of its own (its SIGINT handler aborts without a checkpoint; ours asks for one)
    and passes on what the workers say. Returns whether the user stopped it; raises what training raised."""
    outcome: dict[str, Any] = {}
    done = threading.Event()  # not Thread.join: interrupted, it takes a living thread for dead (Python < 3.13)

    def target() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    asked = 0
    fatal: Exception | None = None
    patience = LAST_WORDS / 0.5
    while not done.is_set() and patience > 0:
        try:
            done.wait(timeout=0.5)
            fatal = pass_on(ray.get(monitor.drain.remote()), heard) or fatal
            patience -= fatal is not None
        except KeyboardInterrupt:
            asked += 1
            if asked > 1:
                raise
            ray.get(monitor.request_stop.remote())  # what is announced has happened
            say("stopping after this step, with a checkpoint; Ctrl-C again to stop at once")
    fatal = pass_on(ray.get(monitor.drain.remote()), heard) or fatal
    if fatal is not None:
        raise fatal
    if "error" in outcome:
        raise outcome["error"]
    stopped = asked > 0 and steps_made(root) < last
    if stopped:
        say(f"stopped with a checkpoint in {root / 'checkpoints'}")
    return stopped


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
    """(CPUs to reserve a worker, torch threads a worker). Reading tasks need a free CPU or the streams starve:
    workers take at most what leaves one, half a CPU each on two."""
    workers, total = config.scaling.num_workers, ray.cluster_resources().get("CPU", 1.0)
    cpus = config.scaling.cpus_per_worker
    if cpus is None:
        cpus = min(1.0, max(0.1, (total - 1.0) / workers if total > 1 else 0.5 / workers))
        cpus = float(f"{cpus:.2f}")
    if workers * cpus + pipeline.READ_TASK_CPUS > total:
        raise ConfigError(
            f"scaling.num_workers: {workers} workers of {cpus} CPUs and {pipeline.READ_TASK_CPUS} for reading data, "
            f"and the cluster has {total:g}; lower scaling.num_workers or scaling.cpus_per_worker"
        )
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if config.scaling.use_gpu and gpus < workers:
        raise ConfigError(
            f"scaling.use_gpu: {workers} workers need a GPU each, and the cluster has {gpus:g}; "
            "lower scaling.num_workers or set scaling.use_gpu=false"
        )
    nodes = max(1, len([n for n in ray.nodes() if n["Alive"]]))
    # Ray's count knows of a container's limits, the system's of this process's.
    cores = min(int(total / nodes) or 1, len(os.sched_getaffinity(0)))
    return cpus, config.train.threads_per_worker or max(1, cores // -(-workers // nodes))


def connect() -> bool:
    """Joins the cluster of RAY_ADDRESS, or starts a local one. Returns whether it is ours to stop."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the user's relative paths
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead worker is noticed sooner
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}  # what workers say comes through the Monitor
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return False
    ray.init(address="local", **quiet)
    return True


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


def check_data(root: Path, data: Data, force: bool) -> None:
    """Refuses to go on where the annotations changed under their path: labels could change sides."""
    path = root / "split.json"
    if force or not checkpoints(root) or not path.exists():
        return
    was = splits.SplitManifest.from_json(path.read_text(), str(path))
    now = data.manifest
    if (was.split.sha256, was.source_sha256) != (now.split.sha256, now.source_sha256):
        raise ConfigError(
            f"{data.train.path}: changed since the run began; restore it, choose another run.name, "
            "or insist with --force"
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
    """config.yaml, split.json, schedule.json, perhaps ground_truth.json; metrics.jsonl and others follow."""
    (root / "checkpoints").mkdir(parents=True, exist_ok=True)
    (root / "figures").mkdir(exist_ok=True)
    papers = {
        "config.yaml": dump(config),
        "split.json": data.manifest.to_json(),
        "schedule.json": json.dumps(asdict(schedule)),
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


def read_run_id(root: Path) -> str | None:
    path = root / "mlflow_run_id"
    return path.read_text().strip() if path.exists() else None


def run_tags(config: Config, data: Data) -> dict[str, str]:
    return {
        "labels_pct": f"{100 * data.manifest.split.labeled:g}",
        "fold": str(data.manifest.split.fold),
        "split_sha256": data.manifest.split.sha256,
        "segmentor": config.segmentor.name,
        "method": config.method.name,
        "data_sha256": data.train.sha256,
    }


def result_of(root: Path, schedule: Schedule, *, run_id: str | None, stopped: bool) -> TrainResult:
    """What the run directory says of the run."""
    last, _ = newest_verified(root)
    state = {} if last is None else json.loads((last / "state.json").read_text())
    scores: dict[str, float] = {}
    for row in metric_rows(root):
        scores |= {k: v for k, v in row.items() if k.startswith(("teacher/", "student/")) and "_class/" not in k}
    best = state.get("best", {}).get("teacher")
    return TrainResult(
        run_id=run_id,
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
