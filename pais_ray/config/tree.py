"""The Config: typed sections, built from words, with one clear line for each mistake."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, Field, PlainValidator, SerializeAsAny, ValidationError, model_validator
from pydantic.json_schema import models_json_schema

from pais_ray.augmentation.presets import AugmentConfig, ViewSet
from pais_ray.config.data_section import DataConfig
from pais_ray.config.overlays import PER_SEGMENTOR, ConfigError, Dumper, Tree, resolve
from pais_ray.config.renamed import explain_unknown, translate
from pais_ray.config.sections import (
    FREE,
    BatchConfig,
    GuardConfig,
    RunConfig,
    ScalingConfig,
    Section,
    TrainConfig,
)
from pais_ray.data.shards import dataset
from pais_ray.modeling import registry
from pais_ray.modeling.optim import OptimConfig, Schedule, plan_schedule
from pais_ray.modeling.protocols import Method, SegmentorConfig
from pais_ray.modeling.registry import did_you_mean
from pais_ray.tracking.settings import TrackingConfig


def _plugin_settings(value: object) -> BaseModel:
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
        """The views as they are made: `views` scaled to `data.image_size`."""
        return self.views.at_size(self.data.image_size)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        name, unlabeled = self.method.name, self.batch.unlabeled
        if self.method.uses_unlabeled and unlabeled == 0:
            raise ValueError(f"batch.unlabeled: {name} learns from unlabeled images, got 0; set batch.unlabeled=3")
        if not self.method.uses_unlabeled and unlabeled > 0:
            raise ValueError(f"batch.unlabeled: {name} uses none, got {unlabeled}; set batch.unlabeled=0")
        leaves_none = self.data.labeled == 1 and self.data.unlabeled is None and self.data.split is None
        leaves_none &= not dataset.is_shards(self.data.train)  # they may hold a split: reading them tells
        if self.method.uses_unlabeled and leaves_none:
            raise ValueError(
                f"data.labeled: {name} needs unlabeled images and 1 leaves none; set data.labeled=0.1, or "
                "data.unlabeled to a folder or JSON, or add the word supervised to learn from the labeled ones alone"
            )
        if self.data.pseudo_labels is not None and not self.method.uses_unlabeled:
            raise ValueError(f"data.pseudo_labels: {name} learns from labeled images alone; set it to null")
        return self


def compose(words: Sequence[str], search: Sequence[Path] | None = None) -> Config:
    """The Config that ``words`` spell: names of files in ``search`` (config_dirs() unless given) or paths to
    .yaml, left to right, then `a.b=value` overrides; data=FOLDER stands for the settings that its layout implies.
    Raises ConfigError, or DataError where the folder is not recognized."""
    return build(resolve(words, search))


def compose_data(words: Sequence[str], search: Sequence[Path] | None = None) -> DataConfig:
    """The section `data:` alone of what ``words`` spell; they need to name neither segmentor nor method."""
    section: DataConfig = _typed(DataConfig, resolve(words, search).get("data", {}), "data")
    return section


def load(path: Path | str) -> Config:
    """The Config of one file, as written by ``dump`` of this version or, under old names, of an earlier one."""
    tree = resolve([str(path)])
    return build(translate(tree, _models(tree)))


def dump(config: Config) -> str:
    """YAML that is itself an overlay: ``load`` gives the same Config back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def run_schedule(config: Config) -> Schedule:
    """The run's schedule, scaled from the reference batch to this run's."""
    batch = config.batch
    images = config.scaling.most * batch.accumulation_steps * (batch.labeled + batch.unlabeled)
    return plan_schedule(config.optim, config.optim.reference, config.train.steps, images)


def rows_per_step(schedule: Schedule, config: Config) -> int:
    """Global rows of an optimizer step: the run's, whatever number of ranks shares them."""
    return schedule.images_per_step // (config.batch.labeled + config.batch.unlabeled)


def json_schema() -> Tree:
    """A JSON schema of overlay files, for editors."""
    plugged: dict[str, list[type[BaseModel]]] = {
        "segmentor": [registry.segmentor(n).Config for n in registry.segmentor_names()],
        "method": [registry.method(n) for n in registry.method_names()],
    }
    models: list[type[BaseModel]] = [Config, *plugged["segmentor"], *plugged["method"]]
    refs, schema = models_json_schema([(m, "validation") for m in models])
    root = schema["$defs"].pop("Config")
    for name, choices in plugged.items():
        root["properties"][name] = {"anyOf": [refs[(m, "validation")] for m in choices]}
    overlay = {"type": "object", "properties": dict(root["properties"]), "additionalProperties": False}
    root["properties"][PER_SEGMENTOR] = {"type": "object", "additionalProperties": overlay}
    return {**{k: v for k, v in root.items() if k != "required"}, "$defs": schema["$defs"]}


def build(tree: Tree) -> Config:
    """The Config of merged settings. Raises ConfigError."""
    models = _models(tree)
    return _typed(Config, {n: _typed(models[n], tree[n], n) for n in Config.model_fields if n in tree}, "")


def _models(tree: Tree) -> dict[str, type[BaseModel]]:
    """The model of each section; ``segmentor`` and ``method`` have those of the plugins that ``tree`` names."""
    for name, value in tree.items():
        if name not in Config.model_fields:
            raise ConfigError(f"{name}: no such section{_choices(name, list(Config.model_fields), 'a config')}")
        if not isinstance(value, Mapping):
            remedy = f"; write {name}.name={value}" if name in ("segmentor", "method") else ""
            raise ConfigError(f"{name}: expected settings, got {value!r}{remedy}")
    models: dict[str, type[BaseModel]] = {
        name: field.annotation for name, field in Config.model_fields.items() if isinstance(field.annotation, type)
    }
    models["segmentor"] = _plugin("segmentor", tree, registry.segmentor_names, lambda n: registry.segmentor(n).Config)
    models["method"] = _plugin("method", tree, registry.method_names, registry.method)
    return models


def _plugin(kind: str, tree: Tree, names: Callable[[], list[str]], find: Callable[[str], Any]) -> type[BaseModel]:
    name = tree.get(kind, {}).get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{kind}.name: none chosen; name one of {', '.join(names())}, by a word or {kind}.name=...")
    try:
        found: type[BaseModel] = find(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found


def _typed(model: type[BaseModel], tree: Any, where: str) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        also = f" (and {more} more)" if more else ""
        raise ConfigError(_line(model, first, where) + also) from error


def _line(model: type[BaseModel], error: Any, where: str) -> str:
    """One pydantic error as one line of ours."""
    loc = [str(part) for part in error["loc"]]
    place = ".".join(p for p in [where, *loc] if p)
    if error["type"] == "extra_forbidden":
        hint = explain_unknown(place)
        if hint is not None:
            return hint
        owner = _owner(model, loc[:-1])
        return f"{place}: no such setting{_choices(loc[-1], list(owner.model_fields), owner.__name__)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # a validator's own words, with the field first where it looked at several
        inside = message.partition(":")[0].partition(".")[0] in _owner(model, loc).model_fields
        return f"{place}.{message}" if place and inside else f"{place}: {message}" if place else message
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = did_you_mean(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f"{place}: {message[:1].lower()}{message[1:]}; got {str(error['input'])[:80]!r}{hint}"


def _owner(model: type[BaseModel], loc: Sequence[str]) -> type[BaseModel]:
    for part in loc:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return model


def _choices(name: str, names: list[str], owner: str) -> str:
    return f"{did_you_mean(name, names)} ({owner} has {', '.join(names)})"
