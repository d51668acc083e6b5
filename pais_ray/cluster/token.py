"""The token that Ray clusters ask for: where it lies, and that its owner alone can read it.

Ray reads it itself, from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. It is never put into
parameters, runtime environments or logs.
"""

import os
import secrets
from pathlib import Path

from pais_ray.files.atomic import partial_file

TOKEN_BYTES = 32  # 256 bits, as `ray get-auth-token --generate`


def token_file() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """Whether there is a token to show to a cluster."""
    path = token_file()
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or (path.is_file() and path.stat().st_size > 0)


def ensure_token() -> None:
    """Sees that there is a token for a cluster of our own, readable by its owner alone: Ray makes one on its own,
    which everyone on the machine can read. With RAY_AUTH_MODE=disabled nothing happens."""
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
