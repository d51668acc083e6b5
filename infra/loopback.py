"""Runs a command in a network namespace that has nothing but loopback: `python infra/loopback.py CMD ARGS...`

Ray listens beyond loopback wherever it finds another interface; here it finds none. Where namespaces are not
allowed the command runs as it is, but in CI (PAIS_RAY_CI set) that is an error.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h


def enter() -> None:
    """Moves this process into a namespace of its own with ``lo`` up. Raises OSError where that is not allowed."""
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET if uid == 0 else CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        fcntl.ioctl(channel, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def allowed() -> bool:
    """Whether ``enter`` works here, tried in a child: half a namespace cannot be left again."""
    child = os.fork()
    if child == 0:
        try:
            enter()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: loopback.py COMMAND [ARGUMENT...]")
    if allowed():
        enter()
        os.environ["PAIS_RAY_LOOPBACK_ONLY"] = "1"
    elif os.environ.get("PAIS_RAY_CI"):
        sys.exit("loopback.py: no network namespace here; CI must run the tests inside one")
    else:
        print("loopback.py: no network namespace here; going on without", file=sys.stderr)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
