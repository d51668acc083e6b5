"""Verbs that connect a run to MLflow: sync, register, promote."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from pais_ray.cli.options import FAILED, checkpoint_option, json_option, role_option, verb, write_json


@contextmanager
def one_line_store_errors() -> Iterator[None]:
    """Print an error of the MLflow store as one line and exit with code 1, because its usual cause is a server that
    does not run."""
    try:
        yield
    except ValueError:  # wrong input, which `verb` reports
        raise
    except Exception as error:
        from pais_ray.tracking.mirror import StoreError
        from pais_ray.tracking.record import redact_secrets

        if not isinstance(error, StoreError):
            raise
        text = " ".join(redact_secrets(str(error)).split())
        click.echo(f"error: MLflow: {text:.300}; if its server is down, start it and repeat this command", err=True)
        sys.exit(FAILED)


@click.command(short_help="Send MLflow the missing metrics, figures and checkpoints of a run.")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@json_option
@verb
def sync(run: str, json_path: str | None) -> None:
    """Send MLflow what it is missing of RUN: metrics, figures, metadata and checkpoints.

    Nothing in MLflow is changed, and nothing is sent twice."""
    from pais_ray.config.tree import load
    from pais_ray.tracking import tracker

    config = load(Path(run) / "config.yaml").tracking
    with one_line_store_errors():
        sent = tracker.sync(config, Path(run).absolute())
    if any(sent.values()):
        values, files, checkpoints = sent["metrics"], sent["artifacts"], sent["checkpoints"]
        click.echo(f"sent {values} metric values, {files} figures and metadata files, {checkpoints} checkpoints")
    else:
        click.echo("MLflow is up to date with this run")
    write_json(json_path, sent)


@click.command(short_help="Register a checkpoint as a version of a model in MLflow.")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--name", metavar="MODEL", required=True, help="The registered model that gets a new version.")
@role_option
@checkpoint_option
@json_option
@verb
def register(run: str, name: str, role: str, checkpoint: str, json_path: str | None) -> None:
    """Register a checkpoint of RUN as a new version of MODEL in the MLflow registry, with the alias `candidate`."""
    from pais_ray.inference.serving import registry

    with one_line_store_errors():
        version = registry.register(Path(run).absolute(), name, role=role, checkpoint=checkpoint)
    click.echo(f"{version}: alias {registry.CANDIDATE}; make it the champion with `pais-ray promote {name}`")
    write_json(json_path, asdict(version))


@click.command(short_help="Make a version of a registered model the champion.")
@click.argument("name")
@click.argument("version", required=False)
@click.option(
    "--tracking",
    "uri",
    metavar="URI",
    envvar="MLFLOW_TRACKING_URI",
    default="sqlite:///runs/mlflow.db",
    show_default=True,
    help="The MLflow tracking URI of the registry. The environment variable MLFLOW_TRACKING_URI also sets it.",
)
@json_option
@verb
def promote(name: str, version: str | None, uri: str, json_path: str | None) -> None:
    """Make VERSION of the model NAME the champion. Without VERSION, the candidate is promoted.

    The promotion is refused if the current champion has a higher AP, or if the two were trained or evaluated on
    different data."""
    from pais_ray.inference.serving import registry
    from pais_ray.tracking.settings import TrackingConfig

    with one_line_store_errors():
        promoted, before = registry.promote(TrackingConfig(uri=uri).uri or uri, name, version)
    previous = "there was no champion before" if before is None else f"previous champion: {before}"
    click.echo(f"{promoted}: alias {registry.CHAMPION}; {previous}")
    write_json(json_path, {"champion": asdict(promoted), "before": before and asdict(before)})
