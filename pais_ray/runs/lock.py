"""The lock of a run directory: one driver at a time."""

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
LOCK_TIMEOUT_S = 5.0  # until a killed driver has released the lock


class RunLockedError(ConfigError):
    """Another process uses the run directory."""


@contextlib.contextmanager
def lock_run(root: Path) -> Iterator[None]:
    """Lock the run directory for the duration of the block: two drivers would overwrite each other's checkpoints.

    The operating system releases the lock when the process ends, however it ends. On a file system without locks
    nothing is locked. Raises RunLockedError if another process holds the lock.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, deadline = root / LOCK_FILE, time.monotonic() + LOCK_TIMEOUT_S
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # no locks here
            if time.monotonic() > deadline:
                file.seek(0)
                raise RunLockedError(
                    f"{root}: locked by another process ({file.read() or 'unknown'}); wait until it ends, stop it, or "
                    "choose another run.name"
                )
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # on a full disk the lock still holds
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()} since {since}".encode())
        yield
