"""Which images a global step row holds: a pure function of (seed, g). Torch-free.

Row g of a run has ``labeled`` labeled and ``unlabeled`` unlabeled images. Each of the two parts is traversed in passes.
Every pass has its own order, and the passes follow each other without a gap: no image is skipped or repeated within a
pass, and the small labeled part is repeated more often. A step takes the next R rows, where R is fixed for the run; in
round i, rank r of W takes row ``g_next + i * W + r``; if W does not divide R, some ranks have no row in the first
round, and the rows shift accordingly. A checkpoint stores ``g_next``, which does not depend on W: for
any sequence of world sizes the steps see the same rows.

A part in shards is traversed in file order: the row groups are permuted per pass, and the rows are permuted within
their group. To avoid that every rank reads every group, the rows of a run are divided into ``lanes``: row g belongs to
lane g % lanes. A pass still consists of ``size`` consecutive draws over all lanes; the draws of one lane within a pass
are one contiguous section of the order of the pass, lane after lane. At most ``lanes - 1`` groups per pass are read by
two lanes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_LABELED, _UNLABELED = 0, 1


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The composition of every step row of a run."""

    seed: int
    num_labeled: int  # images in the labeled part
    num_unlabeled: int  # images in the unlabeled part
    labeled: int  # labeled images per row
    unlabeled: int  # unlabeled images per row
    # Number of images in each row group of a part in shards. The images are numbered group after group.
    labeled_groups: tuple[int, ...] | None = None
    unlabeled_groups: tuple[int, ...] | None = None
    lanes: int = 1  # the rows per step of a run: each rank then reads a fixed subset of lanes for any world size

    def __post_init__(self) -> None:
        for part, wanted, available in (
            ("labeled", self.labeled, self.num_labeled),
            ("unlabeled", self.unlabeled, self.num_unlabeled),
        ):
            if wanted > 0 and available == 0:
                remedy = "set data.labeled > 0" if part == "labeled" else "set data.unlabeled or data.labeled < 1"
                raise ValueError(f"batch.{part}={wanted}: the data set has no {part} images; {remedy}")

    @property
    def images_per_row(self) -> int:
        return self.labeled + self.unlabeled

    def row(self, g: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of row g's images in the labeled part (labeled,) and in the unlabeled part (unlabeled,)."""
        return (
            self._draw(_LABELED, self.num_labeled, self.labeled_groups, g * self.labeled, self.labeled),
            self._draw(_UNLABELED, self.num_unlabeled, self.unlabeled_groups, g * self.unlabeled, self.unlabeled),
        )

    def _draw(self, part: int, size: int, groups: tuple[int, ...] | None, start: int, count: int) -> np.ndarray:
        drawn = np.empty(count, dtype=np.int64)
        for draw in range(start, start + count):
            if draw == start or draw % size == 0:
                order = _pass_order(self.seed, part, draw // size, size, groups)
            position = draw % size if groups is None else _position_in_pass(draw, size, count, self.lanes)
            drawn[draw - start] = order[position]
        return drawn


def _position_in_pass(draw: int, size: int, count: int, lanes: int) -> int:
    """Position of a draw in the order of its pass, with ``count`` draws per row: it comes after all draws that the
    preceding lanes make in this pass, and after the earlier draws of its own lane."""

    def draws_of_lanes(num_lanes: int, stop: int) -> int:
        """Number of draws among 0 .. stop - 1 that belong to lanes 0 .. num_lanes - 1."""
        return stop // (count * lanes) * count * num_lanes + min(stop % (count * lanes), count * num_lanes)

    lane = draw // count % lanes
    begin = draw - draw % size
    preceding_lanes = draws_of_lanes(lane, begin + size) - draws_of_lanes(lane, begin)
    own_until_draw = draws_of_lanes(lane + 1, draw) - draws_of_lanes(lane, draw)
    own_until_begin = draws_of_lanes(lane + 1, begin) - draws_of_lanes(lane, begin)
    return preceding_lanes + own_until_draw - own_until_begin


@lru_cache(maxsize=8)
def _pass_order(seed: int, part: int, pass_index: int, size: int, groups: tuple[int, ...] | None) -> np.ndarray:
    """The order of one pass. Uses raw generator output, which is identical in every version of numpy; the result of
    ``permutation`` may change between versions."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, part, pass_index]))
    if groups is None:
        return np.argsort(raw.random_raw(size), kind="stable")
    group_rank = np.argsort(np.argsort(raw.random_raw(len(groups)), kind="stable"))
    row_keys = np.random.PCG64(np.random.SeedSequence([seed, part, pass_index, 1])).random_raw(size)
    return np.lexsort((row_keys, np.repeat(group_rank, groups)))


@dataclass(frozen=True)
class RankRows:
    """The global rows of one rank over some steps, in order, computed on access."""

    start: int  # first global row of all ranks
    per_step: int  # rows per step, over all ranks
    world: int
    rank: int
    steps: int
    labeled_only_steps: int = 0  # the first steps, in which no unlabeled image is read

    def __len__(self) -> int:
        return self.steps * self.per_step_and_rank

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, i = divmod(index, self.per_step_and_rank)
        without_row = -self.per_step % self.world  # ranks that have no row in the first round
        i += self.rank < without_row
        return self.start + step * self.per_step + i * self.world + self.rank - without_row

    @property
    def per_step_and_rank(self) -> int:
        """Rows per step of this rank."""
        return rank_rows_per_step(self.per_step, self.world, self.rank)

    @property
    def rounds(self) -> int:
        """Micro-batches per step: the largest number of rows per step of any rank."""
        return -(-self.per_step // self.world)

    @property
    def num_labeled_only(self) -> int:
        """Number of leading rows without unlabeled images."""
        return min(self.labeled_only_steps, self.steps) * self.per_step_and_rank


def rank_rows(start: int, steps: int, per_step: int, world: int, rank: int, *, labeled_only_steps: int = 0) -> RankRows:
    """The global rows of ``rank`` of ``world`` over ``steps`` steps, starting at row ``start``.

    A step takes the next ``per_step`` rows and distributes them over the ranks in rounds. If they do not divide evenly,
    some ranks have no row in the first round, so that all ranks end a step together. The first ``labeled_only_steps``
    steps have no unlabeled images. Raises ValueError if there are more ranks than rows per step.
    """
    if world > per_step:
        raise ValueError(f"{world} workers cannot share {per_step} rows per step; lower scaling.num_workers")
    return RankRows(start, per_step, world, rank, steps, labeled_only_steps)


def rank_rows_per_step(per_step: int, world: int, rank: int) -> int:
    """How many of the ``per_step`` rows of a step belong to ``rank``."""
    remainder = per_step % world
    return per_step // world + (rank >= world - remainder if remainder else 0)


def count_labeled_only_steps(unlabeled_weight: Callable[[int], float], first: int, last: int) -> int:
    """Number of steps, counted from step ``first``, before the first step below ``last`` whose loss uses unlabeled
    images: a method's burn-in. ``unlabeled_weight`` is the method's weight of the unlabeled loss at a step."""
    return next((step - first for step in range(first, last) if unlabeled_weight(step)), last - first)
