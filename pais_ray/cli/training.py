"""Verbs that train: train, tune; and show, which explains what they would do."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pais_ray.cli.options import FAILED, WORDS, echo, json_option, resume_command, verb, write_json

if TYPE_CHECKING:
    from pais_ray.search.plan import SearchOptions

SAMPLERS = ("grid", "random", "optuna")


@click.command(
    short_help="Train a model, or resume a run.",
    help="Train a model, or resume the run that run.name names. Without WORDS, the quickstart is trained.\n\n" + WORDS,
)
@click.argument("words", nargs=-1)
@click.option(
    "--force", is_flag=True, help="Resume even if settings that define the run have changed since it started."
)
@json_option
@verb
def train(words: tuple[str, ...], force: bool, json_path: str | None) -> None:
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose

    resolved = expand_words(words or ("quickstart",))
    for line in (*resolved.found, *resolved.chosen):
        echo(line)
    config = compose(resolved.words)
    from pais_ray.train.driver import launch, run_loop
    from pais_ray.train.driver.result import summary

    try:
        result = launch.train(config, force=force)
    except run_loop.RunFailedError as error:  # the run cannot continue; the program itself did not fail
        click.echo(f"error: {error}", err=True)
        sys.exit(FAILED)
    write_json(json_path, result.to_json())
    click.echo(summary(result, config))
    if result.stopped:
        name = f"run.name={Path(result.run_dir).name}"
        click.echo(f"Resume with:\n  {resume_command('run.name=', name)}")


@click.command(
    short_help="Print the resolved settings, or explain a setting.",
    help="Print the resolved settings of WORDS and the schedule that follows from them, without training.\n\n" + WORDS,
)
@click.argument("words", nargs=-1)
@click.option(
    "--describe",
    "key",
    metavar="KEY",
    help="Instead, explain KEY: one setting, such as train.steps, or all settings of a section, such as train.",
)
@click.option("--schema", is_flag=True, help="Instead, print the JSON schema of config files, for editors.")
@json_option
@verb
def show(words: tuple[str, ...], key: str | None, schema: bool, json_path: str | None) -> None:
    if sum([bool(words), key is not None, schema]) > 1:
        raise click.UsageError("expected only one of WORDS, --describe and --schema")
    if key is not None:
        content = describe_settings(key)
    elif schema:
        from pais_ray.config.schema import json_schema

        content = json_schema()
        click.echo(json.dumps(content, indent=1))
    else:
        content = show_config(words)
    write_json(json_path, content)


def show_config(words: tuple[str, ...]) -> dict[str, Any]:
    """Print the settings that ``words`` describe, as YAML with the schedule in comments, and return both."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose, dump, run_schedule

    resolved = expand_words(words)
    for line in (*resolved.found, *resolved.chosen):
        echo(f"# {line}")
    config = compose(resolved.words)
    schedule = run_schedule(config)
    click.echo(dump(config), nl=False)
    click.echo("# " + schedule.explain().replace("\n", "\n# "))
    return {"config": config.model_dump(mode="json"), "schedule": schedule.to_json()}


def describe_settings(key: str) -> dict[str, Any]:
    """Print and return the descriptions of the setting or section ``key``."""
    from pais_ray.config.describe import describe

    settings = describe(key)
    echo("\n\n".join(setting.to_text() for setting in settings))
    return {"settings": [vars(setting) for setting in settings]}


@click.command(
    short_help="Search for the best settings with many short runs.",
    help="Search for the best settings: many short runs of WORDS on the cluster, compared by the teacher's segm AP."
    " The same command resumes a search that was stopped or killed. See docs/guides/search.md.\n\n" + WORDS,
)
@click.argument("words", nargs=-1, required=True)
@click.option(
    "--over",
    multiple=True,
    metavar="SETTING=VALUES",
    help="A setting to search and its values: method.tau_cls=0.35,0.5, or uniform(a,b), loguniform(a,b), randint(a,b),"
    " choice(...). Repeatable. A config file can list them in its section search:, as search_pais does.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the search and of its folder. The name of an existing search resumes it."
    " Default: run.name, or a name made from the current time.",
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="How configurations are chosen. Default: grid if --over lists values for all settings, else optuna (TPE).",
)
@click.option("--search", type=click.Choice(SAMPLERS), hidden=True)  # the earlier name of --sampler
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Number of configurations to try. A grid always tries all combinations.  [default: 20]",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of trials per configuration, each with a different train.seed.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Length of a trial in steps; it replaces train.steps.")
@click.option(
    "--rungs",
    metavar="STEPS",
    help="Steps after which only the best third of the trials continue, such as 40,80; or none. Default: a ninth and"
    " a third of the length, each rounded up to the next evaluation.",
)
@click.option(
    "--time-budget",
    "minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Minutes after which the search stops. The same command resumes it.",
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    help="Maximum number of concurrent trials. Default: as many as the cluster has resources for.",
)
@click.option("--warm-start", metavar="FOLDER", help="Folder of an earlier search whose trials are reused.")
@click.option(
    "--retrain-best", "retrain", is_flag=True, help="Afterwards, train WORDS with the best settings as run NAME-best."
)
@json_option
@verb
def tune(words: tuple[str, ...], json_path: str | None, **given: Any) -> None:
    options = tune_options(given)
    from pais_ray.search import tuner

    result = tuner.search(words, options)
    folder = Path(result["folder"])
    echo((folder / "table.txt").read_text())
    if result["best"] is not None:
        echo(f"best settings:  {result['best']['overlay']} (add it to the words of `pais-ray train`)")
    echo(f"folder, plots:  {folder}, {folder / 'figures'}")
    if result["stopped"] or result.get("retrained", {}).get("stopped"):
        echo(f"Resume with:\n  {resume_command('--name', '--name', folder.name)}")
    write_json(json_path, result)


def tune_options(given: Mapping[str, Any]) -> "SearchOptions":
    """The options of a search from the parameters of `tune`."""
    from pais_ray.search.plan import SearchOptions

    names = [field.name for field in dataclasses.fields(SearchOptions)]
    options = {name: given[name] for name in names if name in given}
    return SearchOptions(**{**options, "sampler": given["sampler"] or given["search"]})
