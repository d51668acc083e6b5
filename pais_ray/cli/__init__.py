"""The command `pais-ray` and its verbs. Modules that take seconds to import are imported inside the verbs, so that
`--help` answers at once."""

import signal

import click

from pais_ray.cli.cluster import batch_predict, submit
from pais_ray.cli.data.shard import shard
from pais_ray.cli.data.split import split
from pais_ray.cli.data.validate import validate
from pais_ray.cli.models import evaluate, export, predict
from pais_ray.cli.registry import promote, register, sync
from pais_ray.cli.reports import audit, compare, tables
from pais_ray.cli.search_pipeline import search
from pais_ray.cli.training import show, train, tune
from pais_ray.cluster import ray_compat


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Semi-supervised instance segmentation from few labeled and many unlabeled images.

    `pais-ray VERB --help` explains a verb."""
    if ray_compat.is_stopped_by_sigint():
        # If the cluster of this job was started by a shell in the background, its processes ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)


VERBS = (
    train,
    tune,
    search,
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
