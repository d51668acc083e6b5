"""Which images the global step row g holds: a pure function of (seed, g), and nothing else. Torch-free.

Row g of a run has ``labeled`` labeled and ``unlabeled`` unlabeled images. Each of the two parts is walked pass
after pass, every pass in an order of its own, and the passes are laid end to end: no image is skipped or
doubled within a pass, and the small labeled part simply repeats more often. A step takes the next R rows, R fixed
for the run; rank r of W takes row ``g_next + i * W + r`` in round i. A checkpoint stores ``g_next``, which does not
depend on W: over any sequence of world sizes the steps see the same rows.

A part that lies in shards is walked in file order: row groups in an order of the pass, the rows of a group in one
of theirs. So that ranks do not all read every group, the rows of a run go in ``lanes``: row g is of lane g % lanes.
A pass is the same as ever, ``size`` draws in a row over all lanes; each lane's draws of the pass are one stretch
of the pass's order, lane after lane. At most ``lanes - 1`` groups a pass are read by two lanes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_LABELED, _UNLABELED = 0, 1


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The composition of every row of a run."""

    seed: int
    num_labeled: int  # images in the labeled part
    num_unlabeled: int  # images in the unlabeled part
    labeled: int  # labeled images a row
    unlabeled: int  # unlabeled images a row
    # rows of each row group of a part that lies in shards, whose images are numbered group after group
    labeled_groups: tuple[int, ...] | None = None
    unlabeled_groups: tuple[int, ...] | None = None
    lanes: int = 1  # of a run the rows of a step: each rank walks the same few, whatever their number

    def __post_init__(self) -> None:
        for part, wanted, there in (
            ("labeled", self.labeled, self.num_labeled),
            ("unlabeled", self.unlabeled, self.num_unlabeled),
        ):
            if wanted > 0 and there == 0:
                raise ValueError(
                    f"batch.{part}={wanted}: the data set has no {part} images; "
                    + ("give data.labeled > 0" if part == "labeled" else "give data.unlabeled or data.labeled < 1")
                )

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
        for place in range(start, start + count):
            if place == start or place % size == 0:
                order = _order(self.seed, part, place // size, size, groups)
            within = place % size if groups is None else _place_in_pass(place, size, count, self.lanes)
            drawn[place - start] = order[within]
        return drawn


def _place_in_pass(place: int, size: int, count: int, lanes: int) -> int:
    """Where draw ``place`` of a part lies in the order of its pass, ``count`` draws a row: behind the draws that the
    lanes before its own have in this pass, and behind its own lane's earlier ones."""

    def before(lane: int, stop: int) -> int:
        """Draws 0 .. stop - 1 that are of the lanes 0 .. lane - 1."""
        return stop // (count * lanes) * count * lane + min(stop % (count * lanes), count * lane)

    lane = place // count % lanes
    begin = place - place % size
    of_lanes_before = before(lane, begin + size) - before(lane, begin)
    own = before(lane + 1, place) - before(lane, place) - (before(lane + 1, begin) - before(lane, begin))
    return of_lanes_before + own


@lru_cache(maxsize=8)
def _order(seed: int, part: int, pass_index: int, size: int, groups: tuple[int, ...] | None) -> np.ndarray:
    """The order of one pass: raw generator output is the same in every numpy, ``permutation`` need not be."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, part, pass_index]))
    if groups is None:
        return np.argsort(raw.random_raw(size), kind="stable")
    turn = np.argsort(np.argsort(raw.random_raw(len(groups)), kind="stable"))  # of each group
    rows = np.random.PCG64(np.random.SeedSequence([seed, part, pass_index, 1])).random_raw(size)
    return np.lexsort((rows, np.repeat(turn, groups)))


@dataclass(frozen=True)
class RankRows:
    """The global rows that one rank walks, in order, not written out."""

    start: int
    per_step: int  # rows of a step, over all ranks
    world: int
    rank: int
    steps: int

    def __len__(self) -> int:
        return self.steps * rows_here(self.per_step, self.world, self.rank)

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        here = rows_here(self.per_step, self.world, self.rank)
        step, i = divmod(index, here)
        missing = -self.per_step % self.world  # ranks without a row in the first round
        i += self.rank < missing
        return self.start + step * self.per_step + i * self.world + self.rank - missing


def rows_of(start: int, steps: int, per_step: int, world: int, rank: int) -> RankRows:
    """The global rows of ``rank`` of ``world`` over ``steps`` steps from row ``start`` on.

    A step takes the next ``per_step`` rows, dealt to the ranks in rounds; where they do not come out even, it is
    the first round that lacks some ranks, so that all of them end a step together.
    """
    if world > per_step:
        raise ValueError(f"{world} workers cannot share {per_step} rows a step; lower scaling.num_workers")
    return RankRows(start, per_step, world, rank, steps)


def rows_here(per_step: int, world: int, rank: int) -> int:
    """How many of a step's rows are ``rank``'s."""
    return per_step // world + (rank >= world - per_step % world if per_step % world else 0)
