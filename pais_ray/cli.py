"""`pais-ray` verbs. Everything heavy is imported inside the verbs: `--help` answers at once."""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
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


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
