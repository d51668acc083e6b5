"""What each Ray Train worker runs: restore, loop, log, checkpoint, evaluate."""

import inspect
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pais_ray import evaluate, geometry, plots
from pais_ray.config import Config, ConfigError
from pais_ray.data import pipeline
from pais_ray.data.sources import Category, Record
from pais_ray.data.validate import DataError
from pais_ray.data.views import make_batch
from pais_ray.inference import predict_records
from pais_ray.optim import Schedule
from pais_ray.structures import Batch, Views
from pais_ray.tracking import Tracker
from pais_ray.train.state import (
    ROLES,
    CheckpointError,
    build_state,
    checkpoint_folder,
    metric_rows,
    retain,
    usable_checkpoint,
)
from pais_ray.train.step import Metrics, StepSettings, autocast, train_step

SCORE_TASK_CPUS = 0.25  # scoring runs beside training, as the reading tasks do


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. Small: data travels as references into the object store."""

    config: Config
    schedule: Schedule
    root: Path  # the run directory, on storage that every node sees
    categories: tuple[Category, ...]
    feed: pipeline.Feed
    val: "ray.ObjectRef[tuple[Record, ...]]"
    ground_truth: str  # the validation JSON
    monitor: Any  # handle of launch.Monitor
    tracking_run: str | None
    threads: int


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row without a finite loss."""


def run(loop_config: "dict[str, ray.ObjectRef[Job]]") -> None:
    """One worker's life."""
    job = ray.get(loop_config["job"])
    torch.set_num_threads(job.threads)
    if job.config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True)
    try:
        worker = Worker(job)
        try:
            worker.train()
        finally:
            worker.close()
    except Exception as error:
        # Where trying again cannot help, the driver hears the reason and all ranks end without a failure, which
        # Ray would retry: this one leaves the process group, and so the others' collectives fail.
        reason = hopeless(error)
        if reason is not None:
            wrong_input = not isinstance(reason, NonFiniteLoss)
            ray.get(job.monitor.fatal.remote(str(reason), wrong_input=wrong_input))
        elif not ray.get(job.monitor.has_ended.remote()):
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


def hopeless(error: BaseException | None) -> Exception | None:
    """The error among the causes of ``error`` that would come again at every try, if there is one."""
    while error is not None:
        if isinstance(error, DataError | ConfigError | CheckpointError | NonFiniteLoss):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


class Worker:
    """One rank of a run: its model, its stream, its share of the evaluation."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        self.job, self.config = job, job.config
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.method = job.config.method
        folder, refused, rows = self.what_there_is()
        self.state = build_state(job.config, job.schedule, len(job.categories), self.device, pretrained=folder is None)
        self.restore(folder, refused, rows)
        self.network: nn.Module = self.state.student
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.state.student, device_ids=ids, gradient_as_bucket_view=True, **without_buffer_sync()
            )
        self.settings = StepSettings(
            schedule=job.schedule,
            clip_norm=job.config.optim.clip_norm,
            precision=job.config.train.precision,
            seed=job.config.train.seed,
        )
        self.log = Log(job, self.state.step) if self.rank == 0 else None
        self.scoring: list[tuple[int, str, Any]] = []  # (step, role, reference of a task that computes AP)
        self.poll = self.job.monitor.stop_requested.remote()

    def what_there_is(self) -> tuple[Path | None, list[str], list[dict[str, Any]]]:
        """The newest verified checkpoint in storage (Ray may not know of it, see docs/architecture.md), what was
        wrong with newer ones, and the log. Rank 0 reads for all."""
        found: list[Any] = [None, [], []]
        if self.rank == 0:
            found = [*usable_checkpoint(self.job.root), metric_rows(self.job.root)]
            for partial in (self.job.root / "checkpoints").glob(".*.partial"):  # of a save that was killed
                shutil.rmtree(partial, ignore_errors=True)
        if self.world > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0], found[1], found[2]

    def restore(self, folder: Path | None, refused: list[str], rows: list[dict[str, Any]]) -> None:
        """Takes up the checkpoint, and the scores that were logged after it was written."""
        for reason in refused if self.rank == 0 else []:
            self.say(f"checkpoint passed over: {reason}")
        if folder is not None:
            self.state.load(folder)
            if self.rank == 0:
                self.say(f"resumed at step {self.state.step} from {folder.name}")
        logged = set()
        for row, role in itertools.product(rows, ROLES):
            ap = row.get(f"{role}/segm_AP")
            if ap is not None and row["step"] <= self.state.step:
                self.state.note_score(role, row["step"], ap)
                logged.add((row["step"], role))
        # An evaluation whose scores were still under way when the run died is made again.
        step = self.state.step
        self.owed = self.evaluation_due(step) and not all((step, role) in logged for role in ROLES)

    def say(self, text: str) -> None:
        self.job.monitor.progress.remote({"text": text})

    def train(self) -> None:
        cfg, state = self.config, self.state
        last = min(self.job.schedule.steps, cfg.train.stop_at or self.job.schedule.steps)
        rows = self.stream(last)
        stopped = False
        window = Window()
        if self.owed:
            self.evaluate()
            self.collect_scores(up_to=state.step)
        while state.step < last and not stopped:
            waiting = time.perf_counter()
            taken = [next(rows) for _ in range(cfg.batch.accumulation)]
            waited = time.perf_counter() - waiting
            batches = [self.batch(row) for row in taken]
            result = train_step(state, self.network, batches, self.method, self.settings, stop=self.stop_requested())
            state.g_next += self.world * cfg.batch.accumulation
            stopped = result.stop
            if result.skipped:
                self.count_skip(result.metrics, batches)
            window.add(result.metrics, waited, time.perf_counter() - waiting)
            at_end = state.step == last or stopped
            if at_end or state.step % cfg.train.log_every == 0 or state.step == 1:
                self.write_log(window, last)
                window = Window()
            if self.rank == 0 and cfg.train.panel_every and state.step % cfg.train.panel_every == 0:
                self.panel(batches[0])
            due = self.evaluation_due(state.step)
            if due:
                self.evaluate()
            if due or at_end or state.step % cfg.train.checkpoint_every == 0:
                # Scores of an evaluation are taken at the next checkpoint, or now where there is none to come.
                self.collect_scores(up_to=state.step if at_end else state.step - 1)
                self.save()

    def stream(self, last: int) -> Iterator[pipeline.Row]:
        cfg = self.config
        photometric = None
        if cfg.views.labeled.photometric is not None:
            from pais_ray.data.photometric import Photometric  # importing albumentations costs seconds

            photometric = Photometric(cfg.views.labeled.photometric)
        return pipeline.step_rows(
            self.job.feed,
            start=self.state.g_next,
            total=(last - self.state.step) * self.world * cfg.batch.accumulation,
            world=self.world,
            rank=self.rank,
            photometric=photometric,
        )

    def batch(self, row: pipeline.Row) -> Batch:
        """Views of one row; of its unlabeled images only where the method learns from them at this step."""
        unlabeled = row.unlabeled if self.method.unlabeled_weight(self.state.step) else []
        return make_batch(row.labeled, unlabeled, self.config.views, self.config.train.seed, self.device)

    def stop_requested(self) -> bool:
        """Whether the driver asked to stop, without waiting for its answer."""
        if self.rank != 0 or not ray.wait([self.poll], timeout=0)[0]:
            return False
        answer = ray.get(self.poll)
        self.poll = self.job.monitor.stop_requested.remote()
        return answer

    def count_skip(self, metrics: Metrics, batches: list[Batch]) -> None:
        """After ``train.max_skipped`` steps in a row without a finite loss: an error that names them."""
        if self.state.skipped_in_row < self.config.train.max_skipped:
            return
        ids = [i for b in batches for v in (b.labeled, b.weak) if v is not None for i in v.image_ids.tolist()]
        mine = {
            "rank": self.rank,
            "losses": {k: float(v) for k, v in metrics.items() if "/" in k and not math.isfinite(float(v))},
            "image_ids": ids,
        }
        everyone: list[Any] = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine)
        else:
            everyone = [mine]
        guilty = [e for e in everyone if e["losses"]] or everyone
        raise NonFiniteLoss(
            f"step {self.state.step}: no finite loss for {self.state.skipped_in_row} steps in a row "
            f"(train.max_skipped); not finite: {guilty}. Lower optim.lr, set optim.clip_norm, or look at these images; "
            "the last checkpoint is untouched"
        )

    def write_log(self, window: "Window", last: int) -> None:
        values = window.means(self.world, self.device)
        if self.log is not None:
            per_step = self.world * self.config.batch.accumulation * self.job.feed.plan.images_per_row
            values |= window.times(per_step)
            values["system/peak_memory_mib"] = peak_memory(self.device)
            values["pseudo/skipped_steps"] = float(self.state.skipped)
            remaining = (last - self.state.step) * values["time/step_s"]
            self.log.write(self.state.step, values, last=last, eta=remaining)

    def save(self) -> None:
        if self.rank == 0:
            folder = checkpoint_folder(self.job.root, self.state.step)
            self.state.save(folder)
            retain(self.job.root, self.config.train.keep_checkpoints, self.state.best, self.state.step)

    def evaluate(self) -> None:
        """Predicts this rank's share of the validation images; a Ray task scores them while training goes on."""
        started = time.perf_counter()
        shard = ray.get(self.job.val)[self.rank :: self.world]
        ids = [c.id for c in self.job.categories]
        # Not within this worker's own CPUs, where a run inside a Tune trial would have its tasks: none are free there.
        score = ray.remote(num_cpus=SCORE_TASK_CPUS, scheduling_strategy="DEFAULT")(evaluate.score)
        for role, module in zip(ROLES, (self.state.teacher.segmentor, self.state.student), strict=True):
            mode = module.training
            module.eval()
            results = list(predict_records(module, shard, self.config, ids, self.device))
            module.train(mode)
            gathered: list[Any] = [None] * self.world if self.rank == 0 else []
            if self.world > 1:
                dist.gather_object(results, gathered if self.rank == 0 else None)
            else:
                gathered = [results]
            if self.rank == 0:
                task = score.remote(self.job.ground_truth, [r for part in gathered for r in part])
                self.scoring.append((self.state.step, role, task))
        if self.log is not None:
            self.log.event(self.state.step, {"time/eval_s": time.perf_counter() - started})

    def collect_scores(self, up_to: int) -> None:
        """Takes the AP of evaluations made until step ``up_to`` into the log and the best scores. Only rank 0 has
        any; it takes them at fixed steps, so that what a checkpoint holds does not depend on timing."""
        for step, role, task in [s for s in self.scoring if s[0] <= up_to]:
            scores = ray.get(task)
            assert self.log is not None
            self.log.scores(step, role, scores)
            ap = scores["segm"]["AP"]
            if self.state.note_score(role, step, ap):
                folder = checkpoint_folder(self.job.root, step)
                self.log.tracker.log_checkpoint(role, str(folder), step, {f"{role}/segm_AP": ap})
        self.scoring = [s for s in self.scoring if s[0] > up_to]

    def evaluation_due(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.job.schedule.steps or bool(every and step and step % every == 0)

    def panel(self, batch: Batch) -> None:
        """A picture of what the teacher proposes now: weak and strong view, kept and dropped, both scores."""
        if self.log is None or batch.weak is None or batch.strong is None:
            return
        with autocast(self.device, self.config.train.precision):
            predictions = self.state.teacher.predict(batch.weak)
        rows = []
        for i, prediction in enumerate(predictions):
            kept = self.method.pseudo_labels(prediction)  # in the weak frame
            to_strong = geometry.compose(batch.strong.matrix[i], geometry.invert(batch.weak.matrix[i]))
            rows.append(
                plots.PanelRow(
                    weak=_picture(batch.weak, i),
                    strong=_picture(batch.strong, i),
                    predictions=prediction.to("cpu"),
                    kept=self.method.keeps(prediction).cpu(),
                    targets=kept.warp(to_strong, batch.strong.sizes[i]).to("cpu"),
                )
            )
        path = self.job.root / "figures" / f"pseudo_labels_{self.state.step:08d}.png"
        plots.pseudo_label_panel(rows, [c.name for c in self.job.categories], path)
        self.log.tracker.log_artifact(path, "figures")

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def _picture(views: Views, i: int) -> Any:
    height, width = views.sizes[i].tolist()
    return (views.images[i, :, :height, :width].permute(1, 2, 0) * 255).byte().cpu().numpy()


def without_buffer_sync() -> dict[str, Any]:
    """DDP shall not copy rank 0's buffers before each forward: norms are frozen or GroupNorm, and a copy between
    the step's two forwards would change tensors that the first one's graph still needs. torch 2.15 renamed it."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Window:
    """What happened since the last log line: sums on the device, turned to floats once."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.waited = self.elapsed = 0.0
        self.steps = 0

    def add(self, metrics: Metrics, waited: float, elapsed: float) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.waited, self.elapsed, self.steps = self.waited + waited, self.elapsed + elapsed, self.steps + 1

    def means(self, world: int, device: torch.device) -> dict[str, float]:
        """Means over the window's steps and all ranks; per-image and per-label means of the pseudo-labels."""
        names = sorted(self.sums)
        flat = torch.stack([torch.as_tensor(self.sums[n], device=device).double() / self.counts[n] for n in names])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        values = dict(zip(names, flat.tolist(), strict=True))
        images = values.pop("pseudo/images", 0.0)
        if images:
            over, kept = values.pop("pseudo/over_tau_cls"), values.pop("pseudo/kept")
            values["pseudo/over_tau_cls_per_image"] = over / images
            values["pseudo/kept_per_image"] = kept / images
            values["pseudo/in_strong_per_image"] = values.pop("pseudo/in_strong") / images
            values["pseudo/empty_image_rate"] = values.pop("pseudo/empty_images") / images
            values["pseudo/score_mean"] = values.pop("pseudo/score_sum") / over if over else math.nan
            values["pseudo/iou_mean"] = values.pop("pseudo/iou_sum") / over if over else math.nan
        return values

    def times(self, images_per_step: int) -> dict[str, float]:
        step = self.elapsed / max(self.steps, 1)
        return {
            "time/step_s": step,
            "time/img_per_s": images_per_step / step,
            "time/data_wait_share": self.waited / self.elapsed,
        }


class Log:
    """Rank 0's three places to write to: metrics.jsonl, MLflow, and the driver's progress line."""

    def __init__(self, job: Job, step: int) -> None:
        self.job = job
        self.path = job.root / "metrics.jsonl"
        # Lines of steps that will be made again go, and a half-written last one.
        aside = self.path.with_suffix(f".{os.getpid()}.partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in metric_rows(job.root, step)))
        os.replace(aside, self.path)
        self.file = self.path.open("a")
        self.tracker = Tracker(job.config.tracking, job.root, job.tracking_run)
        for name in ("config.yaml", "split.json"):
            self.tracker.log_artifact(job.root / name)

    def event(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl (null where a value is not finite) and the same metrics to MLflow."""
        plain = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()
        self.tracker.log_metrics({k: v for k, v in values.items() if math.isfinite(v)}, step)

    def write(self, step: int, values: dict[str, float], *, last: int, eta: float) -> None:
        self.event(step, values)
        self.job.monitor.progress.remote({"step": step, "last": last, "eta": eta, **values})

    def scores(self, step: int, role: str, scores: dict[str, Any]) -> None:
        values = {
            f"{role}/{kind}_{name}": value
            for kind, numbers in scores.items()
            for name, value in numbers.items()
            if isinstance(value, float)
        }
        for name, value in scores["segm"].get("per_class", {}).items():
            values[f"{role}/segm_AP_class/{name}"] = math.nan if value is None else value
        self.event(step, values)
        self.job.monitor.progress.remote({"step": step, "role": role, **values})

    def close(self) -> None:
        self.file.close()
        self.tracker.close(status=None)  # the run may go on: the driver ends it
