"""The verb `validate`: find the errors of a data set before training does."""

import sys
from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, WORDS, echo, json_option, progress, verb


@click.command(
    short_help="Find errors in a data set before training.",
    help="Find errors in a data set before they cost GPU time: in the data set of WORDS (section data:), or"
    " in one COCO file. The exit code is 0 without errors, 1 with errors, and 2 for wrong usage. See"
    " docs/reference/data_rules.md.\n\n" + WORDS,
)
@click.argument("words", nargs=-1)
@click.option(
    "--annotations",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, readable=False),
    help="A COCO annotation file to validate instead of WORDS.",
)
@click.option(
    "--images",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, readable=False),
    help="Folder of the images of --annotations. Without it, only the annotations are checked.",
)
@click.option("--fix", metavar="FILE", type=click.Path(dir_okay=False), help="Write a repaired copy of --annotations.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    help="Maximum number of pixels per image, like data.max_pixels in WORDS.",
)
@click.option("--max-instances", type=click.IntRange(min=1), help="Maximum number of annotations per image.")
@click.option(
    "--max-json-gib", type=click.FloatRange(min=0, min_open=True), help="Maximum memory of a parsed file, in GiB."
)
@json_option
@verb
def validate(
    words: tuple[str, ...],
    annotations: str | None,
    images: str | None,
    fix: str | None,
    json_path: str | None,
    **limits_given: float | None,
) -> None:
    given = {name: value for name, value in limits_given.items() if value is not None}
    if bool(words) == (annotations is not None):
        raise click.UsageError("expected one of WORDS and --annotations")
    if words and (images or fix or given):
        raise click.UsageError(
            "--images, --fix and limits require --annotations; with WORDS, set data.images, data.max_pixels and so on"
        )
    check_targets(annotations, fix, json_path)
    from pais_ray.data.validation import report as reports
    from pais_ray.data.validation.rules import MAX_PIXELS, Limits

    scored = None
    if words:
        parts, limits, scored = data_parts(words)
    else:
        if given.get("max_pixels", 0) > 2 * MAX_PIXELS:
            raise click.UsageError(f"--max-pixels: expected at most {2 * MAX_PIXELS}, the limit of Pillow")
        parts, limits = [reports.Part(name="file", annotations=annotations, images=images)], Limits(**given)  # type: ignore[arg-type]
    report = reports.examine(parts, limits, progress, scored)
    echo(report.table())
    more: dict[str, Any] = {}
    if fix is not None and annotations is not None:
        more["changes"] = write_repaired(annotations, fix, images, limits, report.broken)
    if json_path is not None:
        try:
            report.write(json_path, **more)
        except OSError as error:
            raise click.UsageError(f"--json {json_path}: {error}") from error
    if report.number("error"):
        sys.exit(FAILED)


def check_targets(source: str | None, *targets: str | None) -> None:
    """Raise UsageError if a target is the source or another target, or if its path is invalid."""
    paths = [Path(path) for path in (source, *targets) if path is not None]
    try:
        exists = [path.exists() for path in paths]
        for i, path in enumerate(paths):
            for j, other in enumerate(paths[:i]):
                if path.absolute() == other.absolute() or (exists[i] and exists[j] and path.samefile(other)):
                    message = f"expected different files, got {other} and {path}; the source is never changed"
                    raise click.UsageError(message)
    except OSError as error:  # the name is too long, or a folder is not readable
        raise click.UsageError(str(error)) from error


def data_parts(words: tuple[str, ...]) -> tuple[list[Any], Any, str | None]:
    """The parts, the limits and the scored masks of the data set that ``words`` describe.

    Raises DataError if a path does not exist, and ValueError for the generated data set."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose_data
    from pais_ray.data.annotations.splits import read_manifest
    from pais_ray.data.sources.readers import images_of
    from pais_ray.data.validation.entries import check_folder
    from pais_ray.data.validation.report import Part
    from pais_ray.data.validation.rules import DataError
    from pais_ray.files.storage import is_url

    resolved = expand_words(words)
    for line in resolved.found:
        echo(line)
    data = compose_data(resolved.words)
    if data.train is None:
        raise ValueError("data.train: expected a COCO JSON, got null, which is the generated data set")
    train, images = data.part("train")
    draw: dict[str, Any] = {"labeled": data.labeled, "fold": data.fold, "holdout": data.holdout}
    if data.split is not None:
        draw["split"] = read_manifest(data.split).split
    parts = [Part(name="train", annotations=train, images=images_of(train, images), **draw)]
    if data.val is not None:
        val, images = data.part("val")
        parts.append(Part(name="val", annotations=val, images=images_of(val, images)))
    if data.unlabeled is not None:
        folder = is_url(data.unlabeled) or Path(data.unlabeled).is_dir()
        images = data.unlabeled if folder else data.unlabeled_images or data.images
        source = None if folder else data.unlabeled
        if source is not None:
            check_folder(images, source)
        parts.append(Part(name="unlabeled", annotations=source, images=images, labels=False))
    for path in (data.pseudo_labels, *(path for part in parts for path in (part.annotations, part.images))):
        if path is not None and not is_url(path) and not Path(path).exists():
            raise DataError("file-missing", path, "there is no such file or folder")
    return parts, data.limits(), data.pseudo_labels


def write_repaired(
    source: str, out: str, images: str | None, limits: Any, broken: dict[int, str]
) -> list[dict[str, str]]:
    """Write the repaired copy, print the first changes and return all of them."""
    from pais_ray.data.validation.repair import repair
    from pais_ray.data.validation.rules import DataError

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
