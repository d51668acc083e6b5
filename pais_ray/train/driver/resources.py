"""TODO docstring."""

import os

import ray

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config


def worker_resources(config: Config, *, ours: bool) -> tuple[float, int]:
    """(CPUs to reserve a worker, torch threads a worker). Reading tasks reserve none, but need some: workers take at
    most what leaves one CPU, half a CPU each on two.

    Raises ConfigError where a cluster of ``ours`` is too small. One that was joined may grow, and Ray waits for it.
    """
    workers, total = config.scaling.most, ray.cluster_resources().get("CPU", 1.0)
    cpus = config.scaling.cpus_per_worker
    if cpus is None:
        cpus = min(1.0, max(0.1, (total - 1.0) / workers if total > 1 else 0.5 / workers))
        cpus = float(f"{cpus:.2f}")
    lacking = lack_of_room(config, cpus)
    if lacking is not None and not ours:
        cpus = config.scaling.cpus_per_worker or 1.0  # what is there now says nothing of what will be
    elif lacking is not None:
        raise ConfigError(
            f"scaling.num_workers: {lacking}; lower scaling.num_workers or scaling.cpus_per_worker, "
            "or set scaling.use_gpu=false"
        )
    nodes = max(1, len([n for n in ray.nodes() if n["Alive"]]))
    # Ray's count knows of a container's limits, the system's of this process's.
    cores = min(int(total / nodes) or 1, len(os.sched_getaffinity(0)))
    return cpus, config.train.threads_per_worker or max(1, cores // -(-workers // nodes))


def lack_of_room(config: Config, cpus: float) -> str | None:
    """What the cluster would need for the least number of workers and does not have."""
    least, there = config.scaling.least, ray.cluster_resources()
    need = {"CPU": least * cpus, **({"GPU": float(least)} if config.scaling.use_gpu else {})}
    missing = [f"{there.get(k, 0.0):g} of {v:g} {k}s" for k, v in need.items() if there.get(k, 0.0) < v]
    if not missing:
        return None
    return (
        f"{least} workers of {cpus:g} CPUs{' and a GPU' if config.scaling.use_gpu else ''}; "
        f"the cluster has {' and '.join(missing)}"
    )
