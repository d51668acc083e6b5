"""TODO docstring."""

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
    """The pipeline of one stream: resize, flip, then what is switched on of color, geometric, erase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_side: Ints = Field(default=(400, 1200), description="px, uniform integer; COCO: paper's code 400..1200")
    long_side: int = Field(
        default=1333, ge=1, description="px, cap that wins over short_side; COCO 1333, Cityscapes 2048"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip; paper's code .5")
    photometric: Literal["cityscapes"] | None = Field(
        default=None,
        description="albumentations preset at decode time, labeled stream only; the paper's Cityscapes",
    )
    color: bool = Field(default=False, description="always one of nine color operations")
    color_level: Ints = Field(default=(1, 9), description="uniform integer; paper's code randint(1, 10)")
    geometric: bool = Field(default=False, description="always one of translate-x, translate-y, rotate, shear")
    translate: float = Field(default=0.1, ge=0, le=1, description="+- share of the side; paper's code 10 %")
    rotate: float = Field(default=30.0, ge=0, le=180, description="+- degrees about the center; paper's code 30")
    shear: float = Field(default=30.0, ge=0, lt=90, description="+- degrees, factor tanh(radians); paper's code 30")
    fill: float = Field(
        default=125 / 255, ge=0, le=1, description="outside the picture, all channels; paper's code 125"
    )
    erase: bool = Field(
        default=False, description="paint patches over the picture; masks stay: objects are to be completed"
    )
    erase_count: Ints = Field(default=(1, 4), description="patches; paper's code randint(1, 5), Cityscapes CutOut 1..5")
    erase_ratio: Floats = Field(
        default=(0.0, 0.2), description="patch side / view side, one draw for both; paper's code"
    )
    erase_holes: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="(w, h) px to choose from instead of erase_ratio, cut at the border; Cityscapes CutOut",
    )
    erase_fill: tuple[float, float, float] = Field(
        default=(125 / 255, 125 / 255, 125 / 255),
        description="R, G, B; paper's code 125, Cityscapes the ImageNet mean",
    )
    order: Literal["random", "erase_last"] = Field(
        default="erase_last",
        description="shuffle all three (K-Net DALoss config), or the first two (all others)",
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
    # The paper's code cuts out zeros after normalization: the mean color before it.
    "erase_fill": (0.485, 0.456, 0.406),
}

PRESETS: dict[str, dict[str, ViewConfig]] = {
    # Method 3. coco: Mask R-CNN and "w/o DALoss" configs; coco_knet: the K-Net DALoss config.
    "coco": _COCO,
    "coco_knet": _COCO | {"strong": _COCO["strong"].model_copy(update={"order": "random"})},
    "cityscapes": {
        "labeled": ViewConfig(photometric="cityscapes", **_STREET, **_CUTOUT),
        "weak": ViewConfig(**_STREET),
        "strong": ViewConfig(color=True, geometric=True, **_STREET, **_CUTOUT),
        "test": ViewConfig(short_side=(1024, 1024), long_side=2048, flip=0.0),
    },
    # The supervised baseline without the semi-supervised augmentation (no dagger): one scale and a flip.
    "plain": _COCO | {"labeled": ViewConfig(short_side=(800, 800))},
}


class AugmentConfig(BaseModel):
    """The four streams. What is not given comes from ``preset``. `data.image_size` scales all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = Field(default="coco", description="where unnamed values come from (method 3, the paper's code)")
    labeled: ViewConfig = _COCO["labeled"]
    weak: ViewConfig = _COCO["weak"]
    strong: ViewConfig = _COCO["strong"]
    test: ViewConfig = _COCO["test"]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset", "coco") not in PRESETS:
            return given  # pydantic names the error
        merged = dict(given)
        for kind, view in PRESETS[given.get("preset", "coco")].items():
            words = given.get(kind, {})
            merged[kind] = {**view.model_dump(), **words} if isinstance(words, dict) else words
        return merged

    def at_size(self, image_size: int | None) -> ViewSet:
        """The pipeline of every view, all scaled so that the test view has a short side of ``image_size`` px.

        None keeps the configured sizes."""
        views: dict[Kind, ViewConfig] = {kind: getattr(self, kind) for kind in get_args(Kind)}
        if image_size is None:
            return views
        ratio = image_size / self.test.short_side[1]
        return {kind: scale_view(view, ratio) for kind, view in views.items()}


def scale_view(config: ViewConfig, ratio: float) -> ViewConfig:
    """The same pipeline for pictures ``ratio`` times as large: every length in px scaled and rounded.

    So image_size 192 on the COCO preset is ratio .24: short side 96..288, test 192, long side cap 320.
    Ours; the paper only trains at full size. The shares and angles of the other operations have no unit.
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
