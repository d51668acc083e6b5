"""ASHA's law: at a rung a trial goes on where it is among the best third of those that reached it.

A rung is an absolute step at which every trial is evaluated. A trial's value there is the AP of that very step, so
a late result cannot enter an early rung, whatever happened to the process that decides (Ray 2.60's own scheduler
loses its rungs when a search is restored and fills them with later results).
"""

from collections.abc import Collection

from pais_ray.config.overlays import ConfigError

ETA = 3  # of those that reach a rung, one in ETA goes on; Li et al. 2020 use 4, which spares too few of few trials


def default_rungs(steps: int, every: int | None) -> tuple[int, ...]:
    """A ninth and a third of ``steps``, each at the next evaluation; none without evaluations on the way."""
    if every is None:
        return ()
    wanted = (steps / ETA**2, steps / ETA)
    return tuple(sorted({step for share in wanted if (step := -int(-share // every) * every) < steps}))


def parse_rungs(text: str, steps: int, every: int | None) -> tuple[int, ...]:
    """The rungs that a person wrote: `none`, or steps at which trials are evaluated. Raises ConfigError."""
    if text == "none":
        return ()
    try:
        rungs = tuple(int(part) for part in text.split(","))
    except ValueError:
        rungs = ()
    fits = every is not None and all(0 < r < steps and r % every == 0 for r in rungs)
    if not rungs or not fits or list(rungs) != sorted(set(rungs)):
        where = "train.eval_every is null" if every is None else f"train.eval_every is {every}"
        raise ConfigError(
            f"--rungs {text}: expected none, or ascending steps below {steps} at which trials are evaluated ({where})"
        )
    return rungs


def goes_on(ap: float, at_rung: Collection[float]) -> bool:
    """Whether a trial with ``ap`` goes on, where ``at_rung`` are the values at its rung, its own among them."""
    best = -(-len(at_rung) // ETA)  # at least one
    return sum(other > ap for other in at_rung) < best
