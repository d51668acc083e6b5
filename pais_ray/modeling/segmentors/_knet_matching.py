"""Bipartite matching of predicted masks and targets: one kernel an object, one object a kernel.

The cost is K-Net's (released code; Eq. 4 of the paper up to a constant): focal classification + dice + pixel
agreement. Eq. 4 also subtracts s_i, the teacher's mask IoU of pseudo-label i. That adds the same number to
every kernel's cost of label i, and every label is matched exactly once, so no assignment changes: it is left
out, as in the released code (tests/test_matching.py adds it and compares).

Legend: B images, N kernels, M targets of the fullest image, C classes, X pixels that masks are compared at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pais_ray.modeling.losses import DICE_EPSILON, FOCAL_ALPHA, FOCAL_GAMMA

LOG_EPSILON = 1e-12  # released code


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """P pairs of a kernel and a target, image by image."""

    image: Tensor  # (P,) int64
    kernel: Tensor  # (P,) int64 in 0..N-1
    target: Tensor  # (P,) int64, counted through all images

    def __len__(self) -> int:
        return len(self.image)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """What a kernel's focal loss changes by with target's class one: (B, N, M) of ``logits`` (B, N, C) and
    ``labels`` (B, M)."""
    p = logits.float().sigmoid()
    negative = -(1 - p + LOG_EPSILON).log() * (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA
    positive = -(p + LOG_EPSILON).log() * FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA
    return (positive - negative).gather(2, labels[:, None, :].expand(-1, p.shape[1], -1))


def mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(negative dice, negative share of agreeing pixels), each (B, N, M), of ``logits`` (B, N, X) and soft
    ``targets`` (B, M, X)."""
    soft, wanted = logits.float().sigmoid(), targets.float()
    both = soft @ wanted.transpose(1, 2)
    squares = soft.square().sum(dim=2)[:, :, None] + wanted.square().sum(dim=2)[:, None] + 2 * DICE_EPSILON
    # soft.wanted + (1 - soft).(1 - wanted), without a second product of that size
    neither = logits.shape[2] - soft.sum(dim=2)[:, :, None] - wanted.sum(dim=2)[:, None] + both
    return -2 * both / squares, -(both + neither) / logits.shape[2]


@torch.no_grad()
def cost(
    class_logits: Tensor | None,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """(B, N, M) in fp32 whatever the autocast; ``weights`` of class, dice and agreement. Without
    ``class_logits`` (B, N, C) there is no class cost."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        dice, agreement = mask_costs(mask_logits, masks)
        total = weights[1] * dice + weights[2] * agreement
        return total if class_logits is None else total + weights[0] * class_cost(class_logits, labels)


def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Match]:
    """The cheapest pairing of each of ``costs``, (B, N, M) each, where image b has ``counts[b]`` targets.

    All costs go to the host in one transfer. An image with more targets than kernels leaves some unmatched.
    Costs that are not finite count as dear, so that a diverged network ends as a loss that is not finite and
    not as an error in the solver.
    """
    device = costs[0].device
    host = torch.nan_to_num(torch.stack(list(costs)), nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    starts = [sum(counts[:b]) for b in range(len(counts))]
    matches = []
    for per_image in host:
        triples = []
        for b, (matrix, count) in enumerate(zip(per_image, counts, strict=True)):
            kernels, targets = linear_sum_assignment(matrix[:, :count])
            triples += [(b, int(k), starts[b] + int(t)) for k, t in zip(kernels, targets, strict=True)]
        image, kernel, target = torch.tensor(triples, dtype=torch.long).reshape(-1, 3).T.to(device, non_blocking=True)
        matches.append(Match(image=image, kernel=kernel, target=target))
    return matches
