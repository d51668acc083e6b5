"""Bipartite matching of kernels and targets: every target gets one kernel, every kernel at most one target.

The cost is K-Net's (released code; Eq. 4 of the paper up to a constant): focal classification + dice + pixel
agreement. Eq. 4 also subtracts s_i, the teacher's mask IoU of pseudo-label i. That adds the same number to the cost
of label i for every kernel, and every label is matched exactly once, so no assignment changes: the term is left out,
as in the released code (tests/modeling/test_knet_matching.py adds it and compares).

Legend: B images, N kernels, M largest number of targets per image, C classes, X pixels at which masks are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pais_ray.modeling.losses import DICE_EPSILON, FOCAL_ALPHA, FOCAL_GAMMA

LOG_EPSILON = 1e-12  # keeps the logarithm finite (released code)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """P pairs of a kernel and a target, image by image."""

    image: Tensor  # (P,) int64
    kernel: Tensor  # (P,) int64 in 0..N-1
    target: Tensor  # (P,) int64, index into the targets of all images

    def __len__(self) -> int:
        return len(self.image)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """The change (B, N, M) of a kernel's focal loss if it is matched to a target, from ``logits`` (B, N, C) and
    ``labels`` (B, M)."""
    p = logits.float().sigmoid()
    negative = -(1 - p + LOG_EPSILON).log() * (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA
    positive = -(p + LOG_EPSILON).log() * FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA
    return (positive - negative).gather(2, labels[:, None, :].expand(-1, p.shape[1], -1))


def mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The negative dice and the negative share of agreeing pixels, each (B, N, M), of ``logits`` (B, N, X) and soft
    ``targets`` (B, M, X)."""
    soft, targets = logits.float().sigmoid(), targets.float()
    both = soft @ targets.transpose(1, 2)
    squares = soft.square().sum(dim=2)[:, :, None] + targets.square().sum(dim=2)[:, None] + 2 * DICE_EPSILON
    # (1 - soft) @ (1 - targets), computed without a second product of that size
    neither = logits.shape[2] - soft.sum(dim=2)[:, :, None] - targets.sum(dim=2)[:, None] + both
    return -2 * both / squares, -(both + neither) / logits.shape[2]


@torch.no_grad()
def matching_cost(
    class_logits: Tensor | None,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """The cost (B, N, M) of matching each kernel to each target, in fp32 under autocast too.

    ``weights`` are those of the class, dice and pixel-agreement terms; ``labels`` is (B, M), ``masks`` (B, M, X).
    Without ``class_logits`` (B, N, C) there is no class term."""
    with torch.autocast(mask_logits.device.type, enabled=False):
        dice, agreement = mask_costs(mask_logits, masks)
        total = weights[1] * dice + weights[2] * agreement
        return total if class_logits is None else total + weights[0] * class_cost(class_logits, labels)


def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> list[Matching]:
    """The cheapest matching for each of ``costs``, (B, N, M) each; image b has ``counts[b]`` targets.

    All costs are moved to the host in one transfer. If an image has more targets than kernels, some stay unmatched.
    Costs that are not finite become large ones, so that a diverged network shows in a loss that is not finite instead
    of an error in the solver.
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
        matches.append(Matching(image=image, kernel=kernel, target=target))
    return matches
