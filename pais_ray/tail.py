"""Following a file of JSON lines, each with its step and the time it was written: metrics.jsonl and its kin."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Tail:
    """New whole lines of a file that grows, and that is written anew where a run goes back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.until = -1.0  # time of the last line that was sent
        self.anew = True  # the last read began at the file's beginning
        self._inode, self._offset = -1, 0
        self._next = (-1, 0)

    def read(self) -> list[Row]:
        """The lines since ``taken``, or all of them where the file was written anew."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self.anew = stat.st_ino != self._inode or stat.st_size < self._offset
                start = 0 if self.anew else self._offset
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._next = (stat.st_ino, start + len(whole))
        return [row for line in whole.splitlines() if (row := _row(line)) is not None]

    def taken(self, rows: list[Row]) -> None:
        """The lines were sent: the next ``read`` goes on after them."""
        self._inode, self._offset = self._next
        self.until = max([self.until, *(row["time"] for row in rows)])


def milliseconds(row: Row) -> int:
    """When a line was written, as MLflow has it."""
    return round(1000 * row["time"])


def _row(line: bytes) -> Row | None:
    """A line of metrics, or None: half a line that a killed writer left, say."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "time"} <= row.keys() else None
