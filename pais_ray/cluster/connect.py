"""The cluster of a run: joined or started, what a worker gets of it, what it lacks."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray._private import ray_constants

from pais_ray.cluster import token


class ClusterError(ValueError):
    """No usable Ray cluster: the message names the address, the cause and the remedy."""


def connect() -> bool:
    """Joins the cluster of RAY_ADDRESS, or starts a local one. Returns whether it is ours to stop."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the user's relative paths
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead worker is noticed sooner
    # Ray's head keeps what it knows of past tasks, 100,000 of them: 20 to 100 MiB an hour of a run, for a day, that
    # nobody looks up.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "1000")
    # Ray keeps as many idle processes as CPUs are free. Where workers have them all, each reading or scoring task would
    # wait seconds for a process of its own.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(4, os.cpu_count() or 1)))
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}  # what workers say comes through the Monitor
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ClusterError(
                f"RAY_ADDRESS={address}: no cluster answers there ({error}); see that it runs, or unset RAY_ADDRESS "
                "for one on this machine"
            ) from error
        return False
    token.ensure_token()
    # Nobody scrapes a local cluster, and every data set of the stream would leave a hundred gauges in Ray's processes.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    for library in ("GLOO", "NCCL"):  # whose workers would talk over the address of the machine's name
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
    with listening_on_loopback():
        ray.init(address="local", **quiet)
    return True


def loopback_interface() -> str:
    """What this system calls it: lo, lo0."""
    interfaces = psutil.net_if_addrs()
    return next((name for name, found in interfaces.items() if any(a.address == "127.0.0.1" for a in found)), "lo")


@contextmanager
def listening_on_loopback() -> Iterator[None]:
    """A cluster started within listens on loopback alone: Ray's own way where it does not run over several machines,
    a switch that it reads as it is imported, and in the processes that it starts."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


def draining_nodes() -> dict[str, int]:
    """Nodes with a notice of their end -> its deadline, as Ray Train's own watcher asks for them."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found
