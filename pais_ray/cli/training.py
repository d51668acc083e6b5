"""Verbs around a run: train, show."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pais_ray.cli.options import FAILED, WORDS, echo, json_option, same_command, verb, write_json

if TYPE_CHECKING:
    from pais_ray.search.plan import SearchOptions


SAMPLERS = ("grid", "random", "optuna")


@click.command(help="Train, or resume the run of that run.name.\n\n" + WORDS)
@click.argument("words", nargs=-1)
@click.option("--force", is_flag=True, help="Resume even though identity settings differ from the run's start.")
@json_option
@verb
def train(words: tuple[str, ...], force: bool, json_path: str | None) -> None:
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose

    spelt = expand_words(words or ("quickstart",))
    for line in (*spelt.found, *spelt.chosen):
        echo(line)
    config = compose(spelt.words)
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
        click.echo(f"resume with:\n  {same_command('run.name=', name)}")


@click.command(
    help="Print the resolved configuration of WORDS and the schedule that follows from it, without training.\n\n"
    + WORDS
)
@click.argument("words", nargs=-1)
@click.option(
    "--describe",
    "key",
    metavar="KEY",
    help="Explain a setting (train.steps) or all settings of a section (train) instead.",
)
@json_option
@verb
def show(words: tuple[str, ...], key: str | None, json_path: str | None) -> None:
    if key is not None:
        if words:
            raise click.UsageError("--describe KEY excludes WORDS; run the command once for each")
        describe_settings(key, json_path)
        return
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose, dump, run_schedule

    resolved = expand_words(words)
    for line in (*resolved.found, *resolved.chosen):
        echo(f"# {line}")
    config = compose(resolved.words)
    schedule = run_schedule(config)
    click.echo(dump(config), nl=False)
    click.echo("# " + schedule.explain().replace("\n", "\n# "))
    write_json(json_path, {"config": config.model_dump(mode="json"), "schedule": vars(schedule)})


def describe_settings(key: str, json_path: str | None) -> None:
    """Prints what ``key`` means, one paragraph per setting."""
    from pais_ray.config.describe import describe

    settings = describe(key)
    echo("\n\n".join(setting.to_text() for setting in settings))
    write_json(json_path, {"settings": [vars(setting) for setting in settings]})


@click.command(
    help="Search settings of WORDS: many short trainings on the cluster, compared by the teacher's segm AP. The same"
    " command goes on with a search that was stopped or killed. docs/guides/search.md explains it.\n\n" + WORDS
)
@click.argument("words", nargs=-1, required=True)
@click.option(
    "--over",
    multiple=True,
    metavar="PATH=VALUES",
    help="method.tau_cls=0.35,0.5 or uniform(a,b), loguniform(a,b), randint(a,b), choice(...); repeatable."
    " Or as the section search: of a word, such as search_pais.",
)
@click.option("--name", help="Of the search and its folder; the same name goes on. Default: run.name, or the time.")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="How configurations are chosen. Default: grid if all settings are lists, else optuna (TPE).",
)
@click.option("--search", type=click.Choice(SAMPLERS), hidden=True)  # the earlier name of --sampler
@click.option("--samples", type=click.IntRange(min=1), help="Configurations to try, unless in a grid.  [default: 20]")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Trials a configuration, by train.seed."
)
@click.option("--steps", type=click.IntRange(min=1), help="Of a trial, instead of WORDS' train.steps.")
@click.option(
    "--rungs",
    help="Steps at which only the best third goes on, 40,80; or none. Default: a ninth and a third of the steps, at"
    " the next evaluation.",
)
@click.option(
    "--time-budget", "minutes", type=click.FloatRange(min=0, min_open=True), help="Minutes; the same command goes on."
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    help="Trials at a time, if fewer than the cluster holds, or than it will.",
)
@click.option("--warm-start", metavar="FOLDER", help="Of a search to learn from.")
@click.option("--retrain-best", "retrain", is_flag=True, help="Then train WORDS with the best settings as NAME-best.")
@json_option
@verb
def tune(words: tuple[str, ...], json_path: str | None, **given: Any) -> None:
    options = tune_options(given)
    from pais_ray.search import tuner

    result = tuner.search(words, options)
    folder = Path(result["folder"])
    echo((folder / "table.txt").read_text())
    if result["best"] is not None:
        echo(f"best settings:  {result['best']['overlay']} (a word for `pais-ray train`)")
    echo(f"folder, plots:  {folder}, {folder / 'figures'}")
    if result["stopped"] or result.get("retrained", {}).get("stopped"):
        echo(f"resume with:\n  {same_command('--name', '--name', folder.name)}")
    write_json(json_path, result)


def tune_options(given: Mapping[str, Any]) -> "SearchOptions":
    """The options of a search from the parameters of `tune`."""
    from pais_ray.search.plan import SearchOptions

    names = [field.name for field in dataclasses.fields(SearchOptions)]
    options = {name: given[name] for name in names if name in given}
    return SearchOptions(**{**options, "sampler": given["sampler"] or given["search"]})
