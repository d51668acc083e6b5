"""The token that a Ray cluster requires: its location, and its permissions.

Ray reads it from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH or from ~/.ray/auth_token. It is never passed in
parameters, runtime environments or logs.
"""

import os
import secrets
from pathlib import Path

from pais_ray.files.atomic import partial_file

TOKEN_BYTES = 32  # 256 bits, as `ray get-auth-token --generate`


def token_file() -> Path:
    """The file that Ray reads the token from."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """Whether there is a token."""
    path = token_file()
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or (path.is_file() and path.stat().st_size > 0)


def ensure_token() -> None:
    """Creates a token for a local cluster if there is none, and makes it readable by its owner only.

    Ray would create one that every user of the machine can read. Does nothing with RAY_AUTH_MODE=disabled.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_file()
    if not has_token():
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            partial_file(path) as partial,
            open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(TOKEN_BYTES))
    elif path.stat().st_uid == os.getuid():
        path.chmod(0o600)
