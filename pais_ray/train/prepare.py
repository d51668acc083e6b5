"""A run's data: read, split, and generated where none is given. No Ray."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pais_ray.config import Config, ConfigError
from pais_ray.data import entries, formats, sources, splits, synthetic
from pais_ray.train import describe


@dataclass(frozen=True, kw_only=True)
class Data:
    """A run's data, read and split."""

    train: sources.CocoDataset
    labeled: tuple[sources.LabeledRecord, ...]
    unlabeled: tuple[sources.Record, ...]
    val: tuple[sources.Record, ...]
    truth: str | dict[str, Any]  # of the validation images: a COCO file, or its content
    manifest: splits.SplitManifest
    facts: dict[str, dict[str, Any]]  # of each part: name, source, sha256 and counts; the run's data.json


def prepare(config: Config) -> tuple[Config, Data]:
    """Reads annotations, makes the split, and generates the embedded data set where none is given."""
    if config.data.train is None:
        config = embedded(config)
    data = config.data
    limits = data.limits()
    train = formats.read_labeled(*data.part("train"), limits)
    val = formats.read_labeled(*data.part("val"), limits)
    names, val_names = ({c.id: c.name for c in part.categories} for part in (train, val))
    entries.check_same_categories(val_names, val.path, names, train.path)
    unlabeled = None
    if data.unlabeled is not None:
        unlabeled = sources.read_unlabeled(data.unlabeled, data.unlabeled_images or data.images, limits)
    manifest = splits.for_run(train, data.labeled, data.fold, data.split, unlabeled)
    if data.split is not None:  # what the manifest says is what the run did
        told = {"labeled": manifest.split.labeled, "fold": manifest.split.fold}
        config = config.model_copy(update={"data": data.model_copy(update=told)})
    by_id = {r.image_id: r for r in train.records}
    labeled = tuple(by_id[i] for i in manifest.split.labeled_ids)
    if unlabeled is None:
        unlabeled = tuple(sources.unlabel(by_id[i]) for i in manifest.split.unlabeled_ids)
    if config.method.uses_unlabeled and not unlabeled:
        remedy = "set data.unlabeled, or label fewer with data.labeled or data.split"
        raise ConfigError(f"data: {config.method.name} needs unlabeled images and there are none; {remedy}")
    # Workers may run elsewhere on the disk than the driver: absolute paths.
    val_records = tuple(replace(sources.unlabel(r), path=os.path.abspath(r.path)) for r in val.records)
    return config, Data(
        train=train,
        labeled=labeled,
        unlabeled=unlabeled,
        val=val_records,
        truth=val.truth,
        manifest=manifest,
        facts=describe.facts(config, train, val, manifest.split),
    )


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
