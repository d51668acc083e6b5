"""Laws of a run directory: one driver at a time, and it is free again with the driver's end, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from pais_ray.config import ConfigError
from pais_ray.train import run_directory
from pais_ray.train.run_directory import held

HOLDER = """
import sys, time
from pathlib import Path
from pais_ray.train.run_directory import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_driver_is_refused_and_told_who_has_it(tmp_path, other, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_S", 0.0)
    words = rf"in the hands of another process \(pid {other.pid} on .* since 20"
    with pytest.raises(ConfigError, match=words), held(tmp_path):
        pytest.fail("two drivers")


def test_a_killed_driver_lets_go(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    with held(tmp_path):  # waits for the end of the process
        assert f"pid {os.getpid()} " in (tmp_path / run_directory.LOCK_FILE).read_text()
    with held(tmp_path):  # and again, after an orderly end
        pass


def test_a_file_system_without_locks_holds_nothing_up(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", no_locks)
    with held(tmp_path):
        assert (tmp_path / run_directory.LOCK_FILE).exists()
