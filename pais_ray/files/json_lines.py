"""Following a file of JSON lines, each with its step and the time it was written: metrics.jsonl and its kin."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from pais_ray.files.atomic import replace_text

Row = dict[str, Any]


class JsonlReader:
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


def metric_rows(root: Path, up_to: float = float("inf")) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl until step ``up_to``, without the half line of a killed writer."""
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
    """An append-only file of JSON lines that outlives trouble with storage: what cannot be written waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backlog: list[str] = []
        self.torn = True  # the file may end in half a line: of a writer that was killed
        self.troubled = False
        self.lock = threading.Lock()  # the training and the checkpoint thread tell events

    def append(self, row: dict[str, Any]) -> str | None:
        """Writes the row and all that waited; returns what was wrong where the trouble begins."""
        with self.lock:
            self.backlog.append(json.dumps(row) + "\n")
            error = self._write()
            if error is None:
                return None
            began, self.troubled = not self.troubled, True
            return f"{self.path}: {error}; figures are kept in memory until it can be written again" if began else None

    def flush(self) -> str | None:
        """Writes what waited; returns what is lost if that fails."""
        with self.lock:
            error = self._write() if self.backlog else None
            return None if error is None else f"{self.path}: {error}; {len(self.backlog)} lines are lost"

    def _write(self) -> OSError | None:
        try:
            with self.path.open("a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if self.torn and end:
                    file.seek(end - 1)
                    self.torn = file.read(1) != b"\n"
                text = memoryview(("\n" * (self.torn and end > 0) + "".join(self.backlog)).encode())
                try:
                    while text:
                        text = text[file.write(text) :]
                except OSError:
                    file.truncate(end)  # all of it will be written again; this needs no room
                    raise
        except OSError as error:
            self.torn = True
            return error
        self.backlog, self.torn, self.troubled = [], False, False
        return None

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows of later steps and half-written lines; returns those that stay."""
        with self.lock:
            rows = metric_rows(self.path.parent, step)
            waiting = [line for line in self.backlog if json.loads(line)["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            try:
                replace_text(self.path, text)
            except OSError:  # a full disk, for example; shortening the existing file needs no space
                with self.path.open("r+") as file:
                    file.write(text)
                    file.truncate()
            self.backlog, self.torn, self.troubled = waiting, False, False
            return [*rows, *(json.loads(line) for line in waiting)]
