"""A Ray cluster of several nodes on this machine: each its own processes, so that one can be killed whole."""

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

PR_SET_PDEATHSIG = 1  # linux/prctl.h: killed tests leave no cluster behind
MEMORY = f"--object-store-memory={200 * 2**20}"


@dataclass
class Nodes:
    """A head and workers; ``address`` is the dashboard's."""

    folder: Path
    env: dict[str, str]
    gcs: str
    address: str
    running: list[subprocess.Popen]

    def add(self, *options: str) -> None:
        log = (self.folder / f"node{len(self.running)}.log").open("w")
        command = [*RAY, "start", "--block", "--disable-usage-stats", *options]
        started = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
            preexec_fn=partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip
        self.running.append(started)

    def join(self, cpus: int) -> None:
        """One more node."""
        for _ in range(3):  # on a busy machine Ray's own deadlines may pass
            ports = zip(("dashboard-agent-listen", "metrics-export"), free_ports(2), strict=True)
            own = [f"--{name}-port={port}" for name, port in ports]
            self.add(f"--address={self.gcs}", f"--num-cpus={cpus}", MEMORY, *own)
            self.wait()
            if self.running[-1].poll() is None:
                return
        raise AssertionError((self.folder / f"node{len(self.running) - 1}.log").read_text())

    def kill(self, index: int) -> None:
        """The whole node at once, as when a machine loses power."""
        doomed = processes(self.running[index])
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # nobody shall see the others go
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running[index].wait()

    def wait(self) -> None:
        """Until the cluster counts every node that has not ended."""
        while self.alive() < sum(node.poll() is None for node in self.running):
            time.sleep(0.2)

    def node_id(self, index: int) -> str:
        """Ray's name of a node, from the command line of its raylet."""
        words = [word for process in processes(self.running[index]) for word in command_line(process)]
        return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))

    def alive(self) -> int:
        """How many nodes the cluster counts."""
        done = subprocess.run(
            [*RAY, "status", "--address", self.gcs], env=self.env, capture_output=True, text=True, check=False
        )
        active = done.stdout.partition("Active:")[2].partition("Pending:")[0]
        return active.count("node_")


def processes(root: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(root.pid)
        return [process, *process.children(recursive=True)]
    return []


def command_line(process: psutil.Process) -> list[str]:
    """Its words; none once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):  # zombies too
        return process.cmdline()
    return []


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


@contextlib.contextmanager
def nodes(folder: Path, cpus: list[int], **more: str) -> Iterator[Nodes]:
    """A cluster with ``cpus`` per node, the head first, behind a token of its own; ``more`` is environment."""
    gcs_port, dashboard_port, agent_port, client_port = free_ports(4)
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    env["RAY_num_workers_soft_limit"] = "4"  # as on a local cluster: reading tasks find a process that is there
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", **more}  # jobs run its `python`
    with_token(env)
    # Beside the head's socket files; their paths have at most 107 characters.
    cluster = Nodes(folder, env, f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{dashboard_port}", [])
    cluster.add(
        *("--head", f"--port={gcs_port}", f"--num-cpus={cpus[0]}", MEMORY, "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"),
        *(f"--ray-client-server-port={client_port}", f"--temp-dir={folder}/ray"),
    )
    try:
        cluster.wait()
        assert cluster.running[0].poll() is None, (folder / "node0.log").read_text()
        for count in cpus[1:]:  # one after the other: nodes that start together may take the same socket
            cluster.join(count)
        yield cluster
    finally:
        for index in reversed(range(len(cluster.running))):
            cluster.kill(index)


def with_token(env: dict[str, str]) -> None:
    before = os.environ.get("RAY_AUTH_TOKEN_PATH")
    os.environ["RAY_AUTH_TOKEN_PATH"] = env["RAY_AUTH_TOKEN_PATH"]
    try:
        token.ensure_token()
    finally:
        if before is None:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
        else:
            os.environ["RAY_AUTH_TOKEN_PATH"] = before
