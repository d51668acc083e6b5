"""The typed section `data` of a Config: where the images and annotations are, and which of them are labeled."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pais_ray.config.overlays import ConfigError
from pais_ray.config.sections import FREE, Section
from pais_ray.data.shards import dataset
from pais_ray.data.sources import readers
from pais_ray.data.validation.rules import LIMITS, MAX_PIXELS, Limits
from pais_ray.files import storage


class DataConfig(Section):
    """The section `data:`. Paths may be relative to the working directory of the command."""

    train: str | None = Field(
        default=None,
        description="Annotated training images: a COCO JSON, the folder gtFine/train of Cityscapes, or the folder or "
        "URL of shards. Default: null, which means the built-in, generated data set.",
    )
    train_images: str | None = Field(
        default=None,
        description="Folder of the training images. Default: null, which means data.images.",
    )
    val: str | None = Field(
        default=None,
        description="Annotated validation images: a COCO JSON, the folder gtFine/val of Cityscapes, or shards. "
        "Default: null, which means the validation part of the shards in data.train, or the images that data.holdout "
        "or data.split reserve.",
    )
    val_images: str | None = Field(
        default=None,
        description="Folder of the validation images. Default: null, which means data.images.",
    )
    unlabeled: str | None = Field(
        default=None,
        description="Additional images without labels: a COCO JSON, or the folder or URL of images. Default: null, "
        "which means the training images that data.labeled leaves unlabeled.",
    )
    unlabeled_images: str | None = Field(
        default=None,
        description="Folder of the images of a COCO JSON in data.unlabeled. Default: null, which means data.images.",
    )
    images: str | None = Field(
        default=None,
        description="Folder of images that is used where data.train_images, data.val_images or data.unlabeled_images "
        "is null. Default: null, which means that each of them is set, or implied by the layout of the data set.",
    )
    image_size: int | None = Field(
        default=None,
        ge=16,
        description="Short side of the test view, in pixels. The other views are scaled by the same ratio. Default: "
        "null, which means the sizes in the section views, as in the paper.",
    )
    labeled: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the training images that keep their labels. The others become unlabeled images. The "
        "paper uses 0.01, 0.05 and 0.1 on COCO. Default: all of them.",
    )
    fold: int = Field(
        default=1,
        ge=0,
        description="Number that selects the random draw of labeled images. Each number gives a different, "
        "reproducible draw. The usual folds on COCO are 1 to 5. Default: the first of these.",
    )
    holdout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the training images that are reserved for validation before labeled images are drawn. "
        "It cannot be combined with data.val. Default: null, which means none.",
    )
    split: str | None = Field(
        default=None,
        description="Manifest of `pais-ray split` that lists the labeled images. It replaces data.labeled and "
        "data.fold. Default: null, which means a random draw.",
    )
    pseudo_labels: str | None = Field(
        default=None,
        description="COCO results with scores that label the unlabeled images in place of the teacher. Default: null, "
        "which means that the teacher labels them.",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description="Maximum number of pixels per image; larger images are refused. Default: the number above which "
        "Pillow warns of a decompression bomb. Twice that number is the upper limit, because Pillow decodes no more.",
        json_schema_extra=FREE,
    )
    max_instances: int = Field(
        default=LIMITS.max_instances,
        ge=1,
        description="Maximum number of annotations per image; images with more are refused. Default: chosen by this "
        "project; the densest aerial images have about 8000.",
        json_schema_extra=FREE,
    )
    max_json_gib: float = Field(
        default=LIMITS.max_json_gib,
        gt=0,
        description="Maximum memory of a parsed annotation file, in GiB; it is estimated before parsing. Default: "
        "chosen by this project; COCO train2017 takes 6 GiB.",
        json_schema_extra=FREE,
    )

    def limits(self) -> Limits:
        """The limits as the readers of data sets take them."""
        return Limits(max_pixels=self.max_pixels, max_instances=self.max_instances, max_json_gib=self.max_json_gib)

    @property
    def holds_out(self) -> bool:
        """Whether the validation images are reserved from the training images, by a share or by a manifest."""
        return self.train is not None and self.val is None and not dataset.is_shard_folder(self.train)

    def part(self, name: Literal["train", "val"]) -> tuple[str, str | None]:
        """(annotations, image folder) of a part; the folder is None if the annotations imply it.

        Raises ConfigError if one of them is missing."""
        annotations, images = getattr(self, name), getattr(self, f"{name}_images") or self.images
        if name == "val" and annotations is None and dataset.is_shard_folder(self.train):
            annotations = self.train
        if annotations is None:
            raise ConfigError(f"data.{name}: expected a COCO JSON, got null; set it")
        if images is None and not readers.is_folder(annotations):
            raise ConfigError(
                f"data.{name}_images: expected the folder of the images in {annotations}, got null; set it or "
                "data.images"
            )
        return annotations, images

    @field_validator("train", "val", "unlabeled")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        """Refuse a URL that contains credentials."""
        return None if value is None else storage.check_url(value)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.train is None and (self.val is not None or self.holdout is not None):
            given = "val" if self.val is not None else "holdout"
            raise ValueError(f"train: expected a COCO JSON because {given} is set, got null; set both or neither")
        if self.holds_out and self.holdout is None and self.split is None:
            raise ValueError(
                "val: expected a COCO JSON because train is set, got null; set it, or reserve training images for "
                "validation with data.holdout=0.2"
            )
        if self.val is not None and self.holdout is not None:
            raise ValueError(
                f"holdout: cannot be combined with val, got {self.holdout} and {self.val}; set one of them to null"
            )
        return self
