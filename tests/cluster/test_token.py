"""The token of a cluster: created once, readable by its owner only, and required for network addresses."""

import os
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.cluster import token


@pytest.fixture
def path(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "deep" / "token"))
    return tmp_path / "deep" / "token"


def test_a_token_is_created_once_and_readable_by_its_owner_only(path):
    assert not token.has_token()
    token.ensure_token()
    made = path.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray creates it
    token.ensure_token()
    assert path.read_text() == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["token"]


def test_no_token_is_created_with_disabled_authentication(path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token.ensure_token()
    assert not path.exists()


def test_ray_reads_the_created_token(path):
    token.ensure_token()
    code = "from ray._raylet import AuthenticationTokenLoader as L; print(L.instance().get_token_for_http_header())"
    env = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert path.read_text() in done.stdout


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("http://10.1.2.3:8265", "no token"),
        ("http://head.example:8265", "no token"),
        ("10.1.2.3:8265", "expected the dashboard's address"),
        ("ray://10.1.2.3:10001", "expected the dashboard's address"),
    ],
)
def test_a_network_address_without_a_token_is_refused(path, address, line):
    done = CliRunner().invoke(main, ["submit", "tables", "runs", "--address", address])
    assert done.exit_code == 2
    assert line in done.stderr
    if "no token" in line:
        assert f"{path} with mode 600" in done.stderr, "the remedy"
