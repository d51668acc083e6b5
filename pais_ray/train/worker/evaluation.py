"""Evaluation during training: all ranks predict, and Ray tasks compute the scores while training continues."""

import contextlib
import ctypes
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray

from pais_ray.evaluation.scoring import score_metrics
from pais_ray.files.json_lines import metric_rows
from pais_ray.inference.predictor import predict_records
from pais_ray.runs.checkpoints import ROLES, has_checkpoint
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.errors import TrainingEnded
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.heartbeat import Heartbeat
from pais_ray.train.worker.logger import Logger


class PendingScores(NamedTuple):
    """Scores that a Ray task is computing."""

    step: int
    role: str
    task: "ray.ObjectRef[dict[str, float]]"


class RunEvaluator:
    """Evaluates teacher and student on the validation images. Rank 0 alone has the scores.

    Scores are collected at fixed steps, so that the contents of a checkpoint do not depend on timing.
    """

    def __init__(
        self,
        job: Job,
        state: TrainState,
        group: WorkerGroup,
        heartbeat: Heartbeat,
        logger: Logger,
        checkpointer: Checkpointer,
        guards: Guards,
    ) -> None:
        self.job, self.state, self.group = job, state, group
        self.heartbeat, self.logger, self.checkpointer, self.guards = heartbeat, logger, checkpointer, guards
        self.pending: list[PendingScores] = []
        # The task reserves no CPU, because workers may have reserved all of them, and it does not inherit the placement
        # group of a Tune trial, whose CPUs are the workers'. Created once: Ray's head keeps every remote function.
        self._score = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(score_metrics)

    @property
    def unscored_steps(self) -> set[int]:
        """Steps of evaluations whose scores have not been collected."""
        return {scores.step for scores in self.pending}

    def evaluate(self) -> None:
        """Predict this rank's share of the validation images with both roles, and start the tasks that score them."""
        started = time.perf_counter()
        self.heartbeat.enter(self.state.step, "evaluate")
        records = ray.get(self.job.val)
        # Consecutive images, because those stored together are read together.
        first, end = (len(records) * r // self.group.world_size for r in (self.group.rank, self.group.rank + 1))
        category_ids = [c.id for c in self.job.categories]
        for role, module in zip(ROLES, (self.state.teacher.segmentor, self.state.student), strict=True):
            training = module.training
            module.eval()
            results = list(
                predict_records(module, records[first:end], self.job.config, category_ids, self.group.device)
            )
            module.train(training)
            gathered = self.group.gather(results)
            if self.group.rank == 0:
                task = self._score.remote(self.job.ground_truth, list(itertools.chain.from_iterable(gathered)))
                self.pending.append(PendingScores(self.state.step, role, task))
        trim_memory()
        self.heartbeat.enter(self.state.step, "step")
        self.logger.metrics(self.state.step, {"time/eval_s": time.perf_counter() - started})

    def collect_scores(self, up_to: int) -> None:
        """Wait for the scores of evaluations until step ``up_to``; log them and note the best.

        Scores that could not be computed are skipped, except those of the last step of the schedule: then
        TrainingEnded is raised.
        """
        found: dict[tuple[int, str], float | None] = {}
        for step, role, task in [scores for scores in self.pending if scores.step <= up_to]:
            with self.heartbeat.within("save"):
                try:
                    metrics = ray.get(task)
                except Exception as error:  # storage does not answer, out of memory, a lost node
                    self._report_failure(step, role, error)
                    continue
                self.checkpointer.flush()  # whether the checkpoint of this step exists decides below
            self.logger.scores(step, role, metrics)
            found[step, role] = metrics.get("segm_AP")
            note_scores(self.state, self.job.root, [{"step": step, f"{role}/segm_AP": found[step, role]}])
        self.pending = [scores for scores in self.pending if scores.step > up_to]
        for step in {step for step, _ in found}:
            alarm = self.guards.teacher(*(found.get((step, role)) for role in ROLES))
            if alarm is not None:
                self.logger.event(self.state.step, alarm, {"event": "teacher_below_student", "at": step})

    def rerun_evaluation(self, unscored: Path, newest: Path) -> None:
        """Repeat the evaluation of the checkpoint ``unscored``, whose scores were not ready when the run last ended,
        and return to the state of the checkpoint ``newest``."""
        if unscored != newest:
            self.state.load(unscored)
        self.evaluate()
        self.collect_scores(up_to=self.state.step)
        if unscored != newest:
            self.state.load(newest)
            note_scores(self.state, self.job.root, metric_rows(self.job.root) if self.group.rank == 0 else [])

    def drop_scores_after(self, step: int) -> None:
        """Forget the evaluations of later steps, which will be repeated after a rollback."""
        self.pending = [scores for scores in self.pending if scores.step <= step]

    def _report_failure(self, step: int, role: str, error: Exception) -> None:
        reason = f"the scores of step {step} ({role}) could not be computed: {error}"
        if step == self.job.schedule.steps:
            raise TrainingEnded(f"{reason}; repeat the command to evaluate again") from error
        self.logger.event(
            self.state.step, f"{reason}; training continues without them", {"event": "scoring_failed", "at": step}
        )


def note_scores(state: TrainState, root: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Update the best scores of ``state`` from ``rows`` of metrics.jsonl until its step.

    Scores of steps without a checkpoint are ignored: retention would protect nothing and delete the best one.
    """
    for row, role in itertools.product(rows, ROLES):
        ap = row.get(f"{role}/segm_AP")
        if row["step"] <= state.step and has_checkpoint(root, row["step"]):
            state.note_score(role, row["step"], ap)


def trim_memory() -> None:
    """Return freed memory to the operating system. Otherwise glibc keeps it in fragments, and the process grows for
    good each time that an evaluation, a snapshot and a step coincide."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
