"""The CPUs and threads of a worker, and what the cluster lacks to run the least number of workers."""

import os

import ray

from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config


def worker_resources(config: Config, *, is_own_cluster: bool) -> tuple[float, int]:
    """(CPUs to reserve per worker, torch threads per worker).

    Reading tasks reserve no CPU but need some, so workers reserve at most what leaves one CPU free: half a CPU each
    for two workers on two CPUs. Raises ConfigError if a cluster that this process started is too small. A cluster
    that was joined may grow, and Ray waits for that.
    """
    workers, total = config.scaling.most, ray.cluster_resources().get("CPU", 1.0)
    cpus = config.scaling.cpus_per_worker
    if cpus is None:
        cpus = min(1.0, max(0.1, (total - 1.0) / workers if total > 1 else 0.5 / workers))
        cpus = float(f"{cpus:.2f}")
    shortage = find_shortage(config, cpus)
    if shortage is not None and not is_own_cluster:
        cpus = config.scaling.cpus_per_worker or 1.0  # the present size does not predict the size after growth
    elif shortage is not None:
        raise ConfigError(
            f"scaling.num_workers: {shortage}; lower scaling.num_workers or scaling.cpus_per_worker, "
            "or set scaling.use_gpu=false"
        )
    nodes = max(1, len([n for n in ray.nodes() if n["Alive"]]))
    # Ray's count respects the limits of a container, the system's count the affinity of this process.
    cores = min(int(total / nodes) or 1, len(os.sched_getaffinity(0)))
    return cpus, config.train.threads_per_worker or max(1, cores // -(-workers // nodes))


def find_shortage(config: Config, cpus: float) -> str | None:
    """What the least number of workers needs and the cluster does not have, or None."""
    least, available = config.scaling.least, ray.cluster_resources()
    needed = {"CPU": least * cpus, **({"GPU": float(least)} if config.scaling.use_gpu else {})}
    missing = [f"{available.get(k, 0.0):g} of {v:g} {k}s" for k, v in needed.items() if available.get(k, 0.0) < v]
    if not missing:
        return None
    return (
        f"{least} workers of {cpus:g} CPUs{' and a GPU' if config.scaling.use_gpu else ''}; "
        f"the cluster has {' and '.join(missing)}"
    )
