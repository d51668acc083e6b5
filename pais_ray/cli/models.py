"""Verbs on a trained model or its results: evaluate, predict."""

from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, json_option, verb, write_json


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--annotations", type=click.Path(exists=True), help="COCO ground truth JSON, or Cityscapes' gtFine/PART.")
@click.option("--images", type=click.Path(exists=True, file_okay=False), help="The ground truth's images.")
@click.option(
    "--predictions",
    type=click.Path(exists=True),
    help="COCO results JSON, or a folder of Cityscapes results, to score.",
)
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
@json_option
@verb
def evaluate(
    run: str | None,
    annotations: str | None,
    images: str | None,
    predictions: str | None,
    role: str,
    checkpoint: str,
    device: str | None,
    json_path: str | None,
) -> None:
    """COCO AP of a RUN's checkpoint on its validation images (or on --annotations with --images), or of any
    results file: --annotations GT.json --predictions RESULTS.json. On Cityscapes its own instance AP is added."""
    from pais_ray.evaluation.scoring import format_table, score

    if predictions is not None:
        if annotations is None or run is not None:
            raise click.UsageError("--predictions goes with --annotations and without RUN")
        scores = score(*truth_and_results(annotations, predictions))
    elif run is not None:
        from pais_ray.inference.predictor import Predictor

        predictor = Predictor.open(Path(run), role=role, checkpoint=checkpoint, device=device)
        scores = predictor.evaluate(annotations, images)
    else:
        raise click.UsageError("give RUN, or --annotations with --predictions")
    click.echo(format_table(scores))
    write_json(json_path, scores)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("images", nargs=-1, type=click.Path(exists=True))
@click.option(
    "--part",
    type=click.Choice(["val", "unlabeled"]),
    default="val",
    show_default=True,
    help="Which images of the run, where no IMAGES are named.",
)
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Directory for results and overlays.")
@click.option("--draw", type=click.IntRange(min=0), default=None, help="Overlays of so many images; default: all.")
@click.option("--score", default=0.5, show_default=True, help="Minimum score to be drawn. Every detection is written.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
@json_option
@verb
def predict(
    run: str,
    images: tuple[str, ...],
    part: str,
    out: str,
    draw: int | None,
    score: float,
    role: str,
    checkpoint: str,
    device: str | None,
    json_path: str | None,
) -> None:
    """Instances in IMAGES (files or folders; default: the run's validation images, or its --part unlabeled).

    Writes OUT/results.json (COCO results with the predicted mask IoU: data.pseudo_labels of another run takes them),
    OUT/images.json (which id is which file) and OUT/overlays/."""
    from pais_ray.inference.predictor import Predictor, image_records

    predictor = Predictor.open(Path(run), role=role, checkpoint=checkpoint, device=device)
    if images:
        records = image_records([Path(i) for i in images])
    else:
        records = predictor.unlabeled() if part == "unlabeled" else predictor.validation().records
    summary = predictor.predict(records, Path(out), draw_above=score, draw=draw)
    click.echo(f"{summary['images']} images, {summary['instances']} instances, {summary['drawn']} drawn: {out}")
    if summary["instances"] and not summary["reach_threshold"]:
        click.echo(f"no instance has a score of {score:g} or more; the overlays show the best of each image")
    write_json(json_path, summary)


def truth_and_results(annotations: str, predictions: str) -> tuple[Any, Any]:
    """Ground truth and predictions as ``evaluate.score`` takes them."""
    from pais_ray.data.annotations.cityscapes import read_results
    from pais_ray.data.sources.readers import read_truth

    truth = read_truth(annotations)
    if not Path(predictions).is_dir():
        return truth, predictions
    if isinstance(truth, str):
        raise click.UsageError(f"{predictions}: a folder of results goes with --annotations ROOT/gtFine/PART")
    return truth, read_results(predictions, truth)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder for the exported model.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "safetensors"]),
    default="onnx",
    show_default=True,
    help="safetensors: weights and config alone, which onnx writes too.",
)
@click.option(
    "--images", type=click.IntRange(min=1), help="Compare AP on the first so many validation images; default: all."
)
@json_option
@verb
def export(
    run: str, out: str, role: str, checkpoint: str, kind: str, images: int | None, json_path: str | None
) -> None:
    """RUN's model as OUT/model.onnx, which takes images of any size, beside its safetensors and config.

    OUT/run.py runs it with numpy, Pillow and onnxruntime. What ONNX and PyTorch say of the run's validation images is
    compared at the end; exit code 1 where they differ by more than the tolerance."""
    from pais_ray.inference.export import export as exporting

    manifest = exporting.export(
        Path(run), Path(out), role=role, checkpoint=checkpoint, onnx=kind == "onnx", images=images
    )
    if "parity" in manifest:
        click.echo(exporting.parity_table(manifest["parity"]))
    for name, facts in manifest["files"].items():
        click.echo(f"{Path(out) / name}: {facts['bytes'] / 1e6:.1f} MB")
    write_json(json_path, manifest)
    if "parity" in manifest and not manifest["parity"]["holds"]:
        click.echo(f"error: {out}: ONNX and PyTorch differ by more than the tolerance", err=True)
        raise click.exceptions.Exit(FAILED)
