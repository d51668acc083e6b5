"""What all verbs share: common options, exit codes, JSON output, progress bars, text for any terminal."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

Item = TypeVar("Item")

OK, FAILED, WRONG_INPUT = 0, 1, 2
WORDS = """WORDS are names of files in configs/ or paths of YAML files, applied from left to right, then overrides
of single settings: `coco mask_rcnn pais data.labeled=0.01 train.seed=1`. The word data=FOLDER stands for the settings
that fit the data set in FOLDER."""

json_option = click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(dir_okay=False), help="Also write the result as JSON."
)
role_option = click.option(
    "--role",
    type=click.Choice(["teacher", "student"]),
    default="teacher",
    show_default=True,
    help="The model to use: the EMA teacher, or the student that it follows.",
)
checkpoint_option = click.option(
    "--checkpoint",
    metavar="NAME",
    default="best",
    show_default=True,
    help="The checkpoint to use: best, last, or the path of a checkpoint directory.",
)
device_option = click.option(
    "--device", metavar="DEVICE", help="The device to use: cpu or cuda. Default: cuda if a GPU is available."
)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a verb so that errors are printed as one line and end in an exit code.

    Exit codes: 0 success, 1 runtime failure, 2 wrong usage or input. Unexpected failures also print a traceback."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(FAILED)
        except (ValueError, FileNotFoundError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(WRONG_INPUT)
        except Exception as error:
            click.echo(f"error: {type(error).__name__}: {error}", err=True)
            if not (isinstance(error, OSError) and error.filename):  # the message already names the file or folder
                traceback.print_exc()
            sys.exit(FAILED)

    return wrapped


def progress(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Iterate over ``items``, ``count`` in number, with a progress bar if stderr is a terminal."""
    if count == 0 or not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(items, length=count, label="files", file=sys.stderr) as bar:
        yield from bar


def echo(text: str) -> None:
    """Print text that may contain any characters, replacing those that the terminal's encoding lacks.

    If the process at the other end of a pipe has ended, the output is dropped and the verb continues."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "replace").decode(encoding))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def resume_command(prefix: str, *addition: str) -> str:
    """The command line of this process, for the user to repeat.

    ``addition`` is appended unless an argument starts with ``prefix``, so that the command names the run."""
    program = sys.argv[0] if os.access(sys.argv[0], os.X_OK) else f"{sys.executable} {sys.argv[0]}"
    is_named = any(argument.startswith(prefix) for argument in sys.argv)
    arguments = sys.argv[1:] if is_named else [*sys.argv[1:], *addition]
    return " ".join([program, *(shlex.quote(argument) for argument in arguments)])


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write the result of a verb to the file of --json, if one was given. Raises UsageError if that fails."""
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise click.UsageError(f"--json {path}: {error}") from error
