"""Joins a Ray cluster or starts a local one."""

import logging
import os

import psutil
import ray

from pais_ray.cluster import ray_compat, token


class ClusterError(ValueError):
    """No usable Ray cluster: the message names the address, the cause and the remedy."""


def connect() -> bool:
    """Joins the cluster of RAY_ADDRESS, or starts a local one.

    Returns whether this call started a cluster, which the caller must then shut down. Raises ClusterError if
    RAY_ADDRESS does not answer.
    """
    if ray.is_initialized():
        return False
    ray_compat.set_cluster_environment()
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}  # worker output arrives through the Monitor
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise ClusterError(
                f"RAY_ADDRESS={address}: no cluster answers at this address ({error}); check that it runs, or unset "
                "RAY_ADDRESS to start one on this machine"
            ) from error
        return False
    token.ensure_token()
    ray_compat.set_local_cluster_environment()
    for library in ("GLOO", "NCCL"):  # else workers connect through the address of the host name
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
    with ray_compat.listening_on_loopback():
        ray.init(address="local", **quiet)
    return True


def loopback_interface() -> str:
    """The name of the loopback interface on this system, such as lo or lo0."""
    interfaces = psutil.net_if_addrs()
    return next((name for name, found in interfaces.items() if any(a.address == "127.0.0.1" for a in found)), "lo")
