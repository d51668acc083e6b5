"""Reactions to steps without a usable loss, to a lack of memory, and to metrics that show a failing run."""

import math
import shutil
from collections.abc import Sequence

from pais_ray.files.json_lines import metric_rows
from pais_ray.runs.checkpoints import checkpoints, find_rollback_target
from pais_ray.runs.directory import write_pseudo_label_limit
from pais_ray.structures.batch import Batch
from pais_ray.train.distributed import WorkerGroup
from pais_ray.train.errors import TrainingEnded
from pais_ray.train.guards import Guards
from pais_ray.train.job import Job
from pais_ray.train.state import TrainState
from pais_ray.train.step import BackwardOutOfMemoryError, StepResult
from pais_ray.train.worker.checkpointing import Checkpointer
from pais_ray.train.worker.evaluation import RunEvaluator, note_scores
from pais_ray.train.worker.logger import Logger, report_last_event


class Recovery:
    """Checks every step, and returns the run to an earlier checkpoint after too many skipped ones."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        group: WorkerGroup,
        logger: Logger,
        checkpointer: Checkpointer,
        evaluator: RunEvaluator,
        guards: Guards,
    ) -> None:
        self.job, self.config, self.state, self.group = job, job.config, state, group
        self.logger, self.checkpointer, self.evaluator, self.guards = logger, checkpointer, evaluator, guards

    def check_step(self, result: StepResult, batches: Sequence[Batch | None]) -> bool:
        """Report what is wrong with a step; return True if the state was rolled back to an earlier checkpoint.

        Raises TrainingEnded if there is nothing to roll back to, or after `guards.max_rollbacks`.
        """
        spike = self.guards.gradient(result.grad_norm)
        if spike is not None:
            self.logger.event(self.state.step, spike, {"event": "gradient_spike", "norm": result.grad_norm})
        if not result.fits:
            self.logger.event(
                self.state.step, "a forward pass ran out of memory; the step was skipped", {"event": "out_of_memory"}
            )
        if not result.skipped or self.state.skipped_in_row < self.config.train.max_consecutive_skips:
            return False
        remedy = "lower optim.lr, set optim.clip_norm, or check these images"
        if not result.fits:
            remedy = "lower train.max_pseudo_labels, data.image_size or the images per row (batch.*)"
        self.roll_back(self.describe_skips(result, batches), remedy)
        return True

    def check_metrics(self, values: dict[str, float], steps: int) -> None:
        """Check the means of the last ``steps`` steps. Raises TrainingEnded if nothing is learned."""
        alarm = self.guards.pseudo_labels(values.get("pseudo/kept_per_image"), steps)
        if alarm is not None:
            self.logger.event(self.state.step, alarm, {"event": "teacher_collapse"})
        reason = self.guards.labeled_loss(values, steps)
        if reason is not None:
            raise TrainingEnded(reason)

    def roll_back(self, reason: str, remedy: str) -> None:
        """Load weights, optimizer and step of the last checkpoint without skipped steps before it.

        The data continue after those of the skipped steps. Raises TrainingEnded, with the ``remedy``, if there is no
        such checkpoint or the limit of rollbacks is reached.
        """
        state, root = self.state, self.job.root
        limit, made = self.config.guards.max_rollbacks, state.rollbacks
        target = None
        if self.group.rank == 0 and made < limit:
            self.checkpointer.flush()
            target = find_rollback_target(root)
        target = self.group.broadcast(target)
        if target is None:
            cause = "There is no checkpoint to return to"
            if made == limit:
                cause = f"All {limit} rollbacks were made (guards.max_rollbacks)"
            raise TrainingEnded(
                f"{reason}. {cause}. To continue, {remedy}; existing "
                "checkpoints are kept, and the same command accepts the change with --force"
            )
        failed_step, g_next, skipped = state.step, state.g_next, state.skipped
        state.load(target)
        state.g_next, state.skipped, state.skipped_in_row, state.rollbacks = g_next, skipped, 0, made + 1
        if self.group.rank == 0:
            for newer in (c for c in checkpoints(root) if c > target):  # else a restart would resume from them
                shutil.rmtree(newer, ignore_errors=True)
            note_scores(state, root, metric_rows(root, state.step))
        self.evaluator.drop_scores_after(state.step)
        self.logger.rewind(state.step)
        text = (
            f"back from step {failed_step} to {target.name}, rollback {made + 1} of {limit}; training "
            f"continues with the data after the skipped steps: {reason}"
        )
        self.logger.event(state.step, text, {"event": "rollback", "from": failed_step})

    def describe_skips(self, result: StepResult, batches: Sequence[Batch | None]) -> str:
        """Which losses were not finite on which rank, and for which images. A collective call."""
        views = [v for b in batches if b is not None for v in (b.labeled, b.weak) if v is not None]
        values = {k: float(v) for k, v in result.metrics.items() if "/" in k or k == "grad_norm"}
        own = {
            "rank": self.group.rank,
            "losses": {k: v for k, v in values.items() if not math.isfinite(v)},
            "image_ids": [i for v in views for i in v.image_ids.tolist()],
        }
        ranks = self.group.all_gather(own)
        affected = [rank for rank in ranks if rank["losses"]] or ranks
        cause = f"not finite: {affected}" if result.fits else f"out of memory in the forward pass: {ranks}"
        return (
            f"step {self.state.step}: no usable loss in {self.state.skipped_in_row} consecutive steps "
            f"(train.max_consecutive_skips); {cause}"
        )

    def lower_pseudo_label_limit(self, error: BackwardOutOfMemoryError) -> None:
        """Halve the limit of pseudo-labels per image for the restart that follows.

        If the step had fewer than two, nothing is changed: another program may have used the memory.
        """
        if error.pseudo_labels < 2:
            text = (
                f"rank {self.group.rank} ran out of memory with fewer than 2 pseudo-labels per image ({error}); if "
                "this recurs, lower the images per row (batch.*) or data.image_size"
            )
            report_last_event(self.job, self.state.step, text, {"event": "out_of_memory"})
            return
        limit = error.pseudo_labels // 2
        text = (
            f"rank {self.group.rank} ran out of memory; at most {limit} pseudo-labels per image from now on ({error})"
        )
        try:
            write_pseudo_label_limit(self.job.root, limit)
        except OSError as lost:
            text = f"rank {self.group.rank} ran out of memory ({error}), and {lost}"
        report_last_event(self.job, self.state.step, text, {"event": "out_of_memory", "cap": limit})
