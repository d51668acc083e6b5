"""Collectives of the workers of a run. With one worker, all of them return at once."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pais_ray.config.sections import GuardConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """This worker's rank among the workers of a run, and the collectives of picklable values."""

    rank: int
    world_size: int
    device: torch.device

    def broadcast(self, value: T) -> T:
        """Return rank 0's value; the values of the other ranks are ignored."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, in the order of the ranks, and an empty list on the others."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks on every rank, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


class StepStatus(NamedTuple):
    """What all ranks agree on after the backward passes of a step."""

    finite: bool  # whether every checked value is finite on every rank
    stop: bool  # whether any rank was asked to stop
    grad_norm: float  # infinite if it is not finite


def sync_step_status(checked: Sequence[Tensor], grad_norm: Tensor, stop: bool, *, check_gradient: bool) -> StepStatus:
    """Exchange the status of a step in one reduction. Waits for the device.

    DDP has averaged the gradients, so all ranks have the same ``grad_norm``; the values in ``checked`` differ. If
    ``check_gradient`` is False, an infinite gradient does not count as a failure: the fp16 scaler skips such steps and
    lowers its scale.
    """
    norm = grad_norm.float()
    failed = ~torch.isfinite(torch.stack([value.to(norm.device).float() for value in checked])).all()
    failed = failed | (~torch.isfinite(norm) if check_gradient else torch.zeros_like(failed))
    comparable = norm.nan_to_num(nan=math.inf, posinf=math.inf)  # the maximum of NaN is undefined
    flags = torch.stack([failed.float(), torch.full_like(norm, float(stop)), comparable])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    any_failed, any_stop, largest = flags.tolist()  # the only synchronization with the device per step
    return StepStatus(finite=not any_failed, stop=bool(any_stop), grad_norm=largest)


def any_rank(flag: bool, cpu_group: dist.ProcessGroup | None) -> bool:
    """Whether ``flag`` is set on any rank. ``cpu_group`` is a process group for tensors on the CPU, so that this does
    not wait for the device; None if there is only one rank."""
    if cpu_group is None:
        return flag
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=cpu_group)
    return bool(flags.item())


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def without_sync(network: nn.Module) -> Iterator[None]:
    """Keep gradients local within the block; DDP averages them in the last micro-batch's backward pass."""
    with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
        yield


def collective_timeout(guards: GuardConfig) -> timedelta:
    """How long a rank waits for others in a collective: longer than the limit of any stage, so that the driver finds
    the rank that hangs before this timeout ends the others."""
    return timedelta(
        seconds=60
        + max(
            guards.first_batch_timeout_s,
            guards.step_timeout_s,
            guards.evaluate_timeout_s,
            guards.save_timeout_s,
        )
    )
