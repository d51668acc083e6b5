"""Printing never ends a computation."""

import contextlib
import os

from pais_ray.files import console


def test_output_that_cannot_be_written_is_dropped(monkeypatch):
    """A log file on a full disk, a closed pipe, a terminal that lacks a letter."""
    for name in ("/dev/full", os.devnull):
        with open(name, "w", encoding="ascii") as out:
            monkeypatch.setattr(console.sys, "stdout", out)
            console.echo("step 10: Größe")
            monkeypatch.undo()
            with contextlib.suppress(OSError):
                out.close()
        monkeypatch.setattr(console.sys, "stdout", out)
        console.echo("closed")
        monkeypatch.undo()
