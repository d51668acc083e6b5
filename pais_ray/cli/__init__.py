"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import click

from pais_ray.cli.models import evaluate, predict
from pais_ray.cli.searching import tune
from pais_ray.cli.splitting import split
from pais_ray.cli.training import show, train
from pais_ray.cli.validating import validate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Semi-supervised instance segmentation: few labeled images, many unlabeled ones."""


for command in (train, tune, show, evaluate, predict, split, validate):
    main.add_command(command)
