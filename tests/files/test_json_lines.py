"""Laws of the log: no line is lost or doubled, whoever writes and whatever storage does, and what is undone goes."""

import errno
import json
import os
import resource
import signal
import threading

import pytest

from pais_ray.files import json_lines
from pais_ray.files.json_lines import JsonlWriter, metric_rows


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def lines(tmp_path):
    return JsonlWriter(tmp_path / "metrics.jsonl")


def test_two_threads_lose_and_double_nothing(lines):
    def write(first):
        for step in range(first, first + 500):
            lines.append({"step": step})

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(lines.path)) == list(range(1000))


def test_what_could_not_be_written_waits_and_is_flushed(lines, tmp_path):
    lines.path.mkdir()  # in the way
    assert "kept in memory" in lines.append({"step": 1})
    assert lines.append({"step": 2}) is None, "said once"
    assert "2 lines are lost" in lines.flush()
    lines.path.rmdir()
    assert lines.flush() is None
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 2]
    assert lines.flush() is None


def test_a_disk_with_room_for_some_of_what_waits_doubles_nothing(lines):
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


def test_half_a_line_of_a_killed_writer_spoils_no_other(lines, tmp_path):
    lines.path.write_text('{"step": 1}\n{"step": 2, "lo')
    lines.append({"step": 3})
    assert [row["step"] for row in metric_rows(tmp_path)] == [1, 3]


@pytest.mark.parametrize("full", [False, True])
def test_going_back_drops_later_lines_and_keeps_those_that_wait(lines, monkeypatch, full):
    for step in (1, 4, 6, 4):  # scores of step 4 come after step 6
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 5, "lo')
    lines.backlog = [json.dumps({"step": step}) + "\n" for step in (5, 7)]
    if full:
        monkeypatch.setattr(json_lines.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert [row["step"] for row in lines.rewind(5)] == [1, 4, 4, 5]
    assert os.listdir(lines.path.parent) == ["metrics.jsonl"]
    assert steps(lines.path) == [1, 4, 4]
    lines.append({"step": 6})
    assert steps(lines.path) == [1, 4, 4, 5, 6]
