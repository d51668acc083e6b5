"""TODO docstring."""

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pais_ray.config.overlays import ConfigError
from pais_ray.data.shards import dataset
from pais_ray.data.sources import readers
from pais_ray.data.validation.rules import LIMITS, MAX_PIXELS, Limits
from pais_ray.files import storage

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
        return self.train is not None and self.val is None and not dataset.is_shards(self.train)

    def part(self, name: Literal["train", "val"]) -> tuple[str, str | None]:
        """(annotations, image folder) of a part; a folder of annotations may know its images. Raises ConfigError
        where one is not set."""
        annotations, images = getattr(self, name), getattr(self, f"{name}_images") or self.images
        if name == "val" and annotations is None and dataset.is_shards(self.train):
            annotations = self.train
        if annotations is None:
            raise ConfigError(f"data.{name}: expected a COCO JSON, got null; set it")
        if images is None and not readers.is_folder(annotations):
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
    accumulation_steps: int = Field(default=1, ge=1, description="micro-batches an optimizer step; ours")


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
    max_consecutive_skips: int = Field(
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


class GuardConfig(Section):
    """The section `guards:`; all ours. Nothing here changes what a healthy run learns."""

    max_rollbacks: int = Field(
        default=3,
        ge=0,
        description="returns to the last checkpoint after train.max_consecutive_skips bad steps; then the end",
    )
    gradient_spike: float = Field(default=10.0, gt=1, description="times the median norm of the last 100 steps")
    min_kept_per_image: float = Field(
        default=0.02, ge=0, description="pseudo-labels an image below which the teacher collapsed"
    )
    max_kept_per_image: float = Field(
        default=60.0, gt=0, description="the same, above which it calls everything an object"
    )
    kept_alarm_steps: int = Field(default=2000, ge=1, description="steps outside that band before the alarm")
    teacher_gap: float = Field(default=0.1, gt=0, description="segm AP the teacher may be below the student")
    zero_loss_steps: int = Field(
        default=500, ge=1, description="steps without a labeled box or mask to learn that end the run: wrong classes"
    )
    first_batch_timeout_s: float = Field(
        default=1800.0, gt=0, description="limit of building the model and the first batch"
    )
    step_timeout_s: float = Field(default=600.0, gt=0, description="limit of any later step of a rank")
    evaluate_timeout_s: float = Field(default=7200.0, gt=0, description="limit of an evaluation on a rank")
    save_timeout_s: float = Field(default=1800.0, gt=0, description="limit of waiting for a checkpoint or for scores")
