"""`pais-ray export`: a trained model as a folder that serves it."""

from pathlib import Path

import click

from pais_ray.cli.common import FAILED, json_option, verb, write_json


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
    from pais_ray import export

    manifest = export.export(Path(run), Path(out), role=role, checkpoint=checkpoint, onnx=kind == "onnx", images=images)
    if "parity" in manifest:
        click.echo(export.parity_table(manifest["parity"]))
    for name, facts in manifest["files"].items():
        click.echo(f"{Path(out) / name}: {facts['bytes'] / 1e6:.1f} MB")
    write_json(json_path, manifest)
    if "parity" in manifest and not manifest["parity"]["holds"]:
        click.echo(f"error: {out}: ONNX and PyTorch differ by more than the tolerance", err=True)
        raise click.exceptions.Exit(FAILED)
