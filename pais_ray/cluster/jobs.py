"""A program of pipelines/ as a job on a Ray cluster: a small working_dir, the job, its log, its exit status."""

import asyncio
import io
import logging
import os
import shlex
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pais_ray.cluster import token

PACKAGE = Path(__file__).parents[1]
UPLOAD_LIMIT = 100 * 2**20  # bytes of one request to Ray's dashboard (its DASHBOARD_CLIENT_MAX_SIZE)
LARGEST = 5  # files named where the limit is passed
RECONNECT_S = 2.0  # between two attempts to go on reading the log
LOST_AFTER = 30  # such attempts without an answer: a minute
# `ray job stop` sends what Ctrl-C sends, and waits: training stops after its step, with a checkpoint.
STOP_GENTLY = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "300"}


def pipelines() -> dict[str, Path]:
    """The programs by name: of the checkout, or of the installed package."""
    folder = next(d for d in (PACKAGE.parent / "pipelines", PACKAGE / "pipelines") if d.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def contents(include: Sequence[Path] = ()) -> dict[str, Path]:
    """Name in the working_dir -> file: package, pipelines, configs and what the user adds; nothing hidden. What lies
    in the current folder keeps its place there, other things stand beside it. Raises ValueError where something named
    adds no file."""
    found = {f"pipelines/{path.name}": path for path in pipelines().values()}
    code = [PACKAGE, *(folder for folder in [PACKAGE.parent / "configs"] if folder.is_dir())]
    for folder in code:
        for pattern in ("*.py", "*.yaml"):
            found |= {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob(pattern)}
    for given in include:
        place = Path(os.path.normpath(given.absolute()))  # ../x has no name below any folder
        base = Path.cwd() if place.is_relative_to(Path.cwd()) else place.parent
        files = {p.relative_to(base): p for p in ([place] if place.is_file() else sorted(place.rglob("*")))}
        seen = {n.as_posix(): p for n, p in files.items() if p.is_file() and not any(map(is_hidden, n.parts))}
        if not seen:
            raise ValueError(
                f"{given}: no file of it would be sent, as names that begin with a dot and __pycache__ stay here; "
                "rename it, or leave it out"
            )
        found |= seen
    return found


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def local_files(words: Sequence[str]) -> list[Path]:
    """The YAML files of this machine that ``words`` name by relative paths. Raises ValueError for one that the job
    would not find by that name."""
    paths = [Path(w) for w in words if w.endswith((".yaml", ".yml")) and not os.path.isabs(w) and os.path.isfile(w)]
    for path in paths:
        if os.path.normpath(path).startswith(os.pardir + os.sep):
            raise ValueError(
                f"{path}: lies above the current folder, and a job has no folder above its own; "
                f"submit from {path.parent.resolve()}, or copy it here"
            )
    return paths


def pack(files: Mapping[str, Path]) -> bytes:
    """A zip archive of ``files``, the same bytes for the same files, so that Ray uploads it once. Raises ValueError
    above Ray's limit, naming what is large."""
    buffer = io.BytesIO()
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name].read_bytes())
            sizes[name] = entry.compress_size
    data = buffer.getvalue()
    if len(data) > UPLOAD_LIMIT:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:LARGEST]
        raise ValueError(
            f"working_dir: {mib(len(data))} packed, and Ray takes {mib(UPLOAD_LIMIT)}; include less, data belong on "
            f"storage that the nodes see. The largest: {', '.join(f'{n} ({mib(sizes[n])})' for n in largest)}"
        )
    return data


def check_address(address: str) -> None:
    """Raises ValueError for an open network address without a token: whoever reaches one runs code there."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--address {address}: expected the dashboard's address, http://HOST:8265")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not token.has_token():
        raise ValueError(
            f"--address {address}: no token, and without one anybody who reaches that address runs code on it; start "
            f"the cluster with RAY_AUTH_MODE=token and {remedy()}"
        )


def remedy() -> str:
    return (
        f"put its token (`ray get-auth-token` on the head) into {token.token_file()} with mode 600, or name the file "
        "in RAY_AUTH_TOKEN_PATH"
    )


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at ``address``, with the token where there is one."""
    check_address(address)
    if token.has_token():
        token.ensure_token()
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own clients show it only then
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # else they would win over the address that was checked
        os.environ.pop(name, None)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(f"--address {address}: {str(error).splitlines()[0]}; {remedy()}") from error
    for name in ("job.sdk", "dashboard_sdk"):  # its uploads and connections are no news
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    return client


def submit(
    client: JobSubmissionClient, pipeline: str, words: Sequence[str], archive: bytes, num_gpus: float | None = None
) -> str:
    """Uploads the working_dir and starts the job; its id. ``num_gpus`` are for the program itself."""
    with tempfile.TemporaryDirectory() as folder:
        working_dir = Path(folder) / "working_dir.zip"
        working_dir.write_bytes(archive)
        job: str = client.submit_job(
            entrypoint=shlex.join(["python", f"pipelines/{pipeline}.py", *words]),
            runtime_env={"working_dir": str(working_dir), "env_vars": STOP_GENTLY},
            metadata={"pipeline": pipeline},
            entrypoint_num_gpus=num_gpus,
        )
    return job


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's log until it ends, across lost connections; the exit status: 0, 2 for wrong input, else 1."""
    shown = Shown()
    lost = 0
    while True:
        try:
            asyncio.run(shown.tail(client, job))
            info = client.get_job_info(job)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            lost += 1
            if lost > LOST_AFTER:
                raise ConnectionError(f"the cluster does not answer; the job may go on ({error})") from error
            time.sleep(RECONNECT_S)
            continue
        if info.status.is_terminal():
            return outcome(job, info, logged=shown.before > 0)
        lost = 0
        time.sleep(RECONNECT_S)


class Shown:
    """How much of a log is on the screen: each new connection begins at the log's first line."""

    def __init__(self) -> None:
        self.before = 0  # characters

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        at = 0
        async for text in client.tail_job_logs(job):
            print(text[max(0, self.before - at) :], end="", flush=True)
            at += len(text)
            self.before = max(self.before, at)


def outcome(job: str, info: Any, *, logged: bool) -> int:
    """Says how the job ended, and the cause where it failed."""
    if info.status == JobStatus.SUCCEEDED:
        print(f"job {job} succeeded")
        return 0
    cause, _, last_lines = (info.message or "").partition(", last available logs")
    print(f"job {job} {info.status.value.lower()}: {cause}")
    if last_lines and not logged:
        print(last_lines.partition("\n")[2])
    return 2 if info.driver_exit_code == 2 else 1


def commands(job: str, address: str) -> str:
    """What a person may type about a running job."""
    ray = (
        f"RAY_AUTH_MODE=token ray job {{}} --address {address} {job}"
        if token.has_token()
        else (f"ray job {{}} --address {address} {job}")
    )
    return f"  follow it: {ray.format('logs --follow')}\n  stop it:   {ray.format('stop')}"


def mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
