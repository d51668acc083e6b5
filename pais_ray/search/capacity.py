"""How many trials a cluster can run at once."""

import math
from collections.abc import Mapping, Sequence

from pais_ray.config.overlays import ConfigError


def concurrent_trials(nodes: Sequence[Mapping[str, float]], *, workers: int, cpus: float, use_gpu: bool) -> int:
    """The number of trials that the ``nodes`` (resource -> amount) of a cluster can run at once.

    Each of the ``workers`` of a trial needs ``cpus`` CPUs, and a GPU if ``use_gpu``, on one node. With more trials,
    trials would wait for workers that cannot start. The process of a trial and the reading tasks reserve no CPU.
    Raises ConfigError if not one trial fits.
    """
    places = 0
    for node in nodes:
        fits = _floor(node.get("CPU", 0.0) / cpus)
        places += min(fits, int(node.get("GPU", 0.0))) if use_gpu else fits
    count = places // workers
    if count < 1:
        have = ", ".join(f"{n.get('CPU', 0.0):g} CPUs" + f" {n.get('GPU', 0.0):g} GPUs" * use_gpu for n in nodes)
        raise ConfigError(
            f"not one trial fits: its {workers} workers need {cpus:g} CPUs{' and a GPU' * use_gpu} each; the cluster's "
            f"nodes have {have or 'none'}. Lower scaling.cpus_per_worker or scaling.num_workers; if the cluster grows "
            "on demand, set the number of trials with --max-concurrent"
        )
    return count


def _floor(value: float) -> int:
    """Rounds down, but 2.9999999999999996 (which is 1.2 / 0.4) to 3."""
    return math.floor(value + 1e-9)
