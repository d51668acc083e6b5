"""One optimizer step: Algorithm 1 of the paper, top to bottom. Read this first.

Free of Ray: a list of batches drives it in a notebook. Under DDP every rank calls it with its own batches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pais_ray.modeling.optim import Schedule, set_lr
from pais_ray.modeling.precision import autocast
from pais_ray.modeling.protocols import Method
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions, Targets
from pais_ray.train.state import Teacher, TrainState

Metrics = dict[str, Tensor | float]

# What must be finite: a teacher that is not would propose nothing, and nobody would see why.
WATCHED = ("loss", "teacher_norm", "pseudo/score_sum", "pseudo/iou_sum")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs to know beside the state, the data and the method."""

    schedule: Schedule
    clip_norm: float | None = None
    precision: str = "fp32"  # fp32 | bf16 | fp16
    seed: int = 0
    rows: int | None = None  # global rows a step, over all ranks; None: this process's batches are all there are
    ranks: Any = None  # process group of CPU flags, beside the device's collectives; None: one rank alone


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did. All ranks agree on ``skipped`` and ``stop``."""

    metrics: Metrics  # detached, on the device
    skipped: bool  # not finite, or out of memory in a forward pass, on some rank: nothing was changed
    stop: bool  # some rank was asked to stop after this step
    grad_norm: float  # before clipping; infinite or NaN in a skipped step
    fits: bool = True  # False: skipped because a forward pass ran out of memory


class MemoryRanOut(RuntimeError):
    """In a backward pass, whose all-reduce the other ranks wait in: this rank cannot go on.

    ``pseudo_labels`` is the most that an image of the batch had.
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
    """Learns from one rank's micro-batches and lets the teacher follow.

    ``network`` is ``state.student``, bare or wrapped in DDP. Where the ranks do not divide the step's rows, some
    have None in place of their first micro-batch: every row weighs the same, and all ranks end with a backward
    pass. A step that is not finite or does not fit into memory on any rank is skipped on all of them: neither
    student, teacher nor optimizer change, only the counters. Raises MemoryRanOut.
    """
    lr = set_lr(state.optimizer, settings.schedule, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    share = 1 / len(batches) if settings.rows is None else world_size() / settings.rows  # DDP divides by the ranks
    metrics: Metrics = {}
    fits = True
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        total: Tensor | None = None
        values: Metrics = {}
        try:
            if fits and batch is not None:
                total, values = weighted_losses(state, network, batch, method, settings, last)
        except torch.OutOfMemoryError:
            fits = False
        if last:  # before the backward pass whose all-reduce would wait for ever for a rank that has no loss
            fits = not any_rank(not fits, settings.ranks)
        most = int(values.pop("pseudo/most", 0))
        if total is not None and fits:
            try:
                with nullcontext() if last else without_sync(network):
                    state.scaler.scale(total * share).backward()
            except torch.OutOfMemoryError as error:
                raise MemoryRanOut(most, str(error)) from error
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + torch.as_tensor(value).detach() * share
    if not fits:
        return skip_step(state, lr, stop=any_rank(stop, settings.ranks))

    state.scaler.unscale_(state.optimizer)
    limit = float("inf") if settings.clip_norm is None else settings.clip_norm
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(state.student.parameters(), limit)
    metrics["teacher_norm"] = nn.utils.get_total_norm(state.teacher.parameters())
    # With fp16 an infinite gradient is the loss scale's fault until there is no scale left to lower.
    scale_to_blame = state.scaler.is_enabled() and state.scaler.get_scale() >= 1.0
    bad, stop, norm = agree(metrics, stop, grad_matters=not scale_to_blame)
    # Not even with a scale to blame: torch calls a fused optimizer all the same, whose first step then leaves momenta
    # that were never written.
    if not bad and math.isfinite(norm):
        state.scaler.step(state.optimizer)
        decay = method.decay(state.step)
        follow(state.teacher, state.student, decay)
        metrics["ema_decay"] = decay
    state.scaler.update()  # also after a skipped step: it ends what unscale_ began
    metrics["lr"] = lr
    count_step(state, skipped=bad)
    return StepResult(metrics=metrics, skipped=bad, stop=stop, grad_norm=norm)


def skip_step(state: TrainState, lr: float, stop: bool) -> StepResult:
    """A step without a backward pass, because a forward pass on some rank ran out of memory."""
    state.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    count_step(state, skipped=True)
    return StepResult(metrics={"lr": lr}, skipped=True, stop=stop, grad_norm=math.nan, fits=False)


def count_step(state: TrainState, *, skipped: bool) -> None:
    state.step += 1
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
    state.skipped += int(skipped)


def weighted_losses(
    state: TrainState,
    network: nn.Module,
    batch: Batch,
    method: Method,
    settings: StepSettings,
    last: bool,
) -> tuple[Tensor, Metrics]:
    """The loss of one micro-batch and its metrics: the forward passes alone."""
    seed_step(settings.seed, int(batch.labeled.rows[0]))
    with (
        nullcontext() if last else without_sync(network),
        autocast(batch.labeled.images.device, settings.precision),
    ):
        losses, logs = batch_losses(network, state.teacher, batch, method, state.step, state.cap)
    total = torch.stack(list(losses.values())).sum()
    return total, {**losses, **logs, "loss": total}


def batch_losses(
    network: nn.Module, teacher: Teacher, batch: Batch, method: Method, step: int, cap: int | None = None
) -> tuple[dict[str, Tensor], Metrics]:
    """The weighted loss terms of one micro-batch, ``labeled/<name>`` and ``unlabeled/<name>``, and its logs."""
    labeled = network(batch.labeled, batch.targets)
    lambda_labeled = method.labeled_weight(step)
    losses = {f"labeled/{k}": v * (lambda_labeled * method.labeled_weights.get(k, 1.0)) for k, v in labeled.items()}
    lambda_unlabeled = method.unlabeled_weight(step)
    if batch.weak is None or batch.strong is None or lambda_unlabeled == 0:
        return losses, {}

    predictions = batch.scored
    if predictions is None:
        predictions = teacher.predict(batch.weak, score_threshold=method.score_threshold)
    predictions = [at_most(p, cap) for p in predictions]
    weak_targets = [method.pseudo_labels(p) for p in predictions]
    weak_to_strong = geometry.compose(batch.strong.matrix, geometry.invert(batch.weak.matrix))
    strong_targets = [
        t.warp(m, size) for t, m, size in zip(weak_targets, weak_to_strong, batch.strong.sizes, strict=True)
    ]
    unlabeled = network(batch.strong, strong_targets)
    for name, value in unlabeled.items():
        losses[f"unlabeled/{name}"] = value * (lambda_unlabeled * method.unlabeled_weights.get(name, 1.0))
    return losses, pseudo_label_logs(predictions, weak_targets, strong_targets)


def at_most(predictions: Predictions, cap: int | None) -> Predictions:
    """The ``cap`` highest scores, in their order."""
    if cap is None or len(predictions) <= cap:
        return predictions
    return predictions[predictions.scores.topk(cap).indices.sort().values]


def pseudo_label_logs(
    predictions: Sequence[Predictions], weak: Sequence[Targets], strong: Sequence[Targets]
) -> Metrics:
    """Counts and sums of one micro-batch's pseudo-labels; a mean is a sum over ``pseudo/kept``, see worker.py."""
    images = len(predictions)
    zero = predictions[0].scores.new_zeros(())
    return {
        "pseudo/images": float(images),
        "pseudo/over_tau_cls": float(sum(len(p) for p in predictions)),
        "pseudo/kept": float(sum(len(t) for t in weak)),
        "pseudo/most": float(max(len(t) for t in weak)),  # for whoever runs out of memory; not logged
        "pseudo/in_strong": float(sum(len(t) for t in strong)),
        "pseudo/empty_images": float(sum(len(t) == 0 for t in weak)),
        "pseudo/score_sum": sum((_score_sum(p) for p in predictions), start=zero),
        "pseudo/iou_sum": sum((p.ious.sum() for p in predictions), start=zero),
        "pseudo/class_weight_sum": sum((t.class_weight.sum() for t in weak), start=zero),
        "pseudo/mask_weight_sum": sum((t.mask_weight.sum() for t in weak), start=zero),
    }


def _score_sum(predictions: Predictions) -> Tensor:
    """Not a number where the network's output was none, which a threshold may have dropped."""
    total = predictions.scores.sum()
    return total if predictions.finite is None else torch.where(predictions.finite, total, torch.nan)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, one fused update in fp32; integer buffers are copied."""
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s.to(t.dtype) for t, s in floats], 1.0 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def agree(metrics: Metrics, stop: bool, *, grad_matters: bool) -> tuple[bool, bool, float]:
    """(something on some rank is not finite, some rank wants to stop, gradient norm), the same on every rank.

    DDP has averaged the gradients, so their norm already agrees; losses and the teacher do not. Where
    ``grad_matters`` is False an infinite gradient is left to the fp16 scaler, which skips such steps and lowers
    its scale.
    """
    norm = torch.as_tensor(metrics["grad_norm"]).float()
    watched = [torch.as_tensor(metrics[k]) for k in WATCHED if k in metrics]
    bad = ~torch.isfinite(torch.stack([w.to(norm.device).float() for w in watched])).all()
    bad = bad | (~torch.isfinite(norm) if grad_matters else torch.zeros_like(bad))
    known = norm.nan_to_num(nan=math.inf, posinf=math.inf)  # of NaN no maximum is taken
    flags = torch.stack([bad.float(), torch.full_like(norm, float(stop)), known])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    bad_anywhere, stop_anywhere, largest = flags.tolist()  # waits for the device, once a step
    return bool(bad_anywhere), bool(stop_anywhere), largest


def any_rank(flag: bool, ranks: Any) -> bool:
    """Whether any rank says so. On the CPU and over a group of its own: it does not wait for the device."""
    if ranks is None:
        return flag
    said = torch.tensor([float(flag)])
    dist.all_reduce(said, dist.ReduceOp.MAX, group=ranks)
    return bool(said.item())


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def seed_step(seed: int, row: int) -> None:
    """Seeds the samplers of RPN and RoI heads by the global row, so that a resumed step draws what it drew."""
    torch.manual_seed((seed * 1_000_003 + row * 7_919 + 1) % 2**63)


@contextmanager
def without_sync(network: nn.Module) -> Iterator[None]:
    """Gradients of all but the last micro-batch stay local."""
    with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
        yield
