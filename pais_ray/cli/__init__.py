"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import click

from pais_ray.cli.comparing import compare
from pais_ray.cli.models import evaluate, predict
from pais_ray.cli.registering import promote, register, sync
from pais_ray.cli.splitting import split
from pais_ray.cli.training import show, train
from pais_ray.cli.validating import validate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Semi-supervised instance segmentation: few labeled images, many unlabeled ones."""


for command in (train, show, evaluate, predict, split, validate, compare, sync, register, promote):
    main.add_command(command)
