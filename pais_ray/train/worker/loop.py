"""What each Ray Train worker runs: restore, loop, log, checkpoint, evaluate."""

import contextlib
import ctypes
import inspect
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config, rows_per_step
from pais_ray.data.stream.batches import stream_batches
from pais_ray.data.stream.plan import count_labeled_only_steps, rank_rows
from pais_ray.evaluation.scoring import score_metrics
from pais_ray.figures.panel import PanelRow, pseudo_label_panel
from pais_ray.files.atomic import replace_text
from pais_ray.files.json_lines import JsonlWriter, metric_rows
from pais_ray.inference.predictor import predict_records
from pais_ray.modeling.precision import autocast
from pais_ray.runs.checkpoints import (
    ROLES,
    StorageLostError,
    Writer,
    checkpoints,
    is_there,
    sound_checkpoint,
    usable_checkpoint,
)
from pais_ray.runs.directory import CAP_FILE, evaluation_due, evaluation_owed, kept_cap
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Views
from pais_ray.tracking.system_metrics import NodeSampler
from pais_ray.train.errors import TrainingEnded, find_fatal_error
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.messages import FatalError, Notice
from pais_ray.train.state import build_state
from pais_ray.train.step import MemoryRanOut, StepResult, StepSettings, train_step
from pais_ray.train.worker.heartbeat import Heartbeat
from pais_ray.train.worker.logger import Log, Window


def run(loop_config: "dict[str, ray.ObjectRef[Job]]") -> None:
    """One worker's life."""
    job = ray.get(loop_config["job"])
    torch.set_num_threads(job.threads)
    if job.config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True)
    worker: Worker | None = None
    try:
        worker = Worker(job)
        try:
            worker.train()
        finally:
            worker.close()
    except Exception as error:
        job.monitor.forget_all_ranks.remote()  # the group ends with this rank
        # Where trying again cannot help, the driver hears the reason and all ranks end without a failure, which
        # Ray would retry: this one leaves the process group, and so the others' collectives fail.
        reason = find_fatal_error(error)
        if reason is not None:
            is_input_error = not isinstance(reason, TrainingEnded | StorageLostError)
            fatal = FatalError(text=str(reason), is_input_error=is_input_error)
            ray.get(job.monitor.publish_fatal_error.remote(fatal))
        elif not ray.get(job.monitor.has_fatal_error.remote()):
            words = str(error).strip().splitlines() or [""]
            text = f"a worker failed ({type(error).__name__}: {words[0][:300]}); the workers start again"
            job.monitor.publish.remote(Notice(text=text))
            who = {"rank": ray.train.get_context().get_world_rank(), "step": worker.state.step if worker else 0}
            JsonlWriter(job.root / "events.jsonl").append({**who, "time": time.time(), "event": "failed", "text": text})
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


class Worker:
    """One rank of a run: its model, its stream, its share of the evaluation."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        self.job, self.config = job, job.config
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.method = job.config.method
        if not is_readable(job.root / "config.yaml"):  # the driver wrote it
            raise StorageLostError(
                f"{job.root}: the run directory is not there on node {ray.util.get_node_ip_address()}; mount its "
                "storage, and give the same command again"
            )
        self.heart = Heartbeat(job.monitor, job.root, self.rank, ray.get_runtime_context().get_node_id())
        self.folder, refused, rows, self.owed, self.heart.attempt = self.what_there_is()
        try:
            self.state = build_state(
                job.config, job.schedule, len(job.categories), self.device, pretrained=self.folder is None
            )
        except ValueError as error:  # segmentor.weights that are not there, or of another network
            raise ConfigError(str(error)) from error
        self.restore(rows)
        self.network: nn.Module = self.state.student
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.state.student, device_ids=ids, gradient_as_bucket_view=True, **without_buffer_sync()
            )
        self.rows_per_step = rows_per_step(job.schedule, job.config)
        self.settings = StepSettings(
            schedule=job.schedule,
            clip_norm=job.config.optim.clip_norm,
            precision=job.config.train.precision,
            seed=job.config.train.seed,
            rows=self.rows_per_step,
            ranks=dist.new_group(backend="gloo", timeout=collective_timeout(job.config)) if self.world > 1 else None,
        )
        self.guards = Guards(job.config.guards)
        self.log: Log | None = None
        self.writer: Writer | None = None
        every = job.config.tracking.system_metrics_interval_s if context.get_local_rank() == 0 else None  # one per node
        self.sampler = NodeSampler(job.root, context.get_node_rank(), every if job.config.tracking.enabled else None)
        if self.rank == 0:
            self.log = Log(job, self.state.step)
            self.writer = Writer(job.root, job.config.train.keep_checkpoints, self.tell)
            self.tell(
                f"{self.world} workers, {self.rows_per_step} rows per step, "
                f"{-(-self.rows_per_step // self.world)} per worker",
                {"event": "start", "workers": self.world},
            )
            for reason in refused:
                self.tell(f"checkpoint passed over: {reason}", {"event": "checkpoint_passed_over"})
        # Not within this worker's own CPUs, where a run inside a Tune trial would have its tasks, and reserving none:
        # where workers have them all, training would wait for its scores for ever. Made once: Ray's head keeps each.
        self.score = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(score_metrics)
        self.scoring: list[tuple[int, str, Any]] = []  # (step, role, reference of a task that computes AP)

    def what_there_is(self) -> tuple[Path | None, list[str], list[dict[str, Any]], Path | None, float]:
        """The newest verified checkpoint in storage (Ray may not know of it, see docs/architecture.md), what was
        wrong with newer ones, the log, the checkpoint whose evaluation has no scores, and a number of this start of
        the group. Rank 0 reads for all."""
        found: list[Any] = [None, [], [], None, 0.0]
        if self.rank == 0:
            root = self.job.root
            folder, refused = usable_checkpoint(root)
            rows = metric_rows(root)
            owed = evaluation_owed(root, folder, rows, self.config, self.job.schedule)
            found = [folder, refused, rows, owed, time.time()]
            for partial in (root / "checkpoints").glob(".*.partial"):  # of a save that was killed
                shutil.rmtree(partial, ignore_errors=True)
        if self.world > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0], found[1], found[2], found[3], found[4]

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Takes up the checkpoint, and the scores that were logged after it was written."""
        if self.folder is not None:
            self.state.load(self.folder)
            if self.rank == 0:
                self.echo(f"resumed at step {self.state.step} from {self.folder.name}")
        limit = self.config.train.max_pseudo_labels
        self.state.cap = kept_cap(self.job.root, limit)
        if self.rank == 0 and self.state.cap < limit:
            self.echo(
                f"at most {self.state.cap} pseudo-labels an image, not {limit}: memory ran out earlier in this run"
            )
        self.note_scores(rows)

    def note_scores(self, rows: list[dict[str, Any]]) -> None:
        """The best scores among logged ``rows`` until this step, of the weights that were written."""
        for row, role in itertools.product(rows, ROLES):
            ap = row.get(f"{role}/segm_AP")
            if row["step"] <= self.state.step and is_there(self.job.root, row["step"]):
                self.state.note_score(role, row["step"], ap)

    def echo(self, text: str) -> None:
        self.job.monitor.publish.remote(Notice(text=text))

    def tell(self, text: str, fields: dict[str, Any]) -> None:
        """An event of the run; rank 0 speaks for all."""
        if self.log is not None:
            self.log.event(self.state.step, text, fields)

    def train(self) -> None:
        cfg, state = self.config, self.state
        last = min(self.job.schedule.steps, cfg.train.stop_at or self.job.schedule.steps)
        stream = self.stream(last)
        stopped = False
        window = Window()
        if self.owed is not None:
            self.make_up(self.owed)
            self.heart.enter(state.step, "first_batch")
        while state.step < last and not stopped:
            waiting = time.perf_counter()
            batches = next(stream)
            waited = time.perf_counter() - waiting
            self.heart.enter(state.step, "step")
            asked_to_stop = self.rank == 0 and self.heart.is_stop_requested()
            try:
                result = train_step(state, self.network, batches, self.method, self.settings, stop=asked_to_stop)
            except MemoryRanOut as error:
                self.halve_cap(error)
                raise
            state.g_next += self.rows_per_step
            stopped = result.stop
            if self.look(result, batches):
                stream, window = self.stream(last), Window()
                self.heart.enter(state.step, "first_batch")  # of the new stream
                continue
            window.add(result.metrics, waited, time.perf_counter() - waiting)
            at_end = state.step == last or stopped
            if at_end or state.step % cfg.train.log_every == 0 or state.step == 1:
                self.write_log(window, last)
                window = Window()
            if self.rank == 0 and cfg.train.panel_every and state.step % cfg.train.panel_every == 0:
                self.panel(batches[-1])
            self.keep(last, stopped, asked=self.asked_to_save())

    def make_up(self, owed: Path) -> None:
        """The evaluation of a checkpoint whose scores were under way when an earlier start ended."""
        earlier = owed != self.folder
        if earlier:
            self.state.load(owed)
        self.evaluate()
        self.collect_scores(up_to=self.state.step)
        if earlier:
            assert self.folder is not None
            self.state.load(self.folder)
            self.state.cap = kept_cap(self.job.root, self.config.train.max_pseudo_labels)
            self.note_scores(metric_rows(self.job.root) if self.rank == 0 else [])

    def keep(self, last: int, stopped: bool, asked: bool) -> None:
        """The checkpoint and the evaluation that are due after a step. ``asked`` is rank 0's alone.

        Who stops a run or asks for a checkpoint may have seconds: then the state comes first, and an evaluation that a
        stop left out is made by the next start. Otherwise scores are taken at the next checkpoint, so that what it
        holds does not depend on timing; it is written before an evaluation, whose end a machine may not live to see.
        """
        state = self.state
        due = evaluation_due(state.step, self.config, self.job.schedule)
        if state.step == last:
            self.collect_scores(up_to=state.step - 1)
            self.save(at_end=True)
            if due:
                self.evaluate()
                self.collect_scores(up_to=state.step)
            return
        if stopped:
            self.save(at_end=True)
            self.collect_scores(up_to=state.step)
            return
        if asked:
            self.save(at_end=False)
            self.collect_scores(up_to=state.step - 1)  # who goes on from here will not evaluate again
        if due or state.step % self.config.train.checkpoint_every == 0:
            self.collect_scores(up_to=state.step - 1)
            if state.skipped_in_row == 0:  # else these are the weights that fail, and retention would prefer them
                self.save(at_end=False)
        if due:
            self.evaluate()

    def stream(self, last: int) -> Iterator[list[Batch | None]]:
        """This rank's batches of each step until ``last``; no unlabeled images while the method does not use them."""
        rows = rank_rows(
            self.state.g_next,
            last - self.state.step,
            self.rows_per_step,
            self.world,
            self.rank,
            labeled_only_steps=count_labeled_only_steps(self.method.unlabeled_weight, self.state.step, last),
        )
        return stream_batches(self.job.feed, rows, self.config.scaled_views, self.device)

    def look(self, result: StepResult, batches: list[Batch | None]) -> bool:
        """Guards the run after a step; True where it went back to an earlier checkpoint."""
        spike = self.guards.gradient(result.grad_norm)
        if spike is not None:
            self.tell(spike, {"event": "gradient_spike", "norm": result.grad_norm})
        if not result.fits:
            self.tell("a forward pass ran out of memory; the step was skipped", {"event": "out_of_memory"})
        if not result.skipped or self.state.skipped_in_row < self.config.train.max_consecutive_skips:
            return False
        remedy = "lower optim.lr, set optim.clip_norm, or look at these images"
        if not result.fits:
            remedy = "lower train.max_pseudo_labels, data.image_size or the images of a row (batch.*)"
        self.roll_back(self.why_skipped(result, batches), remedy)
        return True

    def roll_back(self, why: str, remedy: str) -> None:
        """Weights, optimizer and step of the last good checkpoint; the data go on, what they had was no good. With
        none, or after too many, the end, with the ``remedy``."""
        limit, made, state = self.config.guards.max_rollbacks, self.state.rollbacks, self.state
        found: list[Any] = [None]
        if self.writer is not None and made < limit:
            self.writer.flush()
            found = [sound_checkpoint(self.job.root)]
        if self.world > 1:
            dist.broadcast_object_list(found, device=self.device)
        if found[0] is None:
            tried = f"{made} returns to a checkpoint were made (guards.max_rollbacks {limit})"
            raise TrainingEnded(
                f"{why}. {tried if made == limit else 'There is no good checkpoint to return to'}. To go on, {remedy}; "
                "the checkpoints that there are stay, and the same command takes the change with --force"
            )
        was, g_next, skipped = state.step, state.g_next, state.skipped
        state.load(found[0])
        state.g_next, state.skipped, state.skipped_in_row, state.rollbacks = g_next, skipped, 0, made + 1
        state.cap = kept_cap(self.job.root, self.config.train.max_pseudo_labels)
        if self.rank == 0:  # a restart would take the newest, amid the bad steps
            for newer in (c for c in checkpoints(self.job.root) if c > found[0]):
                shutil.rmtree(newer, ignore_errors=True)
            self.note_scores(metric_rows(self.job.root, state.step))
        self.scoring = [s for s in self.scoring if s[0] <= state.step]  # later evaluations are made again
        text = f"back from step {was} to {found[0].name} with the data that follow, {made + 1} of {limit}: {why}"
        if self.log is not None:
            self.log.rewind(state.step)
            self.tell(text, {"event": "rollback", "from": was})

    def asked_to_save(self) -> bool:
        """Whether the driver asked for a checkpoint; true once per request."""
        return self.rank == 0 and self.heart.take_save_request()

    def why_skipped(self, result: StepResult, batches: list[Batch | None]) -> str:
        """What was not finite on which rank, with the images it had."""
        ids = [i for b in batches if b for v in (b.labeled, b.weak) if v is not None for i in v.image_ids.tolist()]
        values = {k: float(v) for k, v in result.metrics.items() if "/" in k or k == "grad_norm"}
        mine = {
            "rank": self.rank,
            "losses": {k: v for k, v in values.items() if not math.isfinite(v)},
            "image_ids": ids,
        }
        everyone: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine)
        guilty = [e for e in everyone if e["losses"]] or everyone
        what = f"not finite: {guilty}" if result.fits else f"out of memory in the forward pass: {everyone}"
        return (
            f"step {self.state.step}: no usable loss for {self.state.skipped_in_row} steps in a row "
            f"(train.max_consecutive_skips); {what}"
        )

    def write_log(self, window: "Window", last: int) -> None:
        steps = window.steps
        values = window.means(self.world, self.device)
        alarm = self.guards.pseudo_labels(values.get("pseudo/kept_per_image"), steps)
        if alarm is not None:
            self.tell(alarm, {"event": "teacher_collapse"})
        if self.log is not None:
            per_step = self.rows_per_step * self.job.feed.plan.images_per_row
            values |= window.times(per_step)
            values["system/peak_memory_mib"] = peak_memory(self.device)
            values["pseudo/skipped_steps"] = float(self.state.skipped)
            remaining = (last - self.state.step) * values["time/step_s"]
            self.log.write(self.state.step, values, last=last, eta=remaining)
        reason = self.guards.labeled_loss(values, steps)
        if reason is not None:
            raise TrainingEnded(reason)

    def save(self, at_end: bool) -> None:
        """Hands a copy of the state to the writer; at the end it waits for it."""
        if self.writer is None:
            return
        snapshot = replace(self.state.snapshot(), awaited=frozenset(step for step, _, _ in self.scoring))
        with self.heart.within("save"):
            self.writer.submit(snapshot)
            if not at_end:
                return
            self.writer.flush()
        if self.writer.failed is not None:
            raise StorageLostError(
                f"{self.writer.failed}. The run's last checkpoint is not there; give the same command again"
            )

    def halve_cap(self, error: MemoryRanOut) -> None:
        """Memory ran out in a backward pass: the group starts again with half as many pseudo-labels an image as this
        step had. Where it had none to spare it starts again as it was; another program may have had the memory."""
        if error.pseudo_labels < 2:
            text = (
                f"rank {self.rank} ran out of memory without pseudo-labels to spare ({error}); if it comes again, "
                "fewer images a row (batch.*) or a smaller data.image_size need less"
            )
            self.record({"event": "out_of_memory", "text": text})
            return
        cap = error.pseudo_labels // 2
        text = f"rank {self.rank} ran out of memory; at most {cap} pseudo-labels an image from now on ({error})"
        path = self.job.root / CAP_FILE
        try:
            replace_text(path, json.dumps({"cap": cap}))
        except OSError as lost:
            text = f"rank {self.rank} ran out of memory ({error}), and {lost}"
        self.record({"event": "out_of_memory", "cap": cap, "text": text})

    def record(self, row: dict[str, Any]) -> None:
        """An event that this rank, whichever it is, tells as its last."""
        self.echo(row["text"])
        JsonlWriter(self.job.root / "events.jsonl").append({"step": self.state.step, "time": time.time(), **row})

    def evaluate(self) -> None:
        """Predicts this rank's share of the validation images; a Ray task scores them while training goes on."""
        started = time.perf_counter()
        self.heart.enter(self.state.step, "evaluate")
        records = ray.get(self.job.val)
        # A stretch, not every W-th: images that lie together are read together.
        mine = records[self.rank * len(records) // self.world : (self.rank + 1) * len(records) // self.world]
        ids = [c.id for c in self.job.categories]
        for role, module in zip(ROLES, (self.state.teacher.segmentor, self.state.student), strict=True):
            mode = module.training
            module.eval()
            results = list(predict_records(module, mine, self.config, ids, self.device))
            module.train(mode)
            gathered: list[Any] = [None] * self.world if self.rank == 0 else []
            if self.world > 1:
                dist.gather_object(results, gathered if self.rank == 0 else None)
            else:
                gathered = [results]
            if self.rank == 0:
                task = self.score.remote(self.job.ground_truth, [r for part in gathered for r in part])
                self.scoring.append((self.state.step, role, task))
        give_back_memory()
        self.heart.enter(self.state.step, "step")
        if self.log is not None:
            self.log.row(self.state.step, {"time/eval_s": time.perf_counter() - started})

    def collect_scores(self, up_to: int) -> None:
        """Takes the AP of evaluations made until step ``up_to`` into the log and the best scores. Only rank 0 has
        any; it takes them at fixed steps, so that what a checkpoint holds does not depend on timing."""
        found: dict[tuple[int, str], float] = {}
        for step, role, task in [s for s in self.scoring if s[0] <= up_to]:
            assert self.log is not None
            assert self.writer is not None
            with self.heart.within("save"):
                try:
                    metrics = ray.get(task)
                except Exception as error:  # storage that does not answer, memory, a node that has gone
                    reason = f"the scores of step {step} ({role}) could not be computed: {error}"
                    if step == self.job.schedule.steps:
                        raise TrainingEnded(f"{reason}; give the same command again") from error
                    self.tell(f"{reason}; training goes on without them", {"event": "scoring_failed", "at": step})
                    continue
                self.writer.flush()
            self.log.scores(step, role, metrics)
            ap = found[step, role] = metrics.get("segm_AP")
            if is_there(self.job.root, step):  # else retention would keep nothing, and drop the best
                self.state.note_score(role, step, ap)
        self.scoring = [s for s in self.scoring if s[0] > up_to]
        for step in {step for step, _ in found}:
            alarm = self.guards.teacher(*(found.get((step, role)) for role in ROLES))
            if alarm is not None:
                self.tell(alarm, {"event": "teacher_below_student", "at": step})

    def panel(self, batch: Batch | None) -> None:
        """A picture of what the teacher proposes now, or what was given in its place: weak and strong view, kept
        and dropped, both scores."""
        if self.log is None or batch is None or batch.weak is None or batch.strong is None:
            return
        predictions = batch.scored
        if predictions is None:
            with autocast(self.device, self.config.train.precision):
                predictions = self.state.teacher.predict(batch.weak)
        rows = []
        for i, prediction in enumerate(predictions):
            kept = self.method.pseudo_labels(prediction)  # in the weak frame
            to_strong = geometry.compose(batch.strong.matrix[i], geometry.invert(batch.weak.matrix[i]))
            rows.append(
                PanelRow(
                    weak=_picture(batch.weak, i),
                    strong=_picture(batch.strong, i),
                    predictions=prediction.to("cpu"),
                    kept=self.method.keeps(prediction).cpu(),
                    targets=kept.warp(to_strong, batch.strong.sizes[i]).to("cpu"),
                )
            )
        path = self.job.root / "figures" / f"pseudo_labels_{self.state.step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)  # no further up: where storage is gone it would be made on another disk
            pseudo_label_panel(rows, [c.name for c in self.job.categories], path)
        except OSError as error:  # no picture is worth a step
            self.tell(f"the picture of the pseudo-labels was not written: {error}", {"event": "picture_failed"})

    def close(self) -> None:
        self.heart.close()
        self.job.monitor.forget_rank.remote(self.rank)
        if self.writer is not None:
            self.writer.close()
        self.sampler.close()
        if self.log is not None:
            self.log.close()  # after the writer, which tells events


def collective_timeout(config: Config) -> timedelta:
    """How long a rank waits for others in a collective: longer than any stage may last, the watchdog looks sooner."""
    guards = config.guards
    return timedelta(
        seconds=60
        + max(guards.first_batch_timeout_s, guards.step_timeout_s, guards.evaluate_timeout_s, guards.save_timeout_s)
    )


def is_readable(path: Path) -> bool:
    """Whether the file is there; where storage answers with an error, it is not."""
    try:
        return path.exists()
    except OSError:
        return False


def _picture(views: Views, i: int) -> Any:
    height, width = views.sizes[i].tolist()
    return (views.images[i, :, :height, :width].permute(1, 2, 0) * 255).byte().cpu().numpy()


def without_buffer_sync() -> dict[str, Any]:
    """DDP shall not copy rank 0's buffers before each forward: norms are frozen or GroupNorm, and a copy between
    the step's two forwards would change tensors that the first one's graph still needs. torch 2.15 renamed it."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def give_back_memory() -> None:
    """Returns what was freed to the system: glibc keeps it in pieces, and each moment in which an evaluation, a
    snapshot and a step meet would leave the process larger for good."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
