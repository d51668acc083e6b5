"""Verbs on a cluster: submit, batch-predict."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, checkpoint_option, json_option, role_option, verb, write_json
from pais_ray.cli.search_pipeline import search
from pais_ray.cli.training import train, tune, tune_options

JOB_VERBS = {  # name of a job -> verb of `pais-ray`
    "audit": "audit",
    "batch-predict": "batch-predict",
    "predict": "batch-predict",
    "search": "search",
    "tables": "tables",
    "train": "train",
    "tune": "tune",
}


@click.command(short_help="Run a verb as a job on a Ray cluster.", context_settings={"ignore_unknown_options": True})
@click.argument("job", metavar="VERB")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    help="Address of the dashboard on the cluster's head node.",
)
@click.option(
    "--include",
    metavar="PATH",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder to send along, such as YAML files, manifests or a package with your own method. Repeatable.",
)
@click.option(
    "--num-gpus",
    type=float,
    help="Number of GPUs for the program itself; audit uses one. Workers reserve their own.",
)
@verb
def submit(job: str, words: tuple[str, ...], address: str, include: tuple[Path, ...], num_gpus: float) -> None:
    """Run `pais-ray VERB WORDS` as a job on a Ray cluster: train, tune, search, batch-predict, audit or tables.

    VERB may also be a program of your own in pipelines/. Prints the log; the exit code is that of the job. Ctrl-C
    leaves the job running."""
    check_words(job, words)
    from pais_ray.cluster import jobs, ray_compat

    command = job_command(job, words, jobs.pipelines())
    jobs.check_address(address)
    files = jobs.working_dir_files([*include, *jobs.local_files(words)])
    archive = jobs.pack(files)
    size, limit = jobs.format_mib(len(archive)), jobs.format_mib(ray_compat.UPLOAD_LIMIT)
    click.echo(f"working_dir: {len(files)} files, {size} of {limit}")
    client = jobs.connect(address)
    job_id = jobs.submit(client, command, job, archive, num_gpus)
    click.echo(f"job {job_id} submitted\n{jobs.job_commands(job_id, address)}")
    try:
        status = jobs.stream_logs(client, job_id)
    except (KeyboardInterrupt, ConnectionError) as error:
        reason = str(error) or "the log is no longer shown"
        click.echo(f"{reason}; the job keeps running\n{jobs.job_commands(job_id, address)}", err=True)
        sys.exit(FAILED)
    sys.exit(status)


def job_command(job: str, words: Sequence[str], programs: dict[str, Path]) -> list[str]:
    """The command line of a job: a verb of `pais-ray`, or a program of pipelines/. Raises UsageError for neither."""
    if job in JOB_VERBS:
        return ["python", "-m", "pais_ray.cli", JOB_VERBS[job], *words]
    if job in programs:
        return ["python", f"pipelines/{job}.py", *words]
    raise click.UsageError(f"no such job {job!r}; choose one of {', '.join(sorted({*JOB_VERBS, *programs}))}")


def check_words(job: str, words: tuple[str, ...]) -> None:
    """Raises the errors that training or a search would raise a minute later on the cluster."""
    from pais_ray.config.tree import compose
    from pais_ray.runs.prepare import check_outlives_job

    if job == "search":
        words = search.make_context("search", list(words)).params["words"]
    if job == "train":
        check_outlives_job(compose(train.make_context("train", list(words)).params["words"]))
    elif job in ("search", "tune"):
        from pais_ray.search.plan import make_plan

        given = tune.make_context("tune", list(words)).params
        check_outlives_job(make_plan(given["words"], tune_options(given)).base)


@click.command("batch-predict", short_help="Predict instances in many images on a cluster.")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("source")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the results, which every node must see under the same path.",
)
@click.option(
    "--images", metavar="PATH", help="Folder or bucket prefix of the images, required if SOURCE is a COCO JSON."
)
@role_option
@checkpoint_option
@click.option(
    "--part-images",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Number of images per part. A part is written when all of its images are predicted.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Number of actors. Default: one per GPU with --use-gpu, else one fewer than the number of CPUs.",
)
@click.option("--use-gpu", is_flag=True, help="Reserve one GPU for each actor.")
@click.option(
    "--merge", is_flag=True, help="Also write OUT/results.json, which combines all parts, and OUT/images.json."
)
@json_option
@verb
def batch_predict(run: Path, source: str, out: Path, json_path: str | None, **options: Any) -> None:
    """Predict instances in all images of SOURCE with a pool of actors on the cluster.

    SOURCE is a folder, a bucket prefix (s3://..., gs://...) or a COCO JSON. Writes OUT/parts/part-NNNNNN.json, which
    are COCO results. The same command resumes after any interruption. The exit code is 1 if images could not be read
    or parts were not finished."""
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
