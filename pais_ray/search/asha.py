"""Asynchronous successive halving (ASHA): at a rung, a trial continues if it is in the best third so far.

A rung is an absolute step at which every trial is evaluated. The value of a trial at a rung is its AP at that step, so
a late result cannot enter an early rung, even if the deciding process was restarted. (Ray 2.60's own scheduler loses
its rungs when a search is restored, and then fills them with later results.)
"""

from collections.abc import Collection

from pais_ray.config.overlays import ConfigError

REDUCTION = 3  # one in REDUCTION trials at a rung continues; Li et al. 2020 use 4, which keeps too few of few trials


def default_rungs(steps: int, every: int | None) -> tuple[int, ...]:
    """A ninth and a third of ``steps``, each rounded up to the next evaluation; empty without evaluations."""
    if every is None:
        return ()
    wanted = (steps / REDUCTION**2, steps / REDUCTION)
    return tuple(sorted({step for share in wanted if (step := -int(-share // every) * every) < steps}))


def parse_rungs(text: str, steps: int, every: int | None) -> tuple[int, ...]:
    """The rungs in ``text``: `none`, or comma-separated steps at which trials are evaluated. Raises ConfigError."""
    if text == "none":
        return ()
    try:
        rungs = tuple(int(part) for part in text.split(","))
    except ValueError:
        rungs = ()
    are_evaluated = every is not None and all(0 < r < steps and r % every == 0 for r in rungs)
    if not rungs or not are_evaluated or list(rungs) != sorted(set(rungs)):
        where = "train.eval_every is null" if every is None else f"train.eval_every is {every}"
        raise ConfigError(
            f"--rungs {text}: expected none, or ascending steps below {steps} at which trials are evaluated ({where})"
        )
    return rungs


def is_promoted(ap: float, at_rung: Collection[float]) -> bool:
    """Whether a trial with ``ap`` continues; ``at_rung`` are all values at its rung, including its own."""
    num_promoted = -(-len(at_rung) // REDUCTION)  # at least one
    return sum(other > ap for other in at_rung) < num_promoted
