"""`pais-ray validate`: what is wrong with a data set."""

import sys
from pathlib import Path
from typing import Any

import click

from pais_ray.cli.options import FAILED, WORDS, echo, json_option, progress, verb


@click.command(
    help="What is wrong with a data set, before it costs GPU time: of WORDS (the section data: alone counts) or of"
    " one COCO file. Exit code 0: no errors, 1: errors, 2: wrong usage."
    " docs/reference/data_rules.md explains the rules.\n\n" + WORDS
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
    from pais_ray.data.validation import report as reports
    from pais_ray.data.validation.rules import MAX_PIXELS, Limits

    scored = None
    if words:
        parts, limits, scored = data_parts(words)
    else:
        if given.get("max_pixels", 0) > 2 * MAX_PIXELS:
            raise click.UsageError(f"--max-pixels: expected at most {2 * MAX_PIXELS}, where Pillow refuses")
        parts, limits = [reports.Part(name="file", annotations=annotations, images=images)], Limits(**given)  # type: ignore[arg-type]
    report = reports.examine(parts, limits, progress, scored)
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
    """What is written must be neither the source nor each other, and its name one that the disk takes."""
    paths = [Path(path) for path in (source, *targets) if path is not None]
    try:
        there = [path.exists() for path in paths]
        for i, path in enumerate(paths):
            for j, other in enumerate(paths[:i]):
                if path.absolute() == other.absolute() or (there[i] and there[j] and path.samefile(other)):
                    message = f"expected different files, got {other} and {path}; the source is never changed"
                    raise click.UsageError(message)
    except OSError as error:  # too long a name, or a folder that may not be looked into
        raise click.UsageError(str(error)) from error


def data_parts(words: tuple[str, ...]) -> tuple[list[Any], Any, str | None]:
    """The parts of the data set that ``words`` spell, all of whose paths exist, its caps, and its scored masks."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose_data
    from pais_ray.data.annotations.splits import read_manifest
    from pais_ray.data.sources.readers import images_of
    from pais_ray.data.validation.entries import check_folder
    from pais_ray.data.validation.report import Part
    from pais_ray.data.validation.rules import DataError
    from pais_ray.files.storage import is_url

    spelt = expand_words(words)
    for line in spelt.found:
        echo(line)
    data = compose_data(spelt.words)
    if data.train is None:
        raise ValueError("data.train: null is the generated data set, which needs no check; set it to a COCO JSON")
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


def fixed(source: str, out: str, images: str | None, limits: Any, broken: dict[int, str]) -> list[dict[str, str]]:
    """Writes the repaired copy, tells the first changes and returns all."""
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
