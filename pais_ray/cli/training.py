"""Verbs around a run: train, show."""

import sys
from pathlib import Path

import click

from pais_ray.cli.common import FAILED, WORDS, echo, json_option, same_command, verb, write_json


@click.command(help="Train, or resume the run of that run.name.\n\n" + WORDS)
@click.argument("words", nargs=-1)
@click.option("--force", is_flag=True, help="Resume even though identity settings differ from the run's start.")
@json_option
@verb
def train(words: tuple[str, ...], force: bool, json_path: str | None) -> None:
    from pais_ray.config import compose
    from pais_ray.overlays import spell_out

    spelt = spell_out(words or ("quickstart",))
    for line in (*spelt.found, *spelt.chosen):
        echo(line)
    config = compose(spelt.words)
    from pais_ray.train import launch

    try:
        result = launch.train(config, force=force)
    except launch.TrainingStopped as error:  # the run's own verdict, no fault of the program
        click.echo(f"error: {error}", err=True)
        sys.exit(FAILED)
    write_json(json_path, result.to_json())
    click.echo(launch.summary(result, config))
    if result.stopped:
        name = f"run.name={Path(result.run_dir).name}"
        click.echo(f"resume with:\n  {same_command('run.name=', name)}")


@click.command(help="Resolved config, schedule and batch arithmetic.\n\n" + WORDS)
@click.argument("words", nargs=-1)
@json_option
@verb
def show(words: tuple[str, ...], json_path: str | None) -> None:
    from pais_ray.config import compose, dump, run_schedule
    from pais_ray.overlays import spell_out

    spelt = spell_out(words)
    for line in (*spelt.found, *spelt.chosen):
        echo(f"# {line}")
    config = compose(spelt.words)
    schedule = run_schedule(config)
    click.echo(dump(config), nl=False)
    click.echo("# " + schedule.explain().replace("\n", "\n# "))
    write_json(json_path, {"config": config.model_dump(mode="json"), "schedule": vars(schedule)})
