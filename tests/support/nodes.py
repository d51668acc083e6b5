"""A Ray cluster of several nodes on this machine. Each node has its own processes, so that one node can be killed."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from pais_ray.cluster import token

RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h: ends the cluster if the tests are killed
MEMORY = f"--object-store-memory={200 * 2**20}"


@dataclass
class Nodes:
    """The processes of a cluster, the head node first; ``address`` is that of the dashboard."""

    folder: Path
    env: dict[str, str]
    gcs: str
    address: str
    running: list[subprocess.Popen]

    def add(self, *options: str) -> None:
        """Start a node with the options of `ray start`."""
        log = (self.folder / f"node{len(self.running)}.log").open("w")
        command = [*RAY, "start", "--block", "--disable-usage-stats", *options]
        started = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
            preexec_fn=partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip
        self.running.append(started)

    def join(self, cpus: int) -> None:
        """Add a node with ``cpus`` CPUs and wait until the cluster counts it."""
        for _ in range(3):  # on a busy machine Ray's own timeouts may expire
            ports = zip(("dashboard-agent-listen", "metrics-export"), free_ports(2), strict=True)
            own = [f"--{name}-port={port}" for name, port in ports]
            self.add(f"--address={self.gcs}", f"--num-cpus={cpus}", MEMORY, *own)
            self.wait()
            if self.running[-1].poll() is None:
                return
        raise AssertionError((self.folder / f"node{len(self.running) - 1}.log").read_text())

    def kill(self, index: int) -> None:
        """Kill all processes of a node at once, as when a machine loses power."""
        victims = processes(self.running[index])
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # no process may react to the end of another
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running[index].wait()

    def wait(self) -> None:
        """Wait until the cluster counts every running node."""
        while self.alive() < sum(node.poll() is None for node in self.running):
            time.sleep(0.2)

    def node_id(self, index: int) -> str:
        """Ray's id of a node, from the command line of its raylet."""
        words = [word for process in processes(self.running[index]) for word in command_line(process)]
        return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))

    def alive(self) -> int:
        """The number of nodes that the cluster counts."""
        done = subprocess.run(
            [*RAY, "status", "--address", self.gcs], env=self.env, capture_output=True, text=True, check=False
        )
        active = done.stdout.partition("Active:")[2].partition("Pending:")[0]
        return active.count("node_")


def processes(root: subprocess.Popen) -> list[psutil.Process]:
    """The process and its descendants; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(root.pid)
        return [process, *process.children(recursive=True)]
    return []


def command_line(process: psutil.Process) -> list[str]:
    """The arguments of a process; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):  # zombies too
        return process.cmdline()
    return []


def free_ports(number: int) -> list[int]:
    """Different TCP ports of the loopback interface that are free now."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


@contextlib.contextmanager
def nodes(folder: Path, cpus: list[int], **more: str) -> Iterator[Nodes]:
    """Start a cluster with the given CPUs per node, the head first, with its own token; ``more`` is environment."""
    gcs_port, dashboard_port, agent_port, client_port = free_ports(4)
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    env["RAY_num_workers_soft_limit"] = "4"  # as on a local cluster: reading tasks find an idle process
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", **more}  # jobs run its `python`
    create_token(env)
    # The paths of the head's socket files may have at most 107 characters.
    cluster = Nodes(folder, env, f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{dashboard_port}", [])
    cluster.add(
        *("--head", f"--port={gcs_port}", f"--num-cpus={cpus[0]}", MEMORY, "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"),
        *(f"--ray-client-server-port={client_port}", f"--temp-dir={folder}/ray"),
    )
    try:
        cluster.wait()
        assert cluster.running[0].poll() is None, (folder / "node0.log").read_text()
        for count in cpus[1:]:  # one after the other, because nodes that start together may use the same socket
            cluster.join(count)
        yield cluster
    finally:
        for index in reversed(range(len(cluster.running))):
            cluster.kill(index)


def create_token(env: dict[str, str]) -> None:
    """Create the token file that ``env`` names."""
    before = os.environ.get("RAY_AUTH_TOKEN_PATH")
    os.environ["RAY_AUTH_TOKEN_PATH"] = env["RAY_AUTH_TOKEN_PATH"]
    try:
        token.ensure_token()
    finally:
        if before is None:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
        else:
            os.environ["RAY_AUTH_TOKEN_PATH"] = before
