"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pais_ray.data.splits import SplitManifest

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
    from pais_ray.evaluate import score, table

    if predictions is not None:
        if annotations is None or run is not None:
            raise click.UsageError("--predictions goes with --annotations and without RUN")
        scores = score(*truth_and_results(annotations, predictions))
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


@main.group(invoke_without_command=True)
@click.option("--annotations", type=click.Path(), help="COCO JSON of the training images, or Cityscapes' gtFine/train.")
@click.option("--protocol", type=click.Choice(["coco", "cityscapes"]), help="The paper's shares and folds.")
@click.option("--labeled", type=float, multiple=True, help="Share of the images to label, 0.1; repeatable.")
@click.option("--fold", type=int, multiple=True, help="Which draw; repeatable. Default: the protocol's, or 1.")
@click.option("--unlabeled", help="COCO JSON or folder of other images: all of --annotations labeled (100 %).")
@click.option("--cover", is_flag=True, help="See that every class is labeled, instead of a plain random draw.")
@click.option("--out", type=click.Path(file_okay=False), help="Directory for the manifests.")
@json_option
@click.pass_context
@verb
def split(
    context: click.Context,
    annotations: str | None,
    protocol: str | None,
    labeled: tuple[float, ...],
    fold: tuple[int, ...],
    unlabeled: str | None,
    cover: bool,
    out: str | None,
    json_path: str | None,
) -> None:
    """Which images are labeled, as manifests for data.split: `split --annotations A.json --protocol coco --out DIR`.

    Needs the annotations, no images. Equal input gives equal files, wherever and in whatever order it is read."""
    if context.invoked_subcommand is not None:
        return
    if annotations is None or out is None or not (protocol or labeled or unlabeled):
        raise click.UsageError("give --annotations, --out and one of --protocol, --labeled, --unlabeled")
    from pais_ray.data.formats import read_annotations
    from pais_ray.data.sources import read_unlabeled
    from pais_ray.data.splits import draw

    others = None if unlabeled is None else read_unlabeled(unlabeled, None, look=False)
    made = draw(read_annotations(annotations), protocol, labeled, fold, others, cover=cover)
    write_manifests(made, Path(out), protocol or "labeled", json_path)


@split.command("import")
@click.argument("published", type=click.Path(exists=True, dir_okay=False))
@click.option("--annotations", type=click.Path(), required=True, help="The COCO JSON that the lists were made for.")
@click.option("--labeled", type=float, multiple=True, help="Only these shares, 0.01; repeatable. Default: all.")
@click.option("--fold", type=int, multiple=True, help="Only these seeds; repeatable. Default: all.")
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Directory for the manifests.")
@json_option
@verb
def split_import(
    published: str,
    annotations: str,
    labeled: tuple[float, ...],
    fold: tuple[int, ...],
    out: str,
    json_path: str | None,
) -> None:
    """Manifests of a PUBLISHED file: Unbiased Teacher's COCO_supervision.txt, or the labeled file of a pair
    instances_train2017.SEED@PERCENT.json / -unlabeled.json (SoftTeacher, STAC)."""
    from pais_ray.data.formats import read_annotations
    from pais_ray.data.split_lists import import_splits

    made = import_splits(published, read_annotations(annotations), labeled, fold)
    write_manifests(made, Path(out), Path(published).name.split(".")[0].lower(), json_path)


@split.command("diff")
@click.argument("a", type=click.Path(exists=True, dir_okay=False))
@click.argument("b", type=click.Path(exists=True, dir_okay=False))
@json_option
@verb
def split_diff(a: str, b: str, json_path: str | None) -> None:
    """What two manifests have in common; exit code 1 where they differ, as with diff."""
    from pais_ray.data.splits import difference, read_manifest

    tree = difference(read_manifest(a), read_manifest(b))
    write_json(json_path, tree)
    click.echo(f"A {a}\nB {b}")
    click.echo("annotations: " + ("the same" if tree["same_source"] else "others: ids may mean other images"))
    for part in ("labeled_ids", "unlabeled_ids"):
        found = tree[part]
        numbers = f"{found['both']} in both, {len(found['only_a'])} in A only, {len(found['only_b'])} in B only"
        click.echo(f"{part.removesuffix('_ids')}: {numbers}")
    changed = {name: counts for name, counts in tree["classes"].items() if counts[0] != counts[1]}
    for name, (in_a, in_b) in changed.items():
        click.echo(f"  {name}: {in_a} -> {in_b} labeled instances")
    click.echo("the same split" if tree["same"] else "not the same split")
    if not tree["same"]:
        sys.exit(FAILED)


def truth_and_results(annotations: str, predictions: str) -> tuple[Any, Any]:
    """Ground truth and predictions as ``evaluate.score`` takes them."""
    from pais_ray.data.cityscapes import read_results
    from pais_ray.data.formats import read_truth

    truth = read_truth(annotations)
    if not Path(predictions).is_dir():
        return truth, predictions
    if isinstance(truth, str):
        raise click.UsageError(f"{predictions}: a folder of results goes with --annotations ROOT/gtFine/PART")
    return truth, read_results(predictions, truth)


def write_manifests(made: Sequence["SplitManifest"], out: Path, name: str, json_path: str | None) -> None:
    """One file each, named by share and fold, and a line on what it holds."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for manifest in made:
        split = manifest.split
        path = out / f"{name}_{100 * split.labeled:g}pct_fold{split.fold}.json"
        path.write_text(manifest.to_json(), encoding="utf-8")
        counts = f"{len(split.labeled_ids)} labeled + {len(split.unlabeled_ids)} unlabeled"
        absent = f", no instance of {', '.join(manifest.absent)}" if manifest.absent else ""
        click.echo(f"{path}: {counts}, sha256 {split.sha256[:12]}{absent}")
        rows.append({"path": str(path), "labeled": split.labeled, "fold": split.fold, "sha256": split.sha256})
    write_json(json_path, {"manifests": rows})


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
    from pais_ray.data.formats import images_of
    from pais_ray.data.report import Part
    from pais_ray.data.validate import DataError

    data = compose_data(words)
    if data.train is None:
        raise ValueError("data.train: null is the generated data set, which needs no check; set it to a COCO JSON")
    (train, train_images), (val, val_images) = (
        (annotations, images_of(annotations, images)) for annotations, images in (data.part("train"), data.part("val"))
    )
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
