"""Runs side by side: compare."""

from pathlib import Path

import click

from pais_ray.cli.common import echo, json_option, verb, write_json


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option(
    "--out", type=click.Path(file_okay=False), help="Directory for predictions.png: ground truth and each run."
)
@click.option("--images", default=6, show_default=True, help="Validation images in that picture.")
@click.option("--score", default=0.5, show_default=True, help="Detections below it are not drawn.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@json_option
@verb
def compare(
    runs: tuple[str, ...], out: str | None, images: int, score: float, role: str, json_path: str | None
) -> None:
    """Settings that differ between RUNS, their AP and the differences from the first; repetitions (other seed, other
    fold) as mean and spread. Says where figures cannot be compared. With --out, what each sees on the same images."""
    from pais_ray.compare import compare as compared

    roots = [Path(run).absolute() for run in runs]
    found = compared(roots)
    echo(found.table())
    if out is not None:
        from pais_ray import gallery, plots

        path = Path(out) / "predictions.png"
        plots.save(gallery.of_runs(roots, images, role, score), path)
        echo(f"\nside by side: {path}")
    write_json(json_path, found.to_json())
