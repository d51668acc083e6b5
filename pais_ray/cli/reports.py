"""Verbs that analyze finished runs: audit, tables, compare."""

from pathlib import Path

import click

from pais_ray.cli.options import checkpoint_option, device_option, echo, json_option, role_option, verb, write_json


@click.command(short_help="Measure the quality of the pseudo-labels of a run.")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results. Default: RUN/audit.",
)
@click.option(
    "--annotations",
    metavar="FILE",
    type=click.Path(exists=True),
    help="Annotated images to use instead of the run's own unlabeled images, whose annotations are hidden in training.",
)
@click.option(
    "--images",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of the images of --annotations.",
)
@click.option("--number", type=click.IntRange(min=1), default=200, show_default=True, help="Maximum number of images.")
@role_option
@checkpoint_option
@device_option
@json_option
@verb
def audit(
    run: Path,
    out: Path | None,
    annotations: str | None,
    images: str | None,
    number: int,
    role: str,
    checkpoint: str,
    device: str | None,
    json_path: str | None,
) -> None:
    """Measure the quality of RUN's pseudo-labels on images whose annotations were not used in training.

    Writes predictions.csv (one row per prediction), audit.json and audit.png (the paper's figures 1 and 6)."""
    from pais_ray.reports import audit as audits

    out = out or run / "audit"
    source = {"annotations": annotations, "images": images, "device": device}
    report = audits.audit(run, out, number=number, role=role, checkpoint=checkpoint, **source)
    echo(audits.summary(report))
    click.echo(f"figure: {out / 'audit.png'}")
    write_json(json_path, report)


@click.command(short_help="Tabulate the AP of many runs by method and share of labels.")
@click.argument("places", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@role_option
@click.option(
    "--metric",
    metavar="NAME",
    default="segm_AP",
    show_default=True,
    help="The metric to tabulate, by its name in metrics.jsonl without teacher/ or student/, such as bbox_AP.",
)
@click.option(
    "--markdown",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the table as Markdown.",
)
@click.option(
    "--csv", "csv_path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Also write it as CSV."
)
@json_option
@verb
def tables(
    places: tuple[Path, ...],
    role: str,
    metric: str,
    markdown: Path | None,
    csv_path: Path | None,
    json_path: str | None,
) -> None:
    """Tabulate many runs: methods by shares of labels, as mean ± standard deviation (runs) over folds and seeds.

    PLACES are run directories or folders that contain them. Unfinished runs are left out."""
    from pais_ray.reports import tables as table

    results, unfinished = [], []
    for run in table.find_runs(places):
        result = table.read_result(run, role, metric)
        if result is None:
            unfinished.append(run.name)
        else:
            results.append(result)
    cells = table.build_cells(results)
    text = table.to_markdown(cells, f"{role} {metric}")
    echo(text.rstrip())
    if unfinished:
        echo(f"left out because their last step has no {role}/{metric}: {', '.join(unfinished)}")
    for path, content in ((markdown, text), (csv_path, table.to_csv(cells))):
        if path is not None:
            path.write_text(content, encoding="utf-8")
    write_json(json_path, {"cells": [vars(cell) for cell in cells], "unfinished": unfinished})


@click.command(short_help="Compare the settings and the AP of runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(file_okay=False),
    help="Folder for predictions.png, which shows the ground truth and the predictions of each run.",
)
@click.option("--images", default=6, show_default=True, help="Number of validation images in that figure.")
@click.option("--score", default=0.5, show_default=True, help="Minimum score of a detection to be drawn.")
@role_option
@json_option
@verb
def compare(
    runs: tuple[str, ...], out: str | None, images: int, score: float, role: str, json_path: str | None
) -> None:
    """Print the settings that differ between RUNS, their AP, and the differences from the first run.

    Repetitions with another seed or fold are summarized as mean and spread. Results that are not comparable are
    marked. With --out, a figure shows the predictions of all runs on the same images."""
    from pais_ray.reports.compare import compare as compared

    roots = [Path(run).absolute() for run in runs]
    found = compared(roots)
    echo(found.table())
    if out is not None:
        from pais_ray.figures import canvas
        from pais_ray.reports import gallery

        path = Path(out) / "predictions.png"
        canvas.save(gallery.of_runs(roots, images, role, score), path)
        echo(f"\nfigure: {path}")
    write_json(json_path, found.to_json())
