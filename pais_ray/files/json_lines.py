"""Files of JSON lines such as metrics.jsonl and events.jsonl: each line has its step and the time it was written."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from pais_ray.files.atomic import replace_text

Row = dict[str, Any]


class JsonlReader:
    """Reads the new complete lines of a file that grows, and that is replaced when a run returns to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_time = -1.0  # time of the newest line that was processed
        self.restarted = True  # whether the last read began at the beginning of the file
        self._inode, self._offset = -1, 0
        self._next = (-1, 0)

    def read(self) -> list[Row]:
        """Returns the lines since the last ``commit``, or all lines if the file was replaced."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                self.restarted = stat.st_ino != self._inode or stat.st_size < self._offset
                start = 0 if self.restarted else self._offset
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._next = (stat.st_ino, start + len(complete))
        return [row for line in complete.splitlines() if (row := _row(line)) is not None]

    def commit(self, rows: list[Row]) -> None:
        """Marks the rows of the last ``read`` as processed: the next ``read`` continues after them."""
        self._inode, self._offset = self._next
        self.last_time = max([self.last_time, *(row["time"] for row in rows)])


def milliseconds(row: Row) -> int:
    """Returns the time at which a line was written, in ms, the unit of MLflow."""
    return round(1000 * row["time"])


def _row(line: bytes) -> Row | None:
    """Parses a line; None if it is invalid, for example an incomplete line of a killed writer."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "time"} <= row.keys() else None


def metric_rows(root: Path, up_to: float = float("inf")) -> list[Row]:
    """Returns the rows of metrics.jsonl in a run directory up to step ``up_to``, without incomplete lines."""
    path = root / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= up_to:
            rows.append(row)
    return rows


class JsonlWriter:
    """Appends JSON lines to a file. Lines that cannot be written are kept in memory and written later. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backlog: list[str] = []  # lines that are not written yet
        self._incomplete = True  # whether the file may end in an incomplete line, for example of a killed writer
        self._failing = False  # whether the last write failed
        self._lock = threading.Lock()  # the training and the checkpoint thread both append

    def append(self, row: Row) -> str | None:
        """Writes the backlog and the row. Returns a message if writing fails and did not fail before."""
        with self._lock:
            self.backlog.append(json.dumps(row) + "\n")
            error = self._write()
            if error is None:
                return None
            is_first, self._failing = not self._failing, True
            message = f"{self.path}: {error}; lines are kept in memory until the file can be written again"
            return message if is_first else None

    def flush(self) -> str | None:
        """Writes the backlog. Returns a message with the number of lost lines if that fails."""
        with self._lock:
            error = self._write() if self.backlog else None
            return None if error is None else f"{self.path}: {error}; {len(self.backlog)} lines are lost"

    def _write(self) -> OSError | None:
        try:
            with self.path.open("a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if self._incomplete and end:
                    file.seek(end - 1)
                    self._incomplete = file.read(1) != b"\n"
                text = memoryview(("\n" * (self._incomplete and end > 0) + "".join(self.backlog)).encode())
                try:
                    while text:
                        text = text[file.write(text) :]
                except OSError:
                    file.truncate(end)  # needs no disk space; the whole backlog is written again later
                    raise
        except OSError as error:
            self._incomplete = True
            return error
        self.backlog, self._incomplete, self._failing = [], False, False
        return None

    def rewind(self, step: int) -> list[Row]:
        """Removes the rows of later steps and incomplete lines; returns the remaining rows."""
        with self._lock:
            rows = metric_rows(self.path.parent, step)
            backlog = [line for line in self.backlog if json.loads(line)["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            try:
                replace_text(self.path, text)
            except OSError:  # a full disk, for example; shortening the existing file needs no space
                with self.path.open("r+") as file:
                    file.write(text)
                    file.truncate()
            self.backlog, self._incomplete, self._failing = backlog, False, False
            return [*rows, *(json.loads(line) for line in backlog)]
