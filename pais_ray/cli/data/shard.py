"""The verb `shard`: write a data set as files that training streams."""

from typing import TYPE_CHECKING

import click

from pais_ray.cli.options import WORDS, echo, json_option, progress, verb, write_json

if TYPE_CHECKING:
    from pais_ray.data.shards.writer import Source


@click.command(
    short_help="Write a data set as shards that training streams.",
    help="Write the data set of WORDS as shards: Parquet files that training streams from a disk or an object store"
    " with data.train=URL. Only the section data: of WORDS is used. If it defines a split (data.labeled, data.split),"
    " the shards contain that split. If it is interrupted, the same command resumes it. See docs/guides/shards.md.\n\n"
    + WORDS,
)
@click.argument("words", nargs=-1, required=True)
@click.option(
    "--out",
    metavar="PLACE",
    required=True,
    help="Folder or URL (s3://BUCKET/PREFIX) to write to. It must be new or empty, except to resume.",
)
@click.option(
    "--rows-per-group",
    type=click.IntRange(min=1),
    help="Number of images that are read together. Default: as many as fit in 5 MiB, at most 32.",
)
@click.option(
    "--rows-per-file", type=click.IntRange(min=1), default=1024, show_default=True, help="Number of images per file."
)
@json_option
@verb
def shard(
    words: tuple[str, ...], out: str, rows_per_group: int | None, rows_per_file: int, json_path: str | None
) -> None:
    from pais_ray.data.shards.writer import write_shards

    written = write_shards(
        out, source_of(words), rows_per_group=rows_per_group, rows_per_file=rows_per_file, progress=progress
    )
    size = sum(file.bytes for file in written.files)
    for part, images in written.parts.items():
        echo(f"{part:<10} {images:>8} images")
    echo(
        f"{len(written.files)} files, {size / 2**20:.1f} MiB, row groups of {written.rows_per_group}: data.train={out}"
    )
    write_json(json_path, {"out": out, "parts": written.parts, "files": len(written.files), "bytes": size})


def source_of(words: tuple[str, ...]) -> "Source":
    """The data set that ``words`` describe. Raises ValueError for the generated data set and for shards."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose_data
    from pais_ray.data.shards.dataset import is_shard_folder
    from pais_ray.data.shards.writer import Source
    from pais_ray.data.validation import entries
    from pais_ray.runs.prepare import read_data

    resolved = expand_words(words)
    for line in resolved.found:
        echo(line)
    config = compose_data(resolved.words).model_copy(update={"pseudo_labels": None})
    if config.train is None:
        raise ValueError("data.train: expected annotations of your own, got null, which is the generated data set")
    if is_shard_folder(config.train) or is_shard_folder(config.val):
        raise ValueError(
            f"data.train: expected annotations, got shards: {config.train}; to move shards, copy their folder"
        )
    data = read_data(config)
    has_split = config.labeled < 1 or config.split is not None or config.holdout is not None
    unlabeled = {"unlabeled": data.unlabeled} if data.unlabeled else {}
    return Source(
        train=data.train,
        parts={"labeled" if has_split else "train": data.labeled, **unlabeled, "val": data.val},
        truth=entries.read_tree(data.truth, config.limits())[0] if isinstance(data.truth, str) else data.truth,
        split=data.manifest if has_split else None,
        limits=config.limits(),
    )
