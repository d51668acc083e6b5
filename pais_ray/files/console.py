"""TODO docstring."""

import contextlib
import sys


def say(text: str) -> None:
    """Prints a line; where nobody reads it any more, or the disk that it goes to is full, the work goes on without."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: closed
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
