"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import os
import signal

import click

from pais_ray.cli.cluster import batch_predict, submit
from pais_ray.cli.data.shard import shard
from pais_ray.cli.data.split import split
from pais_ray.cli.data.validate import validate
from pais_ray.cli.models import evaluate, export, predict
from pais_ray.cli.registry import promote, register, sync
from pais_ray.cli.reports import audit, compare, tables
from pais_ray.cli.training import show, train, tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Semi-supervised instance segmentation: few labeled images, many unlabeled ones."""
    if os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT":  # a job: its cluster may have been started by a shell in the
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background, whose descendants ignore Ctrl-C


VERBS = (
    train,
    tune,
    show,
    evaluate,
    predict,
    export,
    split,
    shard,
    validate,
    submit,
    batch_predict,
    audit,
    tables,
    compare,
    sync,
    register,
    promote,
)
for command in VERBS:
    main.add_command(command)
