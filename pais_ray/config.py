"""The Config: typed sections, built from words, with one clear line for each mistake."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import models_json_schema

from pais_ray import plugins
from pais_ray.data import formats, shards, storage
from pais_ray.data.validate import LIMITS, MAX_PIXELS, Limits
from pais_ray.data.views import AugmentConfig
from pais_ray.guards import GuardConfig
from pais_ray.optim import OptimConfig, Schedule, plan_schedule
from pais_ray.overlays import PER_SEGMENTOR, ConfigError, Dumper, Tree, resolve
from pais_ray.plugins import did_you_mean
from pais_ray.tracking import TrackingConfig

Scalar = str | int | float | bool | None

# May a resumed run change it? Unmarked settings are its identity; a free section is free whole.
FREE: dict[str, Any] = {"role": "free"}


class Section(BaseModel):
    """A frozen part of the Config."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class DataConfig(Section):
    """The section `data:`. Paths may be relative to where the command runs."""

    train: str | None = Field(
        default=None,
        description="COCO JSON, Cityscapes' folder gtFine/train, or folder or URL of shards; null: the embedded, "
        "generated data set",
    )
    train_images: str | None = Field(default=None, description="folder of the training images; null: images")
    val: str | None = Field(
        default=None,
        description="COCO JSON to evaluate on, Cityscapes' folder gtFine/val, or shards; null: those of train",
    )
    val_images: str | None = Field(default=None, description="folder of the validation images; null: images")
    unlabeled: str | None = Field(
        default=None,
        description="COCO JSON, or folder or URL of unlabeled images; null: what `labeled` leaves of train",
    )
    unlabeled_images: str | None = Field(default=None, description="folder of the JSON's images; null: images")
    images: str | None = Field(default=None, description="the common default of the three folders")
    image_size: int | None = Field(
        default=None,
        ge=16,
        description="px, short side of the test view, the others in proportion; null: the preset's",
    )
    labeled: float = Field(default=1.0, gt=0, le=1, description="share of train that keeps its labels")
    fold: int = Field(default=1, ge=0, description="which draw of that share")
    holdout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of train to evaluate on, held out before labels are drawn; where val is null",
    )
    split: str | None = Field(
        default=None,
        description="manifest of `pais-ray split` that says which images are labeled, instead of labeled and fold",
    )
    pseudo_labels: str | None = Field(
        default=None,
        description="COCO results with scores (scored masks) that label the unlabeled images; null: the teacher does",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description="of an image; at most twice the default, where Pillow refuses",
        json_schema_extra=FREE,
    )
    max_instances: int = Field(
        default=LIMITS.max_instances, ge=1, description="annotations of an image", json_schema_extra=FREE
    )
    max_json_gib: float = Field(
        default=LIMITS.max_json_gib,
        gt=0,
        description="memory an annotation file may take, parsed",
        json_schema_extra=FREE,
    )

    def limits(self) -> Limits:
        """The caps, as the readers take them."""
        return Limits(max_pixels=self.max_pixels, max_instances=self.max_instances, max_json_gib=self.max_json_gib)

    @property
    def holds_out(self) -> bool:
        """Whether the validation images are some of train: a share of it, or those that the manifest names."""
        return self.train is not None and self.val is None and not shards.is_shards(self.train)

    def part(self, name: Literal["train", "val"]) -> tuple[str, str | None]:
        """(annotations, image folder) of a part; a folder of annotations may know its images. Raises ConfigError
        where one is not set."""
        annotations, images = getattr(self, name), getattr(self, f"{name}_images") or self.images
        if name == "val" and annotations is None and shards.is_shards(self.train):
            annotations = self.train
        if annotations is None:
            raise ConfigError(f"data.{name}: expected a COCO JSON, got null; set it")
        if images is None and not formats.is_folder(annotations):
            raise ConfigError(
                f"data.{name}_images: expected the folder of {annotations}'s images; set it or data.images"
            )
        return annotations, images

    @field_validator("train", "val", "unlabeled")
    @classmethod
    def _no_keys(cls, value: str | None) -> str | None:
        return None if value is None else storage.check_url(value)

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if self.train is None and (self.val is not None or self.holdout is not None):
            given = "val" if self.val is not None else "holdout"
            raise ValueError(f"train: expected a COCO JSON because {given} is set, got null; set both or neither")
        if self.holds_out and self.holdout is None and self.split is None:
            raise ValueError(
                "val: expected a COCO JSON because train is set, got null; set it, or hold images out: data.holdout=0.2"
            )
        if self.val is not None and self.holdout is not None:
            raise ValueError(f"holdout: goes without val, got {self.holdout} and {self.val}; set one of them to null")
        return self


class BatchConfig(Section):
    """The section `batch:`, per worker and micro-batch."""

    labeled: int = Field(default=1, ge=1, description="labeled images; paper 4.2: 1")
    unlabeled: int = Field(default=3, ge=0, description="unlabeled images; paper 4.2, Table 9: 3")
    accumulation: int = Field(default=1, ge=1, description="micro-batches an optimizer step; ours")


class TrainConfig(Section):
    """The section `train:`."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: the reference's, scaled")
    stop_at: int | None = Field(
        default=None, ge=1, description="end early at this step, schedule untouched", json_schema_extra=FREE
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="steps; null: after the last one only", json_schema_extra=FREE
    )
    checkpoint_every: int = Field(default=1000, ge=1, description="steps", json_schema_extra=FREE)
    log_every: int = Field(default=50, ge=1, description="steps", json_schema_extra=FREE)
    panel_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between pictures of pseudo-labels; null: none",
        json_schema_extra=FREE,
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, description="the last so many, beside the best", json_schema_extra=FREE
    )
    seed: int = Field(default=0, ge=0, description="of initial weights, order of images, views and samplers")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of the forward passes; fp16 scales the loss (released code)"
    )
    deterministic: bool = Field(default=False, description="only deterministic kernels, slower", json_schema_extra=FREE)
    max_pseudo_labels: int = Field(
        default=100,
        ge=1,
        description="an image, by score; torchvision's detections_per_img; halved where memory ran out in backward",
    )
    max_skipped: int = Field(
        default=20,
        ge=1,
        description="steps in a row without a finite loss, then back to the last checkpoint",
        json_schema_extra=FREE,
    )
    threads_per_worker: int | None = Field(
        default=None,
        ge=1,
        description="torch threads; null: the node's cores over its workers",
        json_schema_extra=FREE,
    )


class ScalingConfig(Section):
    """The section `scaling:`, after ray.train.ScalingConfig."""

    num_workers: int | tuple[int, int] = Field(
        default=1,
        description="training processes, each with its own batch; [least, most]: as many as the cluster has room for, "
        "with the samples a step of the most",
    )
    resize_check_s: float = Field(
        default=60.0, ge=0, description="between two looks for room for more workers, where num_workers is a range"
    )
    use_gpu: bool = Field(default=False, description="one GPU a worker")
    cpus_per_worker: float | None = Field(
        default=None, gt=0, description="CPUs to reserve a worker; null: what leaves one for reading data"
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK", description="of the workers over the nodes, Ray's names; PACK: few nodes, less network"
    )

    @property
    def most(self) -> int:
        """Workers where the cluster has room for all."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def least(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @field_validator("num_workers")
    @classmethod
    def _in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (value, value) if isinstance(value, int) else value
        if not 1 <= least <= most:
            raise ValueError(f"expected a number from 1 on, or [least, most] in order, got {value}")
        return value


class RunConfig(Section):
    """The section `run:`, after ray.train.RunConfig."""

    name: str | None = Field(default=None, description="the same name resumes; null: a new one from the time")
    storage_path: str = Field(default="runs", description="folder of run directories, seen by every node")
    max_failures: int = Field(default=3, ge=-1, description="restarts of a failed worker group; -1: without end")

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w@+=,-][\w@+=,.-]*", value):
            raise ValueError("expected letters, digits and _ - . @ + = , (it names a folder)")
        return value


class Config(Section):
    """Everything a run is told. ``segmentor`` and ``method`` hold the models of the chosen plugins."""

    data: DataConfig = DataConfig()
    views: AugmentConfig = AugmentConfig()
    batch: BatchConfig = BatchConfig()
    segmentor: Any = Field(description="the Config of the segmentor called segmentor.name")
    method: Any = Field(description="the method called method.name")
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    guards: GuardConfig = Field(default=GuardConfig(), json_schema_extra=FREE)
    scaling: ScalingConfig = Field(default=ScalingConfig(), json_schema_extra=FREE)
    run: RunConfig = Field(default=RunConfig(), json_schema_extra=FREE)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, json_schema_extra=FREE)

    @field_validator("segmentor", "method")
    @classmethod
    def _is_model(cls, value: Any) -> Any:
        if not (isinstance(value, BaseModel) and hasattr(value, "name")):
            raise ValueError(f"expected a pydantic model with a name, got {value!r}; compose() builds it from settings")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        size = self.data.image_size
        if self.views.image_size not in (None, size):
            raise ValueError(f"views.image_size: set data.image_size instead, got {self.views.image_size}")
        # The one derived value: users know it as data.image_size, views work with it.
        object.__setattr__(self, "views", self.views.model_copy(update={"image_size": size}))
        name, unlabeled = self.method.name, self.batch.unlabeled
        if self.method.uses_unlabeled and unlabeled == 0:
            raise ValueError(f"batch.unlabeled: {name} learns from unlabeled images, got 0; set batch.unlabeled=3")
        if not self.method.uses_unlabeled and unlabeled > 0:
            raise ValueError(f"batch.unlabeled: {name} uses none, got {unlabeled}; set batch.unlabeled=0")
        leaves_none = self.data.labeled == 1 and self.data.unlabeled is None and self.data.split is None
        leaves_none &= not shards.is_shards(self.data.train)  # they may hold a split: reading them tells
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
    Raises ConfigError, or DataError where the folder is not recognised."""
    return build(resolve(words, search))


def compose_data(words: Sequence[str], search: Sequence[Path] | None = None) -> DataConfig:
    """The section `data:` alone of what ``words`` spell; they need to name neither segmentor nor method."""
    section: DataConfig = _typed(DataConfig, resolve(words, search).get("data", {}), "data")
    return section


def load(path: Path | str) -> Config:
    """The Config of one file, as written by ``dump``."""
    return build(resolve([str(path)]))


def dump(config: Config) -> str:
    """YAML that is itself an overlay: ``load`` gives the same Config back."""
    return yaml.dump(_plain(config), Dumper=Dumper, sort_keys=False, width=110)


def run_schedule(config: Config) -> Schedule:
    """The run's schedule, scaled from the reference batch to this run's."""
    batch = config.batch
    images = config.scaling.most * batch.accumulation * (batch.labeled + batch.unlabeled)
    return plan_schedule(config.optim, config.optim.reference, config.train.steps, images)


def rows_a_step(schedule: Schedule, config: Config) -> int:
    """Global rows of an optimizer step: the run's, whatever number of ranks shares them."""
    return schedule.images_per_step // (config.batch.labeled + config.batch.unlabeled)


def flatten(config: Config) -> dict[str, Scalar]:
    """Dotted name -> value; lists as JSON text."""
    return dict(_leaves(_plain(config)))


def identity(config: Config) -> dict[str, Scalar]:
    """Dotted name -> value of the settings that make a run what it is."""
    return {name: value for name, value in flatten(config).items() if not _is_free(config, name)}


def changed_identity(old: Config, new: Config) -> list[str]:
    """Dotted names of the settings that make a run what it is and differ."""
    before, after = flatten(old), flatten(new)
    names = [n for n in {**before, **after} if n not in before or n not in after or before[n] != after[n]]
    return [n for n in names if not (_is_free(new, n) or _is_free(old, n))]


def json_schema() -> Tree:
    """A JSON schema of overlay files, for editors."""
    plugged: dict[str, list[type[BaseModel]]] = {
        "segmentor": [plugins.segmentor(n).Config for n in plugins.segmentor_names()],
        "method": [plugins.method(n) for n in plugins.method_names()],
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
    sections: Tree = {}
    for name, value in tree.items():
        if name not in Config.model_fields:
            raise ConfigError(f"{name}: no such section{_choices(name, list(Config.model_fields), 'a config')}")
        if not isinstance(value, Mapping):
            remedy = f"; write {name}.name={value}" if name in ("segmentor", "method") else ""
            raise ConfigError(f"{name}: expected settings, got {value!r}{remedy}")
    if "image_size" in tree.get("views", {}):
        raise ConfigError("views.image_size: derived; set data.image_size")
    for kind, names, plugged in (
        ("segmentor", plugins.segmentor_names, lambda n: plugins.segmentor(n).Config),
        ("method", plugins.method_names, plugins.method),
    ):
        sections[kind] = _typed(_plugin(kind, tree.get(kind, {}), names, plugged), tree.get(kind, {}), kind)
    for name, field in Config.model_fields.items():
        if name in tree and name not in sections:
            assert isinstance(field.annotation, type)
            sections[name] = _typed(field.annotation, tree[name], name)
    return _typed(Config, sections, "")


def _plugin(kind: str, tree: Tree, names: Callable[[], list[str]], find: Callable[[str], Any]) -> type[BaseModel]:
    name = tree.get("name")
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


def _plain(config: Config) -> Tree:
    tree = config.model_dump(mode="json")
    tree["views"].pop("image_size")  # data.image_size says it
    return tree


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


def _is_free(config: Config, dotted: str) -> bool:
    value: Any = config
    for part in dotted.split("."):
        field = type(value).model_fields.get(part) if isinstance(value, BaseModel) else None
        if field is None:
            return False
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("role") == "free":
            return True
        value = getattr(value, part)
    return False
