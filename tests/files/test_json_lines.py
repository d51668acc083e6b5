"""JSON lines: no line is lost or duplicated by threads, failing storage or killed writers; rewinding removes lines."""

import errno
import json
import os
import resource
import signal
import threading

import pytest

from pais_ray.files import atomic
from pais_ray.files.json_lines import JsonlReader, JsonlWriter, metric_rows


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def lines(tmp_path):
    return JsonlWriter(tmp_path / "metrics.jsonl")


def test_two_threads_lose_and_duplicate_no_line(lines):
    def write(first):
        for step in range(first, first + 500):
            lines.append({"step": step})

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(lines.path)) == list(range(1000))


def test_lines_that_cannot_be_written_are_kept_and_flushed(lines, tmp_path):
    lines.path.mkdir()  # a directory instead of the file: writing fails
    assert "kept in memory" in lines.append({"step": 1})
    assert lines.append({"step": 2}) is None, "the message is returned once"
    assert "2 lines are lost" in lines.flush()
    lines.path.rmdir()
    assert lines.flush() is None
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 2]
    assert lines.flush() is None


def test_a_disk_with_space_for_a_part_of_the_backlog_duplicates_no_line(lines):
    lines.append({"step": 0})
    size = lines.path.stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        for step in (1, 2, 3):
            lines.append({"step": step})
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(3.5 * size), before[1]))
        lines.append({"step": 4})
        assert steps(lines.path) == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    lines.append({"step": 5})
    assert steps(lines.path) == [0, 1, 2, 3, 4, 5]


def test_an_incomplete_line_of_a_killed_writer_damages_no_other(lines, tmp_path):
    lines.path.write_text('{"step": 1}\n{"step": 2, "lo')
    lines.append({"step": 3})
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 3]


@pytest.mark.parametrize("full", [False, True])
def test_rewinding_removes_later_lines_and_keeps_the_backlog(lines, monkeypatch, full):
    for step in (1, 4, 6, 4):  # scores of step 4 come after step 6
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 5, "lo')
    lines.backlog = [json.dumps({"step": step}) + "\n" for step in (5, 7)]
    if full:
        monkeypatch.setattr(atomic.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert [row["step"] for row in lines.rewind(5)] == [1, 4, 4, 5]
    assert os.listdir(lines.path.parent) == ["metrics.jsonl"]
    assert steps(lines.path) == [1, 4, 4]
    lines.append({"step": 6})
    assert steps(lines.path) == [1, 4, 4, 5, 6]


def test_a_reader_returns_new_complete_lines_until_they_are_committed(lines):
    reader = JsonlReader(lines.path)
    assert reader.read() == []
    lines.append({"step": 1, "time": 1.0})
    with lines.path.open("a") as file:
        file.write('{"step": 2, ')
    assert [row["step"] for row in reader.read()] == [1]
    rows = reader.read()
    assert [row["step"] for row in rows] == [1], "not committed yet"
    reader.commit(rows)
    assert (reader.read(), reader.restarted, reader.last_time) == ([], False, 1.0)
    with lines.path.open("a") as file:
        file.write('"time": 2.0}\n')
    assert [row["step"] for row in reader.read()] == [2]


def test_a_reader_reads_a_replaced_file_from_the_beginning(lines):
    for step in (1, 2, 3):
        lines.append({"step": step, "time": float(step)})
    reader = JsonlReader(lines.path)
    reader.commit(reader.read())
    lines.rewind(1)
    lines.append({"step": 2, "time": 4.0})
    assert [(row["step"], row["time"]) for row in reader.read()] == [(1, 1.0), (2, 4.0)]
    assert reader.restarted


def test_metrics_are_read_without_the_incomplete_line_of_a_killed_writer(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 2]
    assert [row["step"] for row in metric_rows(tmp_path, up_to=1)] == [1]
