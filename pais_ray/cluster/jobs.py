"""Submits a verb of `pais-ray` as a job to a Ray cluster: working_dir, job, log and exit status."""

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
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pais_ray.cluster import ray_compat, token

PACKAGE = Path(__file__).parents[1]
LARGEST_FILES = 5  # files named in the message about the size limit
RECONNECT_S = 2.0  # between two attempts to read the log
MAX_ATTEMPTS = 30  # consecutive attempts without an answer before an error, which takes a minute


def pipelines() -> dict[str, Path]:
    """Name -> program of pipelines/, in the source checkout or in the installed package."""
    folder = next(d for d in (PACKAGE.parent / "pipelines", PACKAGE / "pipelines") if d.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def working_dir_files(include: Sequence[Path] = ()) -> dict[str, Path]:
    """Name in the working_dir -> file: the package, pipelines, configs and ``include``, without hidden files.

    Files below the current folder keep their relative paths; others are placed at the top. Raises ValueError if an
    item of ``include`` adds no file.
    """
    found = {f"pipelines/{path.name}": path for path in pipelines().values()}
    code = [PACKAGE, *(folder for folder in [PACKAGE.parent / "configs"] if folder.is_dir())]
    for folder in code:
        for pattern in ("*.py", "*.yaml"):
            found |= {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob(pattern)}
    for given in include:
        place = Path(os.path.normpath(given.absolute()))  # a name such as ../x would leave the working_dir
        base = Path.cwd() if place.is_relative_to(Path.cwd()) else place.parent
        files = {p.relative_to(base): p for p in ([place] if place.is_file() else sorted(place.rglob("*")))}
        visible = {n.as_posix(): p for n, p in files.items() if p.is_file() and not any(map(is_hidden, n.parts))}
        if not visible:
            raise ValueError(
                f"{given}: contains no file to send; hidden files and __pycache__ are not sent. Rename it, or omit it"
            )
        found |= visible
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never sent."""
    return name.startswith(".") or name == "__pycache__"


def local_files(words: Sequence[str]) -> list[Path]:
    """The local YAML files that ``words`` name by relative paths.

    Raises ValueError for a file outside the current folder: the job could not find it by the same path.
    """
    paths = [Path(w) for w in words if w.endswith((".yaml", ".yml")) and not os.path.isabs(w) and os.path.isfile(w)]
    for path in paths:
        if os.path.normpath(path).startswith(os.pardir + os.sep):
            raise ValueError(
                f"{path}: is outside the current folder, which is all that a job receives; "
                f"submit from {path.parent.resolve()}, or copy the file into the current folder"
            )
    return paths


def pack(files: Mapping[str, Path]) -> bytes:
    """A zip archive of ``files``; equal files give equal bytes, so that Ray uploads them once.

    Raises ValueError above Ray's size limit, with the names of the largest files.
    """
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
    if len(data) > ray_compat.UPLOAD_LIMIT:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:LARGEST_FILES]
        raise ValueError(
            f"working_dir: {format_mib(len(data))} packed, above Ray's limit of {format_mib(ray_compat.UPLOAD_LIMIT)}; "
            "include fewer files, and keep data on storage that the nodes see. "
            f"Largest files: {', '.join(f'{n} ({format_mib(sizes[n])})' for n in largest)}"
        )
    return data


def check_address(address: str) -> None:
    """Raises ValueError if ``address`` is malformed, or is a network address and there is no token.

    Without a token, anybody who reaches the address can run code on the cluster.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--address {address}: expected the dashboard's address, http://HOST:8265")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not token.has_token():
        raise ValueError(
            f"--address {address}: no token, and without one anybody who reaches that address can run code on it; "
            f"start the cluster with RAY_AUTH_MODE=token and {token_remedy()}"
        )


def token_remedy() -> str:
    """How to provide the token of a cluster."""
    return (
        f"put its token (`ray get-auth-token` on the head) into {token.token_file()} with mode 600, or name the file "
        "in RAY_AUTH_TOKEN_PATH"
    )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at ``address``; it sends the token if there is one.

    Raises ValueError for an unusable address or a wrong token.
    """
    check_address(address)
    if token.has_token():
        token.ensure_token()
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's clients send the token only in this mode
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # else they would override the address that was checked
        os.environ.pop(name, None)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(f"--address {address}: {str(error).splitlines()[0]}; {token_remedy()}") from error
    for name in ray_compat.JOB_CLIENT_LOGGERS:  # they log each upload and connection
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def submit(
    client: JobSubmissionClient, command: Sequence[str], pipeline: str, archive: bytes, num_gpus: float | None = None
) -> str:
    """Uploads the working_dir and starts ``command`` as a job of the name ``pipeline``; returns the job's ID.

    ``num_gpus`` GPUs are reserved for the program itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        working_dir = Path(folder) / "working_dir.zip"
        working_dir.write_bytes(archive)
        job: str = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": str(working_dir), "env_vars": ray_compat.JOB_STOP_ENVIRONMENT},
            metadata={"pipeline": pipeline},
            entrypoint_num_gpus=num_gpus,
        )
    return job


def stream_logs(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's log until the job ends and returns its exit status: 0, 2 for wrong input, else 1.

    Reconnects after lost connections. Raises ConnectionError if the cluster does not answer for a minute.
    """
    printer = LogPrinter()
    attempts = 0
    while True:
        try:
            asyncio.run(printer.tail(client, job))
            info = client.get_job_info(job)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            attempts += 1
            if attempts > MAX_ATTEMPTS:
                raise ConnectionError(f"the cluster does not answer; the job may still be running ({error})") from error
            time.sleep(RECONNECT_S)
            continue
        if info.status.is_terminal():
            return report_outcome(job, info, is_log_printed=printer.printed > 0)
        attempts = 0
        time.sleep(RECONNECT_S)


class LogPrinter:
    """Prints each part of a log once: every new connection sends the log from its first line."""

    def __init__(self) -> None:
        self.printed = 0  # characters

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Prints the part of the log that was not printed yet, until the connection ends."""
        position = 0
        async for text in client.tail_job_logs(job):
            print(text[max(0, self.printed - position) :], end="", flush=True)
            position += len(text)
            self.printed = max(self.printed, position)


def report_outcome(job: str, info: JobDetails, *, is_log_printed: bool) -> int:
    """Prints how the job ended, with the cause of a failure; returns the exit status of ``stream_logs``."""
    if info.status == JobStatus.SUCCEEDED:
        print(f"job {job} succeeded")
        return 0
    cause, _, last_lines = (info.message or "").partition(ray_compat.LAST_LOGS)
    print(f"job {job} {info.status.value.lower()}: {cause}")
    if last_lines and not is_log_printed:
        print(last_lines.partition("\n")[2])
    return 2 if info.driver_exit_code == 2 else 1


def job_commands(job: str, address: str) -> str:
    """The commands that show the log of a running job and stop it."""
    ray = "RAY_AUTH_MODE=token ray" if token.has_token() else "ray"
    logs, stop = (f"{ray} job {verb} --address {address} {job}" for verb in ("logs --follow", "stop"))
    return f"  show its log: {logs}\n  stop it:      {stop}"


def format_mib(size: int) -> str:
    """A number of bytes in MiB."""
    return f"{size / 2**20:.2f} MiB"
