"""Verbs on a cluster: submit, batch-predict."""

import argparse
import sys
from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, json_option, verb, write_json
from pais_ray.cli.training import train, tune


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("pipeline")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    help="The dashboard of the cluster's head.",
)
@click.option(
    "--include",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A file or folder to send along: YAML words, manifests, a package with your own method.",
)
@click.option("--num-gpus", type=float, help="GPUs for the program itself (audit); workers reserve their own.")
@verb
def submit(pipeline: str, words: tuple[str, ...], address: str, include: tuple[Path, ...], num_gpus: float) -> None:
    """Run PIPELINE (a program of pipelines/: train, search, audit, predict, tables) with WORDS as a job on a cluster.

    Follows the log; the exit code is the job's. Ctrl-C leaves the job running."""
    check_words(pipeline, words)
    from pais_ray.cluster import jobs

    if pipeline not in jobs.pipelines():
        raise click.UsageError(f"no pipeline {pipeline!r}; there are {', '.join(jobs.pipelines())}")
    jobs.check_address(address)
    files = jobs.contents([*include, *jobs.local_files(words)])
    archive = jobs.pack(files)
    click.echo(f"working_dir: {len(files)} files, {jobs.mib(len(archive))} of {jobs.mib(jobs.UPLOAD_LIMIT)}")
    client = jobs.connect(address)
    job = jobs.submit(client, pipeline, words, archive, num_gpus)
    click.echo(f"job {job} submitted\n{jobs.commands(job, address)}")
    try:
        status = jobs.follow(client, job)
    except (KeyboardInterrupt, ConnectionError) as error:
        click.echo(f"{str(error) or 'not followed any more'}; the job goes on\n{jobs.commands(job, address)}", err=True)
        sys.exit(FAILED)
    sys.exit(status)


def check_words(pipeline: str, words: tuple[str, ...]) -> None:
    """What training or a search would refuse a minute later, on the cluster."""
    from pais_ray.config.tree import compose
    from pais_ray.runs.prepare import check_outlives_job

    if pipeline == "train":
        check_outlives_job(compose(train.make_context("train", list(words)).params["words"]))
    elif pipeline == "search":
        from pais_ray.search.plan import Options, make_plan

        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # as the program reads it
        parser.add_argument("--model", nargs="?")
        own, told = parser.parse_known_args(words)
        if not own.model:
            raise click.UsageError("search: --model NAME is missing, the name of the registered model")
        given = tune.make_context("tune", told).params
        searched = given.pop("words")
        given.pop("json_path")
        check_outlives_job(make_plan(searched, Options(**given)).base)


@click.command("batch-predict")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("source")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Seen by every node.")
@click.option("--images", help="Where SOURCE is a COCO JSON: the folder or bucket prefix of its images.")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option("--part-images", type=click.IntRange(min=1), default=100, show_default=True, help="Images of a part.")
@click.option("--workers", type=click.IntRange(min=1), help="Actors; default: a GPU each, or all CPUs but one.")
@click.option("--use-gpu", is_flag=True, help="One GPU an actor.")
@click.option("--merge", is_flag=True, help="Also one OUT/results.json of all parts, with OUT/images.json.")
@json_option
@verb
def batch_predict(run: Path, source: str, out: Path, json_path: str | None, **options: Any) -> None:
    """Instances in all images of SOURCE, with a pool of actors on the cluster (pipelines/predict.py).

    SOURCE is a folder, a bucket prefix (s3://..., gs://...) or a COCO JSON. Writes OUT/parts/part-NNNNNN.json (COCO
    results); the same command goes on after any kill. Exit code 1 where images could not be read."""
    from pais_ray.inference.batch import batch_predict as predict_all

    summary = predict_all(run, source, out, **options)
    click.echo(f"{summary.images} images, {summary.instances} instances in {summary.parts} parts: {summary.out}")
    write_json(json_path, vars(summary))
    for entry in summary.unreadable[:10]:
        click.echo(f"not read: {entry['error']}", err=True)
    if summary.unreadable:
        click.echo(f"images not read: {len(summary.unreadable)}", err=True)
    for entry in summary.failed[:10]:
        click.echo(f"part {entry['part']}: {entry['error']}", err=True)
    if summary.failed:
        click.echo(f"parts not finished: {len(summary.failed)}; repeat the command to retry them", err=True)
    if summary.unreadable or summary.failed:
        sys.exit(FAILED)
