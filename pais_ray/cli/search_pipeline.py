"""The verb `search`: a hyper-parameter search, full training of the best settings, and registration of the teacher."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from pais_ray.cli.registry import register
from pais_ray.cli.training import tune


@click.command(
    short_help="Run tune, train the best settings, and register the model.",
    hidden=True,
    context_settings={"ignore_unknown_options": True},
    help="Run `pais-ray tune WORDS --retrain-best`, then `pais-ray register` on the best run.\n\n"
    "WORDS and all other options are those of `pais-ray tune`. The same command resumes an interrupted search.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", metavar="NAME", required=True, help="Name of the registered model.")
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the result of the search as JSON, like `pais-ray tune --json`.",
)
def search(words: tuple[str, ...], model: str, json_path: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = json_path or Path(folder) / "search.json"
        run_verb(tune, [*words, "--retrain-best", "--json", str(result)])
        best = json.loads(result.read_text()).get("retrained")
    if best is None or best["stopped"]:
        sys.exit("the search was stopped; the same command resumes it")
    run_verb(register, [best["run_dir"], "--name", model])


def run_verb(verb: click.Command, words: Sequence[str]) -> None:
    """Run a verb. If it fails, this process exits with its exit code."""
    try:
        verb.main(list(words))
    except SystemExit as end:
        if end.code:
            raise
