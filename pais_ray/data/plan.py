"""Which images the global step row g holds: a pure function of (seed, g), and nothing else. Torch-free.

Row g of a run has ``labeled`` labeled and ``unlabeled`` unlabeled images. Each of the two parts is walked pass
after pass, every pass in an order of its own, and the passes are laid end to end: no image is skipped or
doubled within a pass, and the small labeled part simply repeats more often. At a step, rank r of W with
accumulation i takes row ``g_next + i * W + r``; a checkpoint stores ``g_next``, which does not depend on W.

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
    lanes: int = 1  # fixed for a run: another world size must not change what its rows hold

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


def rows_of(start: int, total: int, world: int, rank: int) -> range:
    """The global rows that ``rank`` of ``world`` walks from row ``start`` on, ``total`` rows over all ranks."""
    return range(start + rank, start + total, world)
