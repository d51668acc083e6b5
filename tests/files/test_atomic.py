"""Atomic writes: readers see the old or the new content, and a failure leaves nothing behind."""

import os
import stat

import pytest

from pais_ray.files import atomic


@pytest.fixture(params=["text", "bytes", "stream"])
def write(request):
    """Writes a string to a path with one of the functions."""

    def stream(path, text):
        with atomic.create_text(str(path)) as file:
            file.write(text)

    return {
        "text": atomic.replace_text,
        "bytes": lambda path, text: atomic.replace_bytes(path, text.encode()),
        "stream": stream,
    }[request.param]


def test_new_content_replaces_the_old(write, tmp_path):
    path = tmp_path / "ü.json"
    for text in ("old", "new ü", ""):
        write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["ü.json"]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_partial_file(write, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, "old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "no such folder" / "file"
    with pytest.raises(OSError, match="no such folder/file") as caught:
        atomic.replace_text(path, "x")
    assert caught.value.filename == str(path)


def test_the_longest_file_name_can_be_written(write, tmp_path):
    path = tmp_path / ("x" * 255)
    write(path, "whole")
    assert path.read_text() == "whole"


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    def interrupted() -> None:
        with atomic.create_text(str(tmp_path / "folder" / "file")) as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert os.listdir(tmp_path / "folder") == []


def test_a_link_is_followed(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic.create_text(str(tmp_path / "link")) as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to_directly(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with atomic.create_text(str(path)) as file:
            file.write("text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
