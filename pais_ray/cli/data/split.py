"""The verb `split`: choose which images are labeled, as manifests for data.split."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pais_ray.cli.options import FAILED, echo, json_option, verb, write_json

if TYPE_CHECKING:
    from pais_ray.data.annotations.splits import SplitManifest


class DataFirst(click.Group):
    """Accepts `data=FOLDER`, which the verbs with WORDS accept, as the option --data."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f"--{arg}" if arg.startswith("data=") else arg for arg in args])


@click.group(
    cls=DataFirst, invoke_without_command=True, short_help="Choose which images are labeled, as reusable manifests."
)
@click.option(
    "--annotations",
    metavar="PATH",
    type=click.Path(),
    help="Annotations of the training images: a COCO JSON, or the folder gtFine/train of Cityscapes.",
)
@click.option(
    "--data",
    metavar="FOLDER",
    help="Folder of a data set, instead of --annotations. It can also be written data=FOLDER.",
)
@click.option(
    "--protocol", type=click.Choice(["coco", "cityscapes"]), help="Use the shares and folds of the paper's protocol."
)
@click.option(
    "--labeled",
    metavar="SHARE",
    type=float,
    multiple=True,
    help="Share of the images that are labeled, such as 0.1. Repeatable.",
)
@click.option(
    "--fold",
    metavar="NUMBER",
    type=int,
    multiple=True,
    help="Number that selects the random draw. Repeatable. Default: those of the protocol, or 1.",
)
@click.option(
    "--unlabeled",
    metavar="PATH",
    help="COCO JSON or folder of additional images, which are unlabeled. All images of --annotations are then labeled.",
)
@click.option(
    "--holdout",
    metavar="SHARE",
    type=float,
    help="Share of the images that are reserved for validation before the draw, such as 0.2.",
)
@click.option("--cover", is_flag=True, help="Draw so that every class is labeled, instead of uniformly at random.")
@click.option("--out", metavar="FOLDER", type=click.Path(file_okay=False), help="Folder for the manifests.")
@json_option
@click.pass_context
@verb
def split(
    context: click.Context,
    annotations: str | None,
    data: str | None,
    protocol: str | None,
    labeled: tuple[float, ...],
    fold: tuple[int, ...],
    unlabeled: str | None,
    holdout: float | None,
    cover: bool,
    out: str | None,
    json_path: str | None,
) -> None:
    """Choose which images are labeled, and write manifests for data.split.

    Example: `split --annotations A.json --protocol coco --out DIR`. Only annotations are read, no images. The same
    annotations give the same manifests on every machine, in whatever order they are listed."""
    if context.invoked_subcommand is not None:
        return
    if (annotations is None) == (data is None) or out is None:
        raise click.UsageError("expected --out, and one of --annotations and data=FOLDER")
    if data is None and not (protocol or labeled or unlabeled):
        raise click.UsageError("expected one of --protocol, --labeled, --unlabeled")
    if data is not None and unlabeled is not None:
        raise click.UsageError("--unlabeled requires --annotations; data=FOLDER implies its own unlabeled images")
    from pais_ray.data.annotations.coco import read_unlabeled
    from pais_ray.data.annotations.splits import draw
    from pais_ray.data.sources.readers import read_annotations

    if annotations is None:
        made = draw_of_folder(str(data), protocol, labeled, fold, holdout, cover)
    else:
        others = None if unlabeled is None else read_unlabeled(unlabeled, None, check_files=False)
        made = draw(read_annotations(annotations), protocol, labeled, fold, others, cover=cover, holdout=holdout)
    write_manifests(made, Path(out), protocol or "labeled", json_path)


def draw_of_folder(
    folder: str,
    protocol: str | None,
    labeled: tuple[float, ...],
    fold: tuple[int, ...],
    holdout: float | None,
    cover: bool,
) -> "list[SplitManifest]":
    """The manifests of the data set in ``folder`` for the given shares, or for all labels.

    If the data set has its own unlabeled images, they and the images that lose their labels are the unlabeled part."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose_data
    from pais_ray.data.annotations.coco import read_unlabeled
    from pais_ray.data.annotations.splits import draw, manifest, with_remaining
    from pais_ray.data.sources.readers import read_labeled

    resolved = expand_words([f"data={folder}"] + ([] if holdout is None else [f"data.holdout={holdout}"]))
    for line in resolved.found:
        echo(line)
    data = compose_data(resolved.words)
    train = read_labeled(*data.part("train"))
    shares = labeled or (() if protocol else (1.0,))
    made = draw(train, protocol, shares, fold, cover=cover, holdout=data.holdout)
    if data.unlabeled is None:
        return made
    others = read_unlabeled(data.unlabeled, data.unlabeled_images or data.images)
    val = read_labeled(*data.part("val")).records if not data.holds_out else ()
    return [manifest(with_remaining(m.split, train, others, val), train, m.sampling) for m in made]


@split.command("import", short_help="Convert published splits to manifests.")
@click.argument("published", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--annotations", metavar="FILE", type=click.Path(), required=True, help="The COCO JSON that the splits refer to."
)
@click.option(
    "--labeled",
    metavar="SHARE",
    type=float,
    multiple=True,
    help="Share to import, such as 0.01. Repeatable. Default: all.",
)
@click.option("--fold", metavar="NUMBER", type=int, multiple=True, help="Seed to import. Repeatable. Default: all.")
@click.option(
    "--out", metavar="FOLDER", type=click.Path(file_okay=False), required=True, help="Folder for the manifests."
)
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
    """Convert the splits in the file PUBLISHED to manifests.

    PUBLISHED is COCO_supervision.txt of Unbiased Teacher, or the labeled file of a pair
    instances_train2017.SEED@PERCENT.json and -unlabeled.json of SoftTeacher or STAC."""
    from pais_ray.data.sources.published_splits import import_splits
    from pais_ray.data.sources.readers import read_annotations

    made = import_splits(published, read_annotations(annotations), labeled, fold)
    write_manifests(made, Path(out), Path(published).name.split(".")[0].lower(), json_path)


@split.command("diff", short_help="Compare two manifests.")
@click.argument("a", type=click.Path(exists=True, dir_okay=False))
@click.argument("b", type=click.Path(exists=True, dir_okay=False))
@json_option
@verb
def split_diff(a: str, b: str, json_path: str | None) -> None:
    """Print what the manifests A and B have in common. The exit code is 1 if they differ."""
    from pais_ray.data.annotations.splits import difference, read_manifest

    tree = difference(read_manifest(a), read_manifest(b))
    write_json(json_path, tree)
    echo(f"A {a}\nB {b}")
    echo(
        "annotations: " + ("the same" if tree["same_source"] else "different, so the same id can mean different images")
    )
    for part in ("labeled_ids", "unlabeled_ids", "held_out_ids"):
        found = tree[part]
        numbers = f"{found['both']} in both, {len(found['only_a'])} in A only, {len(found['only_b'])} in B only"
        echo(f"{part.removesuffix('_ids')}: {numbers}")
    changed = {name: counts for name, counts in tree["classes"].items() if counts[0] != counts[1]}
    for name, (in_a, in_b) in changed.items():
        echo(f"  {name}: {in_a} -> {in_b} labeled instances")
    echo("the splits are the same" if tree["same"] else "the splits differ")
    if not tree["same"]:
        sys.exit(FAILED)


def write_manifests(made: Sequence["SplitManifest"], out: Path, name: str, json_path: str | None) -> None:
    """Write one file per manifest, named by share and fold, and print one line about each."""
    rows = []
    for manifest in made:
        split = manifest.split
        path = out / f"{name}_{100 * split.labeled:g}pct_fold{split.fold}.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(manifest.to_json(), encoding="utf-8")
        except OSError as error:
            raise click.UsageError(f"--out {out}: {error}") from error
        counts = f"{len(split.labeled_ids)} labeled + {len(split.unlabeled_ids)} unlabeled"
        counts += f" + {len(split.held_out_ids)} held out" if split.held_out_ids else ""
        absent = f", no instance of {', '.join(manifest.absent)}" if manifest.absent else ""
        echo(f"{path}: {counts}, sha256 {split.sha256[:12]}{absent}")
        rows.append({"path": str(path), "labeled": split.labeled, "fold": split.fold, "sha256": split.sha256})
    write_json(json_path, {"manifests": rows})
