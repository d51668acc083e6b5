"""Progress output on the console."""

import contextlib
import sys


def echo(text: str) -> None:
    """Prints a line immediately and ignores failures: a closed pipe or a full disk must not end a long computation.
    Characters that the console's encoding lacks are replaced."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: stdout is closed
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
