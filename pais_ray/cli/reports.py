"""Verbs that look at finished runs: audit, tables."""

from pathlib import Path

import click

from pais_ray.cli.options import echo, json_option, verb, write_json


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: RUN/audit.")
@click.option("--annotations", type=click.Path(exists=True), help="Other annotated images than the run's hidden ones.")
@click.option("--images", type=click.Path(exists=True, file_okay=False), help="Their folder.")
@click.option("--number", type=click.IntRange(min=1), default=200, show_default=True, help="How many images at most.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
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
    """How good a RUN's pseudo-labels are, on images whose truth training did not see: its unlabeled ones.

    Writes predictions.csv (a row a prediction), audit.json and audit.png (the paper's figures 1 and 6)."""
    from pais_ray.reports import audit as audits

    out = out or run / "audit"
    where = {"annotations": annotations, "images": images, "device": device}
    report = audits.audit(run, out, number=number, role=role, checkpoint=checkpoint, **where)
    echo(audits.summary(report))
    click.echo(f"look at it: {out / 'audit.png'}")
    write_json(json_path, report)


@click.command()
@click.argument("places", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--metric", default="segm_AP", show_default=True, help="As in metrics.jsonl: segm_AP50, bbox_AP ...")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the table here.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
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
    """The table of many runs: methods by shares of labels, mean ± standard deviation (runs) over folds and seeds.

    PLACES are run directories or folders of them. Only finished runs count."""
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
        echo(f"left out, without {role}/{metric} at their last step: {', '.join(unfinished)}")
    for path, content in ((markdown, text), (csv_path, table.to_csv(cells))):
        if path is not None:
            path.write_text(content, encoding="utf-8")
    write_json(json_path, {"cells": [vars(cell) for cell in cells], "unfinished": unfinished})


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
    from pais_ray.reports.compare import compare as compared

    roots = [Path(run).absolute() for run in runs]
    found = compared(roots)
    echo(found.table())
    if out is not None:
        from pais_ray.figures import canvas
        from pais_ray.reports import gallery

        path = Path(out) / "predictions.png"
        canvas.save(gallery.of_runs(roots, images, role, score), path)
        echo(f"\nside by side: {path}")
    write_json(json_path, found.to_json())
