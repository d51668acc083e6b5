"""Which images the global step row g holds: a pure function of (seed, g), and nothing else. Torch-free.

Row g of a run has ``labeled`` labeled and ``unlabeled`` unlabeled images. Each of the two parts is walked pass
after pass, every pass in an order of its own, and the passes are laid end to end: no image is skipped or
doubled within a pass, and the small labeled part simply repeats more often. At a step, rank r of W with
accumulation i takes row ``g_next + i * W + r``; a checkpoint stores ``g_next``, which does not depend on W.
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
            self._draw(_LABELED, self.num_labeled, g * self.labeled, self.labeled),
            self._draw(_UNLABELED, self.num_unlabeled, g * self.unlabeled, self.unlabeled),
        )

    def _draw(self, part: int, size: int, start: int, count: int) -> np.ndarray:
        places = np.arange(start, start + count)
        return np.array([_order(self.seed, part, int(p) // size, size)[int(p) % size] for p in places], dtype=np.int64)


@lru_cache(maxsize=8)
def _order(seed: int, part: int, pass_index: int, size: int) -> np.ndarray:
    """The order of one pass: raw generator output is the same in every numpy, ``permutation`` need not be."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, part, pass_index])).random_raw(size)
    return np.argsort(raw, kind="stable")


def rows_of(start: int, total: int, world: int, rank: int) -> range:
    """The global rows that ``rank`` of ``world`` walks from row ``start`` on, ``total`` rows over all ranks."""
    return range(start + rank, start + total, world)
