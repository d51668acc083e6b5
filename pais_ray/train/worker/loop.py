"""The training loop of one rank: the order of steps, logging, checkpoints and evaluations."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pais_ray.data.stream.batches import stream_batches
from pais_ray.data.stream.plan import count_labeled_only_steps, rank_rows
from pais_ray.runs.directory import is_evaluation_due
from pais_ray.structures.batch import Batch
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState
from pais_ray.train.step import BackwardOutOfMemoryError, StepSettings, train_step
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.evaluation import RunEvaluator
from pais_ray.train.worker.heartbeat import Heartbeat
from pais_ray.train.worker.logger import Logger, MetricWindow, peak_memory_mib
from pais_ray.train.worker.panel import write_panel
from pais_ray.train.worker.recovery import Recovery
from pais_ray.train.worker.resume import ResumePoint


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """The loop and the objects that it drives. All ranks run it in step; rank 0 alone writes."""

    job: Job
    resume: ResumePoint
    state: TrainState
    network: nn.Module  # the student, wrapped in DDP if there are several ranks
    settings: StepSettings
    group: WorkerGroup
    heartbeat: Heartbeat
    logger: Logger
    checkpointer: Checkpointer
    evaluator: RunEvaluator
    recovery: Recovery

    @property
    def rows_per_step(self) -> int:
        """Over all ranks."""
        assert self.settings.rows is not None
        return self.settings.rows

    @property
    def last_step(self) -> int:
        """The step at which this start of the run ends."""
        return min(self.job.schedule.steps, self.job.config.train.stop_at or self.job.schedule.steps)

    def report_start(self) -> None:
        """Tell the user where the run continues and with how many workers."""
        state, limit, workers = self.state, self.settings.max_pseudo_labels, self.group.world_size
        configured = self.job.config.train.max_pseudo_labels
        if self.resume.checkpoint is not None:
            self.logger.notice(f"resumed at step {state.step} from {self.resume.checkpoint.name}")
        if limit is not None and limit < configured:
            self.logger.notice(
                f"at most {limit} pseudo-labels per image, not {configured}: memory ran out earlier in this run"
            )
        self.logger.event(
            state.step,
            f"{workers} workers, {self.rows_per_step} rows per step, {-(-self.rows_per_step // workers)} per worker",
            {"event": "start", "workers": workers},
        )
        for reason in self.resume.skipped:
            self.logger.event(state.step, f"checkpoint skipped: {reason}", {"event": "checkpoint_passed_over"})

    def train(self) -> None:
        """Train until ``last_step`` or until the driver requests a stop."""
        config, state = self.job.config.train, self.state
        if self.resume.unscored is not None and self.resume.checkpoint is not None:
            self.evaluator.rerun_evaluation(self.resume.unscored, self.resume.checkpoint)
            self.heartbeat.enter(state.step, "first_batch")
        stream, window = self.stream(), MetricWindow()
        stopped = False
        while state.step < self.last_step and not stopped:
            started = time.perf_counter()
            batches = next(stream)
            data_wait_s = time.perf_counter() - started
            self.heartbeat.enter(state.step, "step")
            stop = self.group.rank == 0 and self.heartbeat.is_stop_requested()
            try:
                result = train_step(state, self.network, batches, self.job.config.method, self.settings, stop=stop)
            except BackwardOutOfMemoryError as error:
                self.recovery.lower_pseudo_label_limit(error)
                raise  # the worker group restarts
            state.g_next += self.rows_per_step
            stopped = result.stop
            if self.recovery.check_step(result, batches):  # rolled back
                self.heartbeat.enter(state.step, "first_batch")
                stream, window = self.stream(), MetricWindow()
                continue
            window.add(result.metrics, data_wait_s, time.perf_counter() - started, self.count_images(batches))
            if state.step in (1, self.last_step) or stopped or state.step % config.log_every == 0:
                self.log_metrics(window)
                window = MetricWindow()
            if config.panel_every and state.step % config.panel_every == 0:
                self.draw_pseudo_labels(batches[-1])
            self.checkpoint_and_evaluate(stopped)

    def checkpoint_and_evaluate(self, stopped: bool) -> None:
        """Save and evaluate as is due after a step.

        Before a stop or a preemption there may be seconds left: the state is saved first, and the next start makes the
        evaluation that a stop has left out. Otherwise scores are collected before a checkpoint is written, so that its
        contents do not depend on timing, and the checkpoint is written before an evaluation, which the machine may
        not outlive.
        """
        state, evaluator, checkpointer = self.state, self.evaluator, self.checkpointer
        is_due = is_evaluation_due(state.step, self.job.config, self.job.schedule)
        save_requested = self.group.rank == 0 and self.heartbeat.take_save_request()
        if state.step == self.last_step:
            evaluator.collect_scores(up_to=state.step - 1)
            checkpointer.save_and_wait(evaluator.unscored_steps)
            if is_due:
                evaluator.evaluate()
                evaluator.collect_scores(up_to=state.step)
            return
        if stopped:
            checkpointer.save_and_wait(evaluator.unscored_steps)
            evaluator.collect_scores(up_to=state.step)
            return
        if save_requested:
            checkpointer.save(evaluator.unscored_steps)
            evaluator.collect_scores(up_to=state.step - 1)  # a start from this checkpoint does not evaluate again
        if is_due or state.step % self.job.config.train.checkpoint_every == 0:
            evaluator.collect_scores(up_to=state.step - 1)
            if state.skipped_in_row == 0:  # else these weights fail, and retention would prefer them to good ones
                checkpointer.save(evaluator.unscored_steps)
        if is_due:
            evaluator.evaluate()

    def stream(self) -> Iterator[list[Batch | None]]:
        """This rank's batches of each remaining step; without unlabeled images while the method does not use them."""
        config, step, last_step = self.job.config, self.state.step, self.last_step
        rows = rank_rows(
            self.state.g_next,
            last_step - step,
            self.rows_per_step,
            self.group.world_size,
            self.group.rank,
            labeled_only_steps=count_labeled_only_steps(config.method.unlabeled_weight, step, last_step),
        )
        return stream_batches(self.job.feed, rows, config.scaled_views, self.group.device)

    def count_images(self, batches: list[Batch | None]) -> int:
        """Images of a step over all ranks. All ranks have the same kind of rows, and the last batch is never None."""
        plan, batch = self.job.feed.plan, batches[-1]
        has_unlabeled = batch is not None and batch.weak is not None
        return self.rows_per_step * (plan.images_per_row if has_unlabeled else plan.labeled)

    def log_metrics(self, window: MetricWindow) -> None:
        """Write the means over the window, and check them. A collective call."""
        values = window.means(self.group)
        values |= window.times()
        values["system/peak_memory_mib"] = peak_memory_mib(self.group.device)
        values["pseudo/skipped_steps"] = float(self.state.skipped)
        self.logger.progress(self.state.step, values, self.last_step)
        self.recovery.check_metrics(values, window.steps)

    def draw_pseudo_labels(self, batch: Batch | None) -> None:
        """Write the figure of the pseudo-labels on rank 0. Errors of storage are reported and not fatal."""
        if self.group.rank != 0:
            return
        config = self.job.config
        names = [c.name for c in self.job.categories]
        folder = self.job.root / "figures"
        try:
            write_panel(batch, self.state, config.method, config.train.precision, names, folder)
        except OSError as error:
            text = f"the figure of the pseudo-labels was not written: {error}"
            self.logger.event(self.state.step, text, {"event": "picture_failed"})
