"""How many trials a cluster holds at once. Tune counts a trial's own process alone, not the workers it starts."""

import math
from collections.abc import Mapping, Sequence

from pais_ray.overlays import ConfigError

READING_CPUS = 1.0  # free on one node for the reading tasks of all trials: one of Ray Data's asks for a whole CPU


def concurrent_trials(nodes: Sequence[Mapping[str, float]], *, workers: int, cpus: float, use_gpu: bool) -> int:
    """The most trials that all of a cluster's ``nodes`` (resource -> amount) can run at once: each worker has a place
    of ``cpus`` CPUs (and a GPU), and wherever Ray puts them, one node keeps READING_CPUS. Raises ConfigError below one.

    With more, trials would wait for workers that cannot start, or all of them for images that nobody reads. A trial's
    own process takes no CPU: it waits.
    """
    places = 0
    taken = 0.0  # the fewest workers that could leave no node with READING_CPUS
    for node in nodes:
        total = node.get("CPU", 0.0)
        fits = _floor(total / cpus)
        if use_gpu:
            fits = min(fits, int(node.get("GPU", 0.0)))
        blocks = _floor((total - READING_CPUS) / cpus) + 1 if total >= READING_CPUS else 0
        places += fits
        taken += blocks if blocks <= fits else math.inf
    found = int(min(places, taken - 1) // workers)
    if found < 1:
        have = ", ".join(f"{n.get('CPU', 0.0):g} CPUs" + f" {n.get('GPU', 0.0):g} GPUs" * use_gpu for n in nodes)
        raise ConfigError(
            f"not one trial fits: {workers} x {cpus:g} CPUs{f' and {workers} GPUs' * use_gpu} for its workers and "
            f"{READING_CPUS:g} for reading, {workers * cpus + READING_CPUS:g} CPUs in all; the cluster's nodes have "
            f"{have or 'none'}. Lower scaling.cpus_per_worker or scaling.num_workers"
        )
    return found


def _floor(value: float) -> int:
    """Of 2.9999999999999996, which is 1.2 / 0.4, it is 3."""
    return math.floor(value + 1e-9)
