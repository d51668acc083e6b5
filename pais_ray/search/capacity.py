"""How many trials a cluster holds at once. Tune counts a trial's own process alone, not the workers it starts."""

import math
from collections.abc import Mapping, Sequence

from pais_ray.overlays import ConfigError


def concurrent_trials(nodes: Sequence[Mapping[str, float]], *, workers: int, cpus: float, use_gpu: bool) -> int:
    """The most trials that all of a cluster's ``nodes`` (resource -> amount) can run at once: each worker has a place
    of ``cpus`` CPUs (and a GPU). With more, trials would wait for workers that cannot start. A trial's own process and
    the tasks that read images take no CPU. Raises ConfigError below one."""
    places = 0
    for node in nodes:
        fits = _floor(node.get("CPU", 0.0) / cpus)
        places += min(fits, int(node.get("GPU", 0.0))) if use_gpu else fits
    found = places // workers
    if found < 1:
        have = ", ".join(f"{n.get('CPU', 0.0):g} CPUs" + f" {n.get('GPU', 0.0):g} GPUs" * use_gpu for n in nodes)
        raise ConfigError(
            f"not one trial fits: its {workers} workers need {cpus:g} CPUs{' and a GPU' * use_gpu} each; the cluster's "
            f"nodes have {have or 'none'}. Lower scaling.cpus_per_worker or scaling.num_workers; where "
            "the cluster grows by itself, say how many trials at once with --max-concurrent"
        )
    return found


def _floor(value: float) -> int:
    """Of 2.9999999999999996, which is 1.2 / 0.4, it is 3."""
    return math.floor(value + 1e-9)
