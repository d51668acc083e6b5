"""Verbs that use a trained model or its results: evaluate, predict, export."""

from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, checkpoint_option, device_option, json_option, role_option, verb, write_json


@click.command(short_help="Compute the AP of a checkpoint or of a results file.")
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option(
    "--annotations",
    metavar="PATH",
    type=click.Path(exists=True),
    help="Ground truth to evaluate on: a COCO JSON, or the folder gtFine/PART of Cityscapes.",
)
@click.option(
    "--images", metavar="FOLDER", type=click.Path(exists=True, file_okay=False), help="The images of --annotations."
)
@click.option(
    "--predictions",
    metavar="PATH",
    type=click.Path(exists=True),
    help="Results to score instead of a checkpoint: a COCO results JSON, or a folder of Cityscapes results.",
)
@role_option
@checkpoint_option
@device_option
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
    """Compute the COCO AP of a checkpoint of RUN, or of a results file.

    A checkpoint is evaluated on the validation images of its run, or on --annotations with --images. A results file
    needs no RUN: --annotations GT.json --predictions RESULTS.json. For Cityscapes, the instance AP
    of the Cityscapes evaluation script is computed as well."""
    from pais_ray.evaluation.scoring import format_table, score

    if predictions is not None:
        if annotations is None or run is not None:
            raise click.UsageError("--predictions requires --annotations and cannot be combined with RUN")
        scores = score(*read_truth_and_results(annotations, predictions))
    elif run is not None:
        from pais_ray.inference.predictor import Predictor

        predictor = Predictor.open(Path(run), role=role, checkpoint=checkpoint, device=device)
        scores = predictor.evaluate(annotations, images)
    else:
        raise click.UsageError("expected RUN, or --annotations with --predictions")
    click.echo(format_table(scores))
    write_json(json_path, scores)


@click.command(short_help="Predict instances in images with a trained model.")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("images", nargs=-1, type=click.Path(exists=True))
@click.option(
    "--part",
    type=click.Choice(["val", "unlabeled"]),
    default="val",
    show_default=True,
    help="Which images of the run to use if no IMAGES are given.",
)
@click.option(
    "--out", metavar="FOLDER", type=click.Path(file_okay=False), required=True, help="Folder for results and overlays."
)
@click.option(
    "--draw",
    metavar="NUMBER",
    type=click.IntRange(min=0),
    help="Number of images to draw overlays of. Default: all.",
)
@click.option(
    "--score",
    metavar="SCORE",
    default=0.5,
    show_default=True,
    help="Minimum score of a detection to be drawn. The results contain all detections.",
)
@role_option
@checkpoint_option
@device_option
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
    """Predict instances in IMAGES, which are files or folders, with a checkpoint of RUN.

    Without IMAGES, the validation images of the run are used, or its unlabeled images with --part unlabeled. Writes
    OUT/results.json (COCO results with the predicted mask IoU, which another run accepts as data.pseudo_labels),
    OUT/images.json (the file of each image id) and OUT/overlays/."""
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


def read_truth_and_results(annotations: str, predictions: str) -> tuple[Any, Any]:
    """Ground truth and predictions as ``evaluation.scoring.score`` takes them."""
    from pais_ray.data.annotations.cityscapes import read_results
    from pais_ray.data.sources.readers import read_truth

    truth = read_truth(annotations)
    if not Path(predictions).is_dir():
        return truth, predictions
    if isinstance(truth, str):
        raise click.UsageError(f"{predictions}: a folder of results requires --annotations ROOT/gtFine/PART")
    return truth, read_results(predictions, truth)


@click.command(short_help="Export a trained model as ONNX or safetensors.")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--out", metavar="FOLDER", type=click.Path(file_okay=False), required=True, help="Folder for the exported model."
)
@role_option
@checkpoint_option
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "safetensors"]),
    default="onnx",
    show_default=True,
    help="What to write: safetensors writes only weights and config; onnx writes the ONNX model as well.",
)
@click.option(
    "--images",
    metavar="NUMBER",
    type=click.IntRange(min=1),
    help="Number of validation images to compare the AP of ONNX and PyTorch on. Default: all.",
)
@json_option
@verb
def export(
    run: str, out: str, role: str, checkpoint: str, kind: str, images: int | None, json_path: str | None
) -> None:
    """Export a checkpoint of RUN as OUT/model.onnx, which accepts images of any size, with its weights and config.

    OUT/run.py runs the model with numpy, Pillow and onnxruntime only. At the end, the results of ONNX and PyTorch on
    the validation images of the run are compared. The exit code is 1 if they differ by more than the tolerance."""
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
