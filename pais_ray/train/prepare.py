"""A run's data: read, split, and generated where none is given. No Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pais_ray.config import Config, ConfigError, DataConfig
from pais_ray.data import entries, formats, shards, sources, splits, synthetic


@dataclass(frozen=True, kw_only=True)
class Data:
    """A run's data, read and split. Parts that lie in shards are in the order they lie there."""

    train: sources.CocoDataset
    labeled: tuple[sources.LabeledRecord | sources.ShardRecord, ...]
    unlabeled: tuple[sources.Record, ...]
    val: tuple[sources.Record, ...]
    truth: str | dict[str, Any]  # of the validation images: a COCO file, or its content
    manifest: splits.SplitManifest
    labeled_groups: tuple[int, ...] | None  # images of the part in each row group, where it lies in shards
    unlabeled_groups: tuple[int, ...] | None
    shards_sha256: str | None  # of the shards' manifest


def prepare(config: Config) -> tuple[Config, Data]:
    """Reads annotations, makes the split, and generates the embedded data set where none is given."""
    if config.data.train is None:
        config = embedded(config)
    data = read_data(config.data)
    split = data.manifest.split
    # What a manifest says is what the run did.
    told = config.data.model_copy(update={"labeled": split.labeled, "fold": split.fold})
    config = config.model_copy(update={"data": told})
    if config.method.uses_unlabeled and not data.unlabeled:
        remedy = "set data.unlabeled, or label fewer with data.labeled or data.split"
        raise ConfigError(f"data: {config.method.name} needs unlabeled images and there are none; {remedy}")
    return config, data


def read_data(data: DataConfig) -> Data:
    """The data that the section `data:` spells, which names a training set."""
    limits = data.limits()
    train = formats.read_labeled(*data.part("train"), limits, "train")
    val = formats.read_labeled(*data.part("val"), limits, "val")
    names, val_names = ({c.id: c.name for c in part.categories} for part in (train, val))
    entries.check_same_categories(val_names, val.path, names, train.path)
    others: tuple[sources.Record, ...] | None = None
    if data.unlabeled is not None:
        others = sources.read_unlabeled(data.unlabeled, data.unlabeled_images or data.images, limits)
    elif isinstance(train, shards.ShardDataset):
        others = train.unlabeled
    manifest = split_of(data, train, others)
    by_id = {r.image_id: r for r in train.records}
    labeled, labeled_groups = shards.by_group([by_id[i] for i in manifest.split.labeled_ids])
    if others is None:
        others = tuple(sources.unlabel(by_id[i]) for i in manifest.split.unlabeled_ids)
    unlabeled, unlabeled_groups = shards.by_group(others)
    return Data(
        train=train,
        labeled=labeled,
        unlabeled=unlabeled,
        val=tuple(sources.unlabel(r) for r in val.records),
        truth=val.truth,
        manifest=manifest,
        labeled_groups=labeled_groups,
        unlabeled_groups=unlabeled_groups,
        shards_sha256=train.manifest_sha256 if isinstance(train, shards.ShardDataset) else None,
    )


def split_of(
    data: DataConfig, train: sources.CocoDataset, others: tuple[sources.Record, ...] | None
) -> splits.SplitManifest:
    """The manifest that the section `data:` asks for, or the one that shards were written with. Raises ValueError."""
    if not isinstance(train, shards.ShardDataset) or train.split is None:
        return splits.for_run(train, data.labeled, data.fold, data.split, others)
    made, split = train.split, train.split.split
    asked = (data.labeled, data.fold)
    if data.split is not None and splits.read_manifest(data.split).split.sha256 != split.sha256:
        raise ConfigError(f"data.split: {train.path} was written with another split; leave data.split unset")
    if data.labeled < 1 and asked != (split.labeled, split.fold):
        raise ConfigError(
            f"data.labeled: {train.path} was written with labeled={split.labeled:g}, fold={split.fold}, and asked for "
            f"are {data.labeled:g}, {data.fold}; give those, or write shards of this split or of all labels"
        )
    if data.unlabeled is not None and others is not None:
        made = splits.manifest(splits.with_unlabeled(split, others), train, made.sampling)
    return made


def embedded(config: Config) -> Config:
    """``config`` with the generated data set as its data; the set is made where it is not there yet."""
    folder = Path(config.run.storage_path).absolute() / "synthetic"
    synthetic.generate(str(folder))
    paths = {
        "train": str(folder / "train.json"),
        "val": str(folder / "val.json"),
        "images": str(folder / "images"),
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})
