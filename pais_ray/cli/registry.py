"""Verbs between a run and MLflow: sync, register, promote."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from pais_ray.cli.options import FAILED, json_option, verb, write_json


@contextmanager
def store_errors() -> Iterator[None]:
    """What MLflow raises as one line: a server that is away is no fault of this program."""
    try:
        yield
    except ValueError:  # wrong input
        raise
    except Exception as error:
        from pais_ray.tracking.mirror import StoreError
        from pais_ray.tracking.record import redact_secrets

        if not isinstance(error, StoreError):
            raise
        text = " ".join(redact_secrets(str(error)).split())
        click.echo(f"error: MLflow: {text:.300}; if its server is away, start it and give this command again", err=True)
        sys.exit(FAILED)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@json_option
@verb
def sync(run: str, json_path: str | None) -> None:
    """Send MLflow what it lacks of RUN: metrics, figures, checkpoints. What it has stays as it is."""
    from pais_ray.config.tree import load
    from pais_ray.tracking import tracker

    config = load(Path(run) / "config.yaml").tracking
    with store_errors():
        sent = tracker.sync(config, Path(run).absolute())
    if any(sent.values()):
        values, figures, checkpoints = sent["metrics"], sent["artifacts"], sent["checkpoints"]
        click.echo(f"sent {values} metric values, {figures} figures and papers, {checkpoints} checkpoints")
    else:
        click.echo("MLflow lacks nothing of this run")
    write_json(json_path, sent)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="The registered model that gets a new version.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@json_option
@verb
def register(run: str, name: str, role: str, checkpoint: str, json_path: str | None) -> None:
    """Make a checkpoint of RUN a version of the model NAME in MLflow's registry, as its `candidate`."""
    from pais_ray.inference.serving import registry

    with store_errors():
        made = registry.register(Path(run).absolute(), name, role=role, checkpoint=checkpoint)
    click.echo(f"{made}: alias {registry.CANDIDATE}; make it the champion with `pais-ray promote {name}`")
    write_json(json_path, asdict(made))


@click.command()
@click.argument("name")
@click.argument("version", required=False)
@click.option(
    "--tracking",
    "uri",
    envvar="MLFLOW_TRACKING_URI",
    default="sqlite:///runs/mlflow.db",
    show_default=True,
    help="Where the registry is; MLFLOW_TRACKING_URI says it as well.",
)
@json_option
@verb
def promote(name: str, version: str | None, uri: str, json_path: str | None) -> None:
    """Make VERSION of NAME (default: the candidate) the champion, unless the champion is better or the two learned
    or were evaluated on other data."""
    from pais_ray.inference.serving import registry
    from pais_ray.tracking.settings import TrackingConfig

    with store_errors():
        promoted, before = registry.promote(TrackingConfig(uri=uri).uri or uri, name, version)
    was = "there was none" if before is None else f"before: {before}"
    click.echo(f"{promoted}: alias {registry.CHAMPION}; {was}")
    write_json(json_path, {"champion": asdict(promoted), "before": before and asdict(before)})
