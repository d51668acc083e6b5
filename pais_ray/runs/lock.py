"""TODO docstring."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pais_ray.config.overlays import ConfigError

LOCK_FILE = ".lock"

LOCK_S = 5.0  # for a driver that was killed to be gone


class RunLockedError(ConfigError):
    """Another process has the run directory."""


@contextlib.contextmanager
def lock_run(root: Path) -> Iterator[None]:
    """The directory for one driver: two would write over each other's checkpoints. The system lets go of it with the
    process, however that ends. Raises HeldError where another one has it; a file system without locks has none."""
    root.mkdir(parents=True, exist_ok=True)
    path, until = root / LOCK_FILE, time.monotonic() + LOCK_S
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break
            if time.monotonic() > until:
                file.seek(0)
                raise RunLockedError(
                    f"{root}: in the hands of another process ({file.read() or 'unknown'}); wait for its end or stop "
                    "it, or choose another name"
                )
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()} since {since}".encode())
        yield
