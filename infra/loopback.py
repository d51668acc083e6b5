"""Runs a command in a network namespace that has only the loopback interface: `python infra/loopback.py CMD ARGS...`

Ray listens on other interfaces if it finds any. If network namespaces are not permitted, the command runs without
one; in CI (PAIS_RAY_CI is set) that is an error.
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
    """Moves this process into a new namespace with ``lo`` up. Raises OSError if that is not permitted."""
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


def is_permitted() -> bool:
    """Whether ``enter`` works, tried in a child process: a partly entered namespace cannot be left."""
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
    if is_permitted():
        enter()
        os.environ["PAIS_RAY_LOOPBACK_ONLY"] = "1"
    elif os.environ.get("PAIS_RAY_CI"):
        sys.exit("loopback.py: network namespaces are not permitted; CI must run the tests inside one")
    else:
        print("loopback.py: network namespaces are not permitted; running without one", file=sys.stderr)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
