"""Settings of the views (section `views:` of a config) and their presets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Kind = Literal["labeled", "weak", "strong", "test"]

Step = Literal["color", "geometric", "erase"]

Preset = Literal["coco", "coco_knet", "cityscapes", "plain"]


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected (low, high), got {pair}")
    return pair


Ints = Annotated[tuple[int, int], AfterValidator(_ordered)]

Floats = Annotated[tuple[float, float], AfterValidator(_ordered)]


class ViewConfig(BaseModel):
    """The operations of one kind of view: resize, flip, then the enabled ones of color, geometric and erase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_side: Ints = Field(
        default=(400, 1200),
        description="Range from which the short side of a view is drawn, in pixels: a uniform random integer. "
        "Default: from the released code for COCO.",
    )
    long_side: int = Field(
        default=1333,
        ge=1,
        description="Maximum long side of a view, in pixels. It takes precedence over short_side. Default: from the "
        "released code for COCO; the released code uses 2048 for Cityscapes.",
    )
    flip: float = Field(
        default=0.5, ge=0, le=1, description="Probability of a horizontal flip. Default: from the released code."
    )
    photometric: Literal["cityscapes"] | None = Field(
        default=None,
        description="Name of a photometric augmentation from albumentations. It is applied to the decoded images of "
        "the labeled view only. Default: null, which means none; the released code has one for Cityscapes.",
    )
    color: bool = Field(
        default=False,
        description="Whether a color operation, one of nine chosen at random, is applied. Default: from the released "
        "code; it depends on the view.",
    )
    color_level: Ints = Field(
        default=(1, 9),
        description="Range from which the strength of the color operation is drawn: a uniform random integer. "
        "Default: from the released code, whose randint(1, 10) excludes 10.",
    )
    geometric: bool = Field(
        default=False,
        description="Whether a geometric operation is applied, chosen at random from horizontal translation, vertical "
        "translation, rotation and shear. Default: from the released code; it depends on the view.",
    )
    translate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Maximum translation in either direction, as a share of the side. Default: from the released code.",
    )
    rotate: float = Field(
        default=30.0,
        ge=0,
        le=180,
        description="Maximum rotation about the center in either direction, in degrees. Default: from the released "
        "code.",
    )
    shear: float = Field(
        default=30.0,
        ge=0,
        lt=90,
        description="Maximum shear in either direction, in degrees. The factor is tanh of the angle in radians, as in "
        "the released code. Default: from the released code.",
    )
    fill: float = Field(
        default=125 / 255,
        ge=0,
        le=1,
        description="Value of all three channels outside the image after a geometric operation, from 0 to 1. Default: "
        "from the released code: 125 / 255.",
    )
    erase: bool = Field(
        default=False,
        description="Whether patches of the view are painted over. The masks do not change, so the network must "
        "complete the hidden parts of objects. Default: from the released code; it depends on the view.",
    )
    erase_count: Ints = Field(
        default=(1, 4),
        description="Range from which the number of patches is drawn: a uniform random integer. Default: from the "
        "released code, whose randint(1, 5) excludes 5.",
    )
    erase_ratio: Floats = Field(
        default=(0.0, 0.2),
        description="Range from which the size of a patch is drawn, as a share of the sides of the view: one uniform "
        "random number for width and height. Default: from the released code.",
    )
    erase_holes: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Patch sizes (width, height) in pixels to choose from instead of erase_ratio. Patches are cut off "
        "at the border of the view. Default: none; the released code uses such sizes for CutOut on Cityscapes.",
    )
    erase_fill: tuple[float, float, float] = Field(
        default=(125 / 255, 125 / 255, 125 / 255),
        description="Red, green and blue of the patches, from 0 to 1. Default: from the released code: 125 / 255 for "
        "COCO, the ImageNet mean for Cityscapes.",
    )
    order: Literal["random", "erase_last"] = Field(
        default="erase_last",
        description="Order of the operations color, geometric and erase: random shuffles all three; erase_last "
        "shuffles the first two. Default: from the released code, except for its K-Net configuration with DALoss, "
        "which shuffles all three.",
    )


ViewSet = Mapping[Kind, ViewConfig]

_COCO = {
    "labeled": ViewConfig(color=True),
    "weak": ViewConfig(),
    "strong": ViewConfig(color=True, geometric=True, erase=True),
    "test": ViewConfig(short_side=(800, 800), flip=0.0),
}

_STREET: dict[str, Any] = {"short_side": (800, 1024), "long_side": 2048}

_CUTOUT: dict[str, Any] = {
    "erase": True,
    "erase_count": (1, 5),
    "erase_holes": ((0, 0), (60, 30), (120, 60), (200, 100), (300, 150), (400, 200)),
    # The released code fills with zeros after normalization, which is the mean color before it.
    "erase_fill": (0.485, 0.456, 0.406),
}

PRESETS: dict[str, dict[str, ViewConfig]] = {
    # Method 3. coco: the configs of Mask R-CNN and "w/o DALoss"; coco_knet: the config of K-Net with DALoss.
    "coco": _COCO,
    "coco_knet": _COCO | {"strong": _COCO["strong"].model_copy(update={"order": "random"})},
    "cityscapes": {
        "labeled": ViewConfig(photometric="cityscapes", **_STREET, **_CUTOUT),
        "weak": ViewConfig(**_STREET),
        "strong": ViewConfig(color=True, geometric=True, **_STREET, **_CUTOUT),
        "test": ViewConfig(short_side=(1024, 1024), long_side=2048, flip=0.0),
    },
    # The supervised baseline without the augmentation of the semi-supervised method (no dagger): one scale and a flip.
    "plain": _COCO | {"labeled": ViewConfig(short_side=(800, 800))},
}


class AugmentConfig(BaseModel):
    """The four kinds of views. Values that are not given come from ``preset``. `data.image_size` scales all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = Field(
        default="coco",
        description="Name of the set of values for all view settings that are not given. The presets coco, coco_knet "
        "and cityscapes follow the released code; plain has no semi-supervised augmentation. Default: coco.",
    )
    labeled: ViewConfig = Field(default=_COCO["labeled"], description="The view of labeled images in training.")
    weak: ViewConfig = Field(default=_COCO["weak"], description="The view of unlabeled images for the teacher.")
    strong: ViewConfig = Field(default=_COCO["strong"], description="The view of unlabeled images for the student.")
    test: ViewConfig = Field(default=_COCO["test"], description="The view of images in evaluation and prediction.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset", "coco") not in PRESETS:
            return given  # pydantic reports the error
        merged = dict(given)
        for kind, view in PRESETS[given.get("preset", "coco")].items():
            values = given.get(kind, {})
            merged[kind] = {**view.model_dump(), **values} if isinstance(values, dict) else values
        return merged

    def at_size(self, image_size: int | None) -> ViewSet:
        """The settings of each kind of view, scaled so that the test view has a short side of ``image_size`` px.

        None keeps the configured sizes.
        """
        views: dict[Kind, ViewConfig] = {kind: getattr(self, kind) for kind in get_args(Kind)}
        if image_size is None:
            return views
        ratio = image_size / self.test.short_side[1]
        return {kind: scale_view(view, ratio) for kind, view in views.items()}


def scale_view(config: ViewConfig, ratio: float) -> ViewConfig:
    """The same operations for images that are ``ratio`` times as large: every length in px is scaled and rounded.

    For example, image_size 192 with the COCO preset is ratio .24: short side 96..288, test view 192, long side at most
    320. Ours; the paper trains at full size only. Fractions and angles do not change.
    """

    def px(length: int) -> int:
        return round(length * ratio)

    return config.model_copy(
        update={
            "short_side": (max(1, px(config.short_side[0])), max(1, px(config.short_side[1]))),
            "long_side": max(1, px(config.long_side)),
            "erase_holes": tuple((px(w), px(h)) for w, h in config.erase_holes),
        }
    )
