"""The Config of a run: typed sections, composed from config names and overrides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, Field, PlainValidator, SerializeAsAny, model_validator

from pais_ray.augmentation.presets import AugmentConfig, ViewSet
from pais_ray.config.data_section import DataConfig
from pais_ray.config.overlays import ConfigError, Dumper, Tree, resolve
from pais_ray.config.renamed import translate
from pais_ray.config.sections import (
    FREE,
    BatchConfig,
    GuardConfig,
    RunConfig,
    ScalingConfig,
    Section,
    TrainConfig,
)
from pais_ray.config.validation import list_choices, validate
from pais_ray.data.shards import dataset
from pais_ray.modeling import registry
from pais_ray.modeling.optim import OptimConfig, Schedule, plan_schedule
from pais_ray.modeling.protocols import Method, SegmentorConfig
from pais_ray.tracking.settings import TrackingConfig


def _plugin_settings(value: object) -> BaseModel:
    """Accept the settings of any plugin; compose() has validated them already."""
    if not (isinstance(value, BaseModel) and hasattr(value, "name")):
        raise ValueError(f"expected a pydantic model with a name, got {value!r}; compose() builds it from settings")
    return value


class Config(Section):
    """Every setting of a run. ``segmentor`` and ``method`` are the settings of the chosen plugins."""

    data: DataConfig = Field(
        default=DataConfig(), description="Training, validation and unlabeled images, and the share that keeps labels."
    )
    views: AugmentConfig = Field(
        default=AugmentConfig(), description="Resizing and augmentation of the labeled, weak, strong and test views."
    )
    batch: BatchConfig = Field(
        default=BatchConfig(), description="Images per worker and micro-batch, and micro-batches per optimizer step."
    )
    segmentor: SerializeAsAny[Annotated[SegmentorConfig, PlainValidator(_plugin_settings)]] = Field(
        description="The network. `segmentor.name` chooses it and thereby its settings."
    )
    method: Annotated[Method, PlainValidator(_plugin_settings)] = Field(
        description="The training method. `method.name` chooses it and thereby its settings."
    )
    optim: OptimConfig = Field(
        default=OptimConfig(), description="Optimizer, learning rate, and the published schedule that a run scales."
    )
    train: TrainConfig = Field(
        default=TrainConfig(), description="Length of the run, intervals of its outputs, seed and numeric precision."
    )
    guards: GuardConfig = Field(
        default=GuardConfig(),
        description="Limits beyond which a run warns, rolls back or stops. They do not affect a healthy run.",
        json_schema_extra=FREE,
    )
    scaling: ScalingConfig = Field(
        default=ScalingConfig(), description="Number of workers and the resources of each.", json_schema_extra=FREE
    )
    run: RunConfig = Field(
        default=RunConfig(), description="Name and location of the run directory, and restarts.", json_schema_extra=FREE
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="The MLflow store that mirrors the run.", json_schema_extra=FREE
    )

    @property
    def scaled_views(self) -> ViewSet:
        """The views that are used for training and prediction: `views` scaled to `data.image_size`."""
        return self.views.at_size(self.data.image_size)

    @model_validator(mode="after")
    def _check_sections_agree(self) -> Self:
        name, unlabeled = self.method.name, self.batch.unlabeled
        if self.method.uses_unlabeled and unlabeled == 0:
            raise ValueError(f"batch.unlabeled: {name} learns from unlabeled images, got 0; set batch.unlabeled=3")
        if not self.method.uses_unlabeled and unlabeled > 0:
            raise ValueError(f"batch.unlabeled: {name} uses none, got {unlabeled}; set batch.unlabeled=0")
        has_none = self.data.labeled == 1 and self.data.unlabeled is None and self.data.split is None
        has_none &= not dataset.is_shard_folder(self.data.train)  # shards may have a split, known after reading
        if self.method.uses_unlabeled and has_none:
            raise ValueError(
                f"data.labeled: {name} needs unlabeled images, and 1 leaves none; set data.labeled=0.1, or "
                "data.unlabeled to a folder or JSON, or add the word supervised to learn from labeled images only"
            )
        if self.data.pseudo_labels is not None and not self.method.uses_unlabeled:
            raise ValueError(f"data.pseudo_labels: {name} learns from labeled images only; set it to null")
        return self


def compose(words: Sequence[str], search: Sequence[Path] | None = None) -> Config:
    """Build the Config that ``words`` describe.

    Words are names of files in ``search`` (default: configs/) or paths of YAML files, merged from left to right, then
    overrides `a.b=value`. `data=FOLDER` stands for the settings that the layout of the folder implies.
    Raises ConfigError for invalid settings, and DataError if the layout is not recognized."""
    return build(resolve(words, search))


def compose_data(words: Sequence[str], search: Sequence[Path] | None = None) -> DataConfig:
    """Build only the section `data:` that ``words`` describe. They need not name a segmentor or a method.

    Raises ConfigError and DataError like ``compose``."""
    return validate(DataConfig, resolve(words, search).get("data", {}), "data")


def load(path: Path | str) -> Config:
    """Read the Config of a run from its config.yaml, as written by ``dump``.

    Settings that were renamed since the file was written are translated. Raises ConfigError if the file is invalid."""
    tree = resolve([str(path)])
    return build(translate(tree, _section_models(tree)))


def dump(config: Config) -> str:
    """The settings as YAML, from which ``load`` builds the same Config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def run_schedule(config: Config) -> Schedule:
    """The schedule of the run: the reference schedule scaled to the batch and the length of the run."""
    batch = config.batch
    images = config.scaling.most * batch.accumulation_steps * (batch.labeled + batch.unlabeled)
    return plan_schedule(config.optim, config.optim.reference, config.train.steps, images)


def rows_per_step(schedule: Schedule, config: Config) -> int:
    """The number of global rows per optimizer step. It is fixed for a run, whatever the number of ranks."""
    return schedule.images_per_step // (config.batch.labeled + config.batch.unlabeled)


def build(tree: Tree) -> Config:
    """The Config of merged settings. Raises ConfigError for the first mistake."""
    models = _section_models(tree)
    return validate(Config, {n: validate(models[n], tree[n], n) for n in Config.model_fields if n in tree}, "")


def _section_models(tree: Tree) -> dict[str, type[BaseModel]]:
    """The model of each section. Those of `segmentor` and `method` belong to the plugins that ``tree`` names."""
    for name, value in tree.items():
        if name not in Config.model_fields:
            raise ConfigError(f"{name}: no such section{list_choices(name, list(Config.model_fields), 'a config')}")
        if not isinstance(value, Mapping):
            remedy = f"; write {name}.name={value}" if name in ("segmentor", "method") else ""
            raise ConfigError(f"{name}: expected settings, got {value!r}{remedy}")
    models: dict[str, type[BaseModel]] = {
        name: field.annotation for name, field in Config.model_fields.items() if isinstance(field.annotation, type)
    }
    segmentor = _plugin_name("segmentor", tree, registry.segmentor_names())
    method = _plugin_name("method", tree, registry.method_names())
    try:
        models["segmentor"], models["method"] = registry.segmentor(segmentor).Config, registry.method(method)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return models


def _plugin_name(kind: str, tree: Tree, names: Sequence[str]) -> str:
    name = tree.get(kind, {}).get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{kind}.name: none chosen; add one of {', '.join(names)}, or {kind}.name=...")
    return name
