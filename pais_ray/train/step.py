"""One optimizer step: Algorithm 1 of the paper, top to bottom. Read this file first.

It does not depend on Ray: a list of batches drives it in a notebook. Under DDP every rank calls it with its own
batches.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pais_ray.modeling.optim import Schedule, set_lr
from pais_ray.modeling.precision import autocast
from pais_ray.modeling.protocols import Method
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions
from pais_ray.train.distributed import any_rank, sync_step_status, without_sync, world_size
from pais_ray.train.state import Teacher, TrainState
from pais_ray.train.step_metrics import MAX_PER_IMAGE, Metrics, pseudo_label_sums

# Metrics that must be finite: a teacher that is not finite proposes nothing, and no loss shows it.
MUST_BE_FINITE = ("loss", "teacher_norm", "pseudo/score_sum", "pseudo/iou_sum")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step depends on beside the state, the data and the method."""

    schedule: Schedule
    clip_norm: float | None = None
    precision: str = "fp32"  # fp32 | bf16 | fp16
    seed: int = 0
    max_pseudo_labels: int | None = None  # per image, those with the highest scores; None: no limit
    rows: int | None = None  # rows per step over all ranks; None: the batches of this process are all there are
    cpu_group: dist.ProcessGroup | None = None  # for flags, beside the device's collectives; None: a single rank


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of a step. All ranks agree on ``skipped`` and ``stop``."""

    metrics: Metrics  # detached, on the device
    skipped: bool  # not finite, or out of memory in a forward pass, on some rank: nothing was changed
    stop: bool  # some rank was asked to stop after this step
    grad_norm: float  # before clipping; infinite or NaN in a skipped step
    fits: bool = True  # False: skipped because a forward pass ran out of memory


class BackwardOutOfMemoryError(RuntimeError):
    """A backward pass ran out of memory. The rank cannot continue: the others wait for it in that pass' all-reduce.

    ``pseudo_labels`` is the largest number of pseudo-labels of an image in the batch.
    """

    def __init__(self, pseudo_labels: int, reason: str) -> None:
        self.pseudo_labels = pseudo_labels
        super().__init__(reason)


def train_step(
    state: TrainState,
    network: nn.Module,
    batches: Sequence[Batch | None],
    method: Method,
    settings: StepSettings,
    stop: bool = False,
) -> StepResult:
    """Update the student on one rank's micro-batches, and the teacher as its moving average.

    ``network`` is ``state.student``, bare or wrapped in DDP. If the number of ranks does not divide the rows of the
    step, some ranks have None in place of their first micro-batch: every row has the same weight, and all ranks end
    with a backward pass. A step that is not finite, or whose forward pass runs out of memory, on any rank is skipped
    on all of them: student, teacher and optimizer do not change, only the counters. Raises BackwardOutOfMemoryError.
    """
    lr = set_lr(state.optimizer, settings.schedule, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    metrics = accumulate_gradients(state, network, batches, method, settings)
    if metrics is None:
        return skip_step(state, lr, stop=any_rank(stop, settings.cpu_group))

    state.scaler.unscale_(state.optimizer)
    limit = math.inf if settings.clip_norm is None else settings.clip_norm
    metrics["grad_norm"] = grad_norm = nn.utils.clip_grad_norm_(state.student.parameters(), limit)
    metrics["teacher_norm"] = nn.utils.get_total_norm(state.teacher.parameters())
    checked = [torch.as_tensor(metrics[name]) for name in MUST_BE_FINITE if name in metrics]
    # With fp16 an infinite gradient is due to the loss scale until the scale cannot be lowered any further.
    may_lower_scale = state.scaler.is_enabled() and state.scaler.get_scale() >= 1.0
    status = sync_step_status(checked, grad_norm, stop, check_gradient=not may_lower_scale)
    # The scaler skips infinite gradients too, but torch calls a fused optimizer all the same, and its first step would
    # leave uninitialized momenta.
    if status.finite and math.isfinite(status.grad_norm):
        state.scaler.step(state.optimizer)
        metrics["ema_decay"] = decay = method.decay(state.step)
        update_ema(state.teacher, state.student, decay)
    state.scaler.update()  # also after a skipped step: it ends what unscale_ began
    metrics["lr"] = lr
    count_step(state, skipped=not status.finite)
    return StepResult(metrics=metrics, skipped=not status.finite, stop=status.stop, grad_norm=status.grad_norm)


def accumulate_gradients(
    state: TrainState,
    network: nn.Module,
    batches: Sequence[Batch | None],
    method: Method,
    settings: StepSettings,
) -> Metrics | None:
    """Add up the gradients of this rank's micro-batches and return their metrics, weighted as the gradients are.

    Returns None on all ranks if a forward pass ran out of memory on any. Raises BackwardOutOfMemoryError.
    """
    share = 1 / len(batches) if settings.rows is None else world_size() / settings.rows  # DDP divides by the ranks
    metrics: Metrics = {}
    fits = True
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        loss: Tensor | None = None
        values: Metrics = {}
        try:
            if fits and batch is not None:
                loss, values = micro_batch_loss(state, network, batch, method, settings, last)
        except torch.OutOfMemoryError:
            fits = False
        if last:  # before the backward pass, whose all-reduce would wait forever for a rank that has no loss
            fits = not any_rank(not fits, settings.cpu_group)
        most = int(values.pop(MAX_PER_IMAGE, 0))
        if loss is not None and fits:
            try:
                with nullcontext() if last else without_sync(network):
                    state.scaler.scale(loss * share).backward()
            except torch.OutOfMemoryError as error:
                raise BackwardOutOfMemoryError(most, str(error)) from error
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + torch.as_tensor(value).detach() * share
    return metrics if fits else None


def micro_batch_loss(
    state: TrainState, network: nn.Module, batch: Batch, method: Method, settings: StepSettings, last: bool
) -> tuple[Tensor, Metrics]:
    """The loss of one micro-batch and its metrics: the forward passes only."""
    # Of the samplers in RPN and RoI heads. It depends on the row alone, so that a resumed step draws the same samples.
    torch.manual_seed((settings.seed * 1_000_003 + int(batch.labeled.rows[0]) * 7_919 + 1) % 2**63)
    with (
        nullcontext() if last else without_sync(network),
        autocast(batch.labeled.images.device, settings.precision),
    ):
        losses, metrics = batch_losses(network, state.teacher, batch, method, state.step, settings.max_pseudo_labels)
    loss = torch.stack(list(losses.values())).sum()
    return loss, {**losses, **metrics, "loss": loss}


def batch_losses(
    network: nn.Module,
    teacher: Teacher,
    batch: Batch,
    method: Method,
    step: int,
    max_pseudo_labels: int | None = None,
) -> tuple[dict[str, Tensor], Metrics]:
    """The weighted losses ``labeled/NAME`` and ``unlabeled/NAME`` of one micro-batch, and its pseudo-label metrics."""
    labeled = network(batch.labeled, batch.targets)
    lambda_labeled = method.labeled_weight(step)
    losses = {f"labeled/{k}": v * (lambda_labeled * method.labeled_weights.get(k, 1.0)) for k, v in labeled.items()}
    lambda_unlabeled = method.unlabeled_weight(step)
    if batch.weak is None or batch.strong is None or lambda_unlabeled == 0:
        return losses, {}

    predictions = batch.scored
    if predictions is None:
        predictions = teacher.predict(batch.weak, score_threshold=method.score_threshold)
    predictions = [highest_scores(p, max_pseudo_labels) for p in predictions]
    weak_targets = [method.pseudo_labels(p) for p in predictions]
    weak_to_strong = geometry.compose(batch.strong.matrix, geometry.invert(batch.weak.matrix))
    strong_targets = [
        t.warp(m, size) for t, m, size in zip(weak_targets, weak_to_strong, batch.strong.sizes, strict=True)
    ]
    unlabeled = network(batch.strong, strong_targets)
    for name, value in unlabeled.items():
        losses[f"unlabeled/{name}"] = value * (lambda_unlabeled * method.unlabeled_weights.get(name, 1.0))
    return losses, pseudo_label_sums(predictions, weak_targets, strong_targets)


def highest_scores(predictions: Predictions, limit: int | None) -> Predictions:
    """At most ``limit`` predictions, those with the highest scores, in their order."""
    if limit is None or len(predictions) <= limit:
        return predictions
    return predictions[predictions.scores.topk(limit).indices.sort().values]


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, one fused update in fp32; integer buffers are copied."""
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s.to(t.dtype) for t, s in floats], 1.0 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def skip_step(state: TrainState, lr: float, stop: bool) -> StepResult:
    """End a step without a backward pass, because a forward pass on some rank ran out of memory."""
    state.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    count_step(state, skipped=True)
    return StepResult(metrics={"lr": lr}, skipped=True, stop=stop, grad_norm=math.nan, fits=False)


def count_step(state: TrainState, *, skipped: bool) -> None:
    state.step += 1
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
    state.skipped += int(skipped)
