"""Files by path or URL: listing, atomic creation, retries, and URLs without credentials."""

import threading

import pytest

from pais_ray.files import storage


def test_other_schemes_go_through_fsspec():
    with storage.create("memory://bucket/a b/c.txt") as file:
        file.write(b"hello")
    assert storage.list_files("memory://bucket/a%20b") == {"c.txt": 5}
    assert storage.read_bytes("memory://bucket/a%20b/c.txt") == b"hello"
    with pytest.raises(ValueError, match="nowhere://x: expected a scheme"):
        storage.list_files("nowhere://x/y")


def test_a_local_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"

    def interrupted() -> None:
        with storage.create(str(path)) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(path.parent.iterdir()) == []
    with storage.create(path.as_uri()) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert (file.size, file.sha256.hexdigest()[:8]) == (5, "5d5766cf")
    assert storage.list_files(str(tmp_path)) == {"folder/file": 5}


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://key:se/cret@bucket/x", "http://user:secret@host/x"])
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(ValueError, match="expected a URL without credentials") as caught:
        storage.check_url(url)
    assert "cret" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "")


def test_only_parameters_that_locate_the_server_are_allowed():
    url = "s3://bucket/x?endpoint_override=host:1&scheme=http&region=eu"
    assert storage.check_url(url) == url
    with pytest.raises(ValueError, match=r"expected only the URL parameters endpoint_override, .* got 'access_key'"):
        storage.check_url("s3://bucket/x?access_key=secret")


def test_a_missing_file_is_not_retried(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("memory://bucket/no such file")


def test_map_in_order_computes_in_advance_and_keeps_the_order():
    last = threading.Event()

    def function(item: int) -> int:
        if item == 0:
            assert last.wait(10), "item 3 is computed while item 0 is"
        elif item == 3:
            last.set()
        return 10 * item

    assert list(storage.map_in_order(function, range(6), threads=2, ahead=4)) == [0, 10, 20, 30, 40, 50]
