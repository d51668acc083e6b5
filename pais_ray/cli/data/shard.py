"""`pais-ray shard`: a data set as files to stream."""

from typing import TYPE_CHECKING

import click

from pais_ray.cli.options import WORDS, echo, json_option, progress, verb, write_json

if TYPE_CHECKING:
    from pais_ray.data.shards.writer import Source


@click.command(
    help="Write the data set of WORDS (the section data: alone counts) as shards: Parquet files that training streams"
    " from a disk or an object store, with data.train=URL. Where WORDS choose a split (data.labeled, data.split), the"
    " shards hold it. The same command again completes what was interrupted."
    " docs/guides/shards.md explains the format.\n\n" + WORDS
)
@click.argument("words", nargs=-1, required=True)
@click.option("--out", required=True, help="Folder or URL (s3://BUCKET/PREFIX) to write to; new or empty.")
@click.option(
    "--rows-per-group", type=click.IntRange(min=1), help="Images read at a time; default: 5 MiB of them, at most 32."
)
@click.option("--rows-per-file", type=click.IntRange(min=1), default=1024, show_default=True, help="Images a file.")
@json_option
@verb
def shard(
    words: tuple[str, ...], out: str, rows_per_group: int | None, rows_per_file: int, json_path: str | None
) -> None:
    from pais_ray.data.shards.writer import write_shards

    made = write_shards(
        out, source_of(words), rows_per_group=rows_per_group, rows_per_file=rows_per_file, progress=progress
    )
    size = sum(file.bytes for file in made.files)
    for part, images in made.parts.items():
        echo(f"{part:<10} {images:>8} images")
    echo(f"{len(made.files)} files, {size / 2**20:.1f} MiB, row groups of {made.rows_per_group}: data.train={out}")
    write_json(json_path, {"out": out, "parts": made.parts, "files": len(made.files), "bytes": size})


def source_of(words: tuple[str, ...]) -> "Source":
    """The data set that ``words`` spell."""
    from pais_ray.config.overlays import expand_words
    from pais_ray.config.tree import compose_data
    from pais_ray.data.shards.dataset import is_shards
    from pais_ray.data.shards.writer import Source
    from pais_ray.data.validation import entries
    from pais_ray.runs.prepare import read_data

    spelt = expand_words(words)
    for line in spelt.found:
        echo(line)
    config = compose_data(spelt.words).model_copy(update={"pseudo_labels": None})
    if config.train is None:
        raise ValueError("data.train: null is the generated data set; set it to annotations of your own")
    if is_shards(config.train) or is_shards(config.val):
        raise ValueError(f"data.train: expected annotations, got shards: {config.train}; copy their folder as it is")
    data = read_data(config)
    chosen = config.labeled < 1 or config.split is not None or config.holdout is not None
    unlabeled = {"unlabeled": data.unlabeled} if data.unlabeled else {}
    return Source(
        train=data.train,
        parts={"labeled" if chosen else "train": data.labeled, **unlabeled, "val": data.val},
        truth=entries.read_tree(data.truth, config.limits())[0] if isinstance(data.truth, str) else data.truth,
        split=data.manifest if chosen else None,
        limits=config.limits(),
    )
