"""What all verbs share: exit codes, JSON output, progress, text for any terminal."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import click

OK, FAILED, WRONG_INPUT = 0, 1, 2
json_option = click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the result here.")
WORDS = """WORDS are names of files in configs/ (or paths to YAML files), applied left to right, then dotted
settings: `coco mask_rcnn pais data.labeled=0.01 train.seed=1`. data=FOLDER stands for the settings of the data set
that lies there."""


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exit codes: 0 success, 1 failure of the work, 2 wrong usage or input; one clear line first."""

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
            if not (isinstance(error, OSError) and error.filename):  # a file or folder that says it all
                traceback.print_exc()
            sys.exit(FAILED)

    return wrapped


def progress(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items, with a bar on a terminal."""
    if count == 0 or not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(items, length=count, label="files", file=sys.stderr) as bar:
        yield from bar


def echo(text: str) -> None:
    """Text with names from outside, whatever the terminal's encoding lacks. Where the reader of a pipe has gone, the
    work goes on without it, and its exit code counts."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "replace").decode(encoding))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def same_command(known_by: str, *addition: str) -> str:
    """This command line, to be run again: with ``addition`` where no word begins with ``known_by``."""
    started = sys.argv[0] if os.access(sys.argv[0], os.X_OK) else f"{sys.executable} {sys.argv[0]}"
    words = sys.argv[1:] if any(w.startswith(known_by) for w in sys.argv) else [*sys.argv[1:], *addition]
    return " ".join([started, *(shlex.quote(w) for w in words)])


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise click.UsageError(f"--json {path}: {error}") from error
