"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import click

OK, FAILED, WRONG_INPUT = 0, 1, 2
json_option = click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the result here.")
WORDS = """WORDS are names of files in configs/ (or paths to YAML files), applied left to right, then dotted
settings: `coco mask_rcnn pais data.labeled=0.01 train.seed=1`."""


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exit codes: 0 success, 1 failure of the work, 2 wrong usage or input; one clear line first."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(FAILED)
        except (ValueError, FileNotFoundError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(WRONG_INPUT)
        except Exception as error:
            click.echo(f"error: {type(error).__name__}: {error}", err=True)
            traceback.print_exc()
            sys.exit(FAILED)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Semi-supervised instance segmentation: few labeled images, many unlabeled ones."""


@main.command(help="Train, or resume the run of that run.name.\n\n" + WORDS)
@click.argument("words", nargs=-1)
@click.option("--force", is_flag=True, help="Resume even though identity settings differ from the run's start.")
@json_option
@verb
def train(words: tuple[str, ...], force: bool, json_path: str | None) -> None:
    from pais_ray.config import compose

    config = compose(words or ("quickstart",))
    from pais_ray.train import launch

    result = launch.train(config, force=force)
    write_json(json_path, result.to_json())
    click.echo(launch.summary(result, config))


@main.command(help="Resolved config, schedule and batch arithmetic.\n\n" + WORDS)
@click.argument("words", nargs=-1)
@json_option
@verb
def show(words: tuple[str, ...], json_path: str | None) -> None:
    from pais_ray.config import compose, dump, run_schedule

    config = compose(words)
    schedule = run_schedule(config)
    click.echo(dump(config), nl=False)
    click.echo("# " + schedule.explain().replace("\n", "\n# "))
    write_json(json_path, {"config": config.model_dump(mode="json"), "schedule": vars(schedule)})


@main.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--annotations", type=click.Path(exists=True, dir_okay=False), help="COCO ground truth JSON.")
@click.option("--images", type=click.Path(exists=True, file_okay=False), help="The ground truth's images.")
@click.option("--predictions", type=click.Path(exists=True, dir_okay=False), help="COCO results JSON to score.")
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
    results file: --annotations GT.json --predictions RESULTS.json."""
    from pais_ray.evaluate import score, table

    if predictions is not None:
        if annotations is None or run is not None:
            raise click.UsageError("--predictions goes with --annotations and without RUN")
        scores = score(annotations, predictions)
    elif run is not None:
        from pais_ray.inference import Predictor

        predictor = Predictor.open(Path(run), role=role, checkpoint=checkpoint, device=device)
        scores = predictor.evaluate(annotations, images)
    else:
        raise click.UsageError("give RUN, or --annotations with --predictions")
    click.echo(table(scores))
    write_json(json_path, scores)


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("images", nargs=-1, type=click.Path(exists=True))
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Directory for results and overlays.")
@click.option("--score", default=0.5, show_default=True, help="Detections below it are not drawn (all are written).")
@click.option("--role", type=click.Choice(["teacher", "student"]), default="teacher", show_default=True)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a checkpoint directory.")
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
@json_option
@verb
def predict(
    run: str,
    images: tuple[str, ...],
    out: str,
    score: float,
    role: str,
    checkpoint: str,
    device: str | None,
    json_path: str | None,
) -> None:
    """Instances in IMAGES (files or folders; default: the run's validation images).

    Writes OUT/results.json (COCO results), OUT/images.json (which id is which file) and OUT/overlays/."""
    from pais_ray.inference import Predictor

    predictor = Predictor.open(Path(run), role=role, checkpoint=checkpoint, device=device)
    summary = predictor.predict([Path(i) for i in images], Path(out), draw_above=score)
    click.echo(f"{summary['images']} images, {summary['instances']} instances: {out}")
    write_json(json_path, summary)


@main.command(
    help="What is wrong with a data set, before it costs GPU time: of WORDS (the section data: alone counts) or of"
    " one COCO file. Exit code 0: no errors, 1: errors, 2: wrong usage. docs/data.md explains the rules.\n\n" + WORDS
)
@click.argument("words", nargs=-1)
@click.option(
    "--annotations", type=click.Path(exists=True, dir_okay=False, readable=False), help="One COCO annotation file."
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, readable=False),
    help="The folder of its images; without it files are not looked at.",
)
@click.option("--fix", type=click.Path(dir_okay=False), help="Write a repaired copy of the COCO file here.")
@click.option("--max-pixels", type=click.IntRange(min=1), help="Cap on an image; like data.max_pixels of WORDS.")
@click.option("--max-instances", type=click.IntRange(min=1), help="Cap on the annotations of an image.")
@click.option("--max-json-gib", type=click.FloatRange(min=0, min_open=True), help="Cap on the parsed file's memory.")
@json_option
@verb
def validate(
    words: tuple[str, ...],
    annotations: str | None,
    images: str | None,
    fix: str | None,
    json_path: str | None,
    **caps: float | None,
) -> None:
    given = {name: value for name, value in caps.items() if value is not None}
    if bool(words) == (annotations is not None):
        raise click.UsageError("give WORDS or --annotations")
    if words and (images or fix or given):
        raise click.UsageError(
            "--images, --fix and caps go with --annotations; WORDS have data.images, data.max_pixels"
        )
    check_targets(annotations, fix, json_path)
    from pais_ray.data import report as reports
    from pais_ray.data.validate import MAX_PIXELS, Limits

    if words:
        parts, limits = data_parts(words)
    else:
        if given.get("max_pixels", 0) > 2 * MAX_PIXELS:
            raise click.UsageError(f"--max-pixels: expected at most {2 * MAX_PIXELS}, where Pillow refuses")
        parts, limits = [reports.Part(name="file", annotations=annotations, images=images)], Limits(**given)  # type: ignore[arg-type]
    report = reports.examine(parts, limits, progress)
    echo(report.table())
    more: dict[str, Any] = {}
    if fix is not None and annotations is not None:
        more["changes"] = fixed(annotations, fix, images, limits, report.broken)
    if json_path is not None:
        try:
            report.write(json_path, **more)
        except OSError as error:
            raise click.UsageError(f"--json {json_path}: {error}") from error
    if report.number("error"):
        sys.exit(FAILED)


def check_targets(source: str | None, *targets: str | None) -> None:
    """What is written must be neither the source nor each other."""
    paths = [Path(path) for path in (source, *targets) if path is not None]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if path.absolute() == other.absolute() or (path.exists() and other.exists() and path.samefile(other)):
                raise click.UsageError(f"expected different files, got {other} and {path}; the source is never changed")


def data_parts(words: tuple[str, ...]) -> tuple[list[Any], Any]:
    """The parts of the data set that ``words`` spell, all of whose paths exist, and its caps."""
    from pais_ray.config import compose_data
    from pais_ray.data.entries import check_folder
    from pais_ray.data.report import Part
    from pais_ray.data.validate import DataError

    data = compose_data(words)
    if data.train is None:
        raise ValueError("data.train: null is the generated data set, which needs no check; set it to a COCO JSON")
    (train, train_images), (val, val_images) = data.part("train"), data.part("val")
    parts = [
        Part(name="train", annotations=train, images=train_images, labeled=data.labeled, fold=data.fold),
        Part(name="val", annotations=val, images=val_images),
    ]
    if data.unlabeled is not None:
        folder = Path(data.unlabeled).is_dir()
        images = data.unlabeled if folder else data.unlabeled_images or data.images
        source = None if folder else data.unlabeled
        if source is not None:
            check_folder(images, source)
        parts.append(Part(name="unlabeled", annotations=source, images=images, labels=False))
    for path in (path for part in parts for path in (part.annotations, part.images)):
        if path is not None and not Path(path).exists():
            raise DataError("file-missing", path, "there is no such file or folder")
    return parts, data.limits()


def fixed(source: str, out: str, images: str | None, limits: Any, broken: dict[int, str]) -> list[dict[str, str]]:
    """Writes the repaired copy, tells the first changes and returns all."""
    from pais_ray.data.repair import repair
    from pais_ray.data.validate import DataError

    try:
        changes = repair(source, out, images, limits, broken)
    except OSError as error:
        raise click.UsageError(f"--fix {out}: {error}") from error
    except DataError as error:
        click.echo(f"not repaired: {error}", err=True)
        return []
    for change in changes[:10]:
        echo(f"{change.where}: {change.change} [{change.rule}]")
    if len(changes) > 10:
        echo("...")
    echo(f"changes: {len(changes)}, written to {out}")
    return [{"where": c.where, "rule": c.rule, "change": c.change} for c in changes]


def progress(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items, with a bar on a terminal."""
    if count == 0 or not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(items, length=count, label="images", file=sys.stderr) as bar:
        yield from bar


def echo(text: str) -> None:
    """Text with names from outside, whatever the terminal's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding))


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
