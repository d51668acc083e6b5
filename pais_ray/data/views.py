"""Decoded images -> views with their matrices, on the training device; labeled ones with their targets.

Two steps: ``draw`` decides everything random about one image's view on the CPU (a ``Plan``, a pure function
of a seed), ``render`` applies plans. Each image pays only for the operations it drew. Pixels are moved once
by an antialiased resize (shrinking 2-4 times is common, plain bilinear sampling would alias) and, only where
a geometric operation was drawn, once more by a warp; truth and pseudo-labels move by the composed matrix.

Legend: N instances, H x W px of the decoded, upright original, h x w px of the view before padding.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pais_ray import geometry
from pais_ray.data import _view_ops
from pais_ray.data._view_ops import COLOURS, Colour
from pais_ray.structures import Batch, Masks, Predictions, Targets, Views

Kind = Literal["labeled", "weak", "strong", "test"]
Step = Literal["colour", "geometric", "erase"]
Preset = Literal["coco", "coco_knet", "cityscapes", "plain"]
PAD = 32  # px: the deepest stride of an FPN


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One decoded image, as the collate threads deliver it (CPU). Unlabeled ones have no truth."""

    image: Tensor  # (3, H, W) uint8 RGB, upright
    image_id: int
    row: int  # the global row g it came from
    slot: int  # its position in that row
    boxes: Tensor | None = None  # (N, 4) float XYXY px
    labels: Tensor | None = None  # (N,) int64 in 0..C-1
    masks: Tensor | None = None  # (N, H, W) uint8 {0, 1}
    scored: Predictions | None = None  # of an unlabeled image: masks from elsewhere, in its frame

    @classmethod
    def of(
        cls,
        image: np.ndarray,
        *,
        image_id: int,
        row: int = 0,
        slot: int = 0,
        boxes: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> Self:
        """From a decoded picture (H, W, 3) uint8 RGB and, for labeled ones, its truth as numpy arrays."""
        return cls(
            image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            image_id=image_id,
            row=row,
            slot=slot,
            boxes=None if boxes is None else torch.from_numpy(boxes),
            labels=None if labels is None else torch.from_numpy(labels),
            masks=None if masks is None else torch.from_numpy(masks),
        )


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected (low, high), got {pair}")
    return pair


Ints = Annotated[tuple[int, int], AfterValidator(_ordered)]
Floats = Annotated[tuple[float, float], AfterValidator(_ordered)]


class ViewConfig(BaseModel):
    """The pipeline of one stream: resize, flip, then what is switched on of colour, geometric, erase."""

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
    colour: bool = Field(default=False, description="always one of nine colour operations")
    colour_level: Ints = Field(default=(1, 9), description="uniform integer; paper's code randint(1, 10)")
    geometric: bool = Field(default=False, description="always one of translate-x, translate-y, rotate, shear")
    translate: float = Field(default=0.1, ge=0, le=1, description="+- share of the side; paper's code 10 %")
    rotate: float = Field(default=30.0, ge=0, le=180, description="+- degrees about the centre; paper's code 30")
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


_COCO = {
    "labeled": ViewConfig(colour=True),
    "weak": ViewConfig(),
    "strong": ViewConfig(colour=True, geometric=True, erase=True),
    "test": ViewConfig(short_side=(800, 800), flip=0.0),
}
_STREET: dict[str, Any] = {"short_side": (800, 1024), "long_side": 2048}
_CUTOUT: dict[str, Any] = {
    "erase": True,
    "erase_count": (1, 5),
    "erase_holes": ((0, 0), (60, 30), (120, 60), (200, 100), (300, 150), (400, 200)),
    # The paper's code cuts out zeros after normalisation: the mean colour before it.
    "erase_fill": (0.485, 0.456, 0.406),
}
PRESETS: dict[str, dict[str, ViewConfig]] = {
    # Method 3. coco: Mask R-CNN and "w/o DALoss" configs; coco_knet: the K-Net DALoss config.
    "coco": _COCO,
    "coco_knet": _COCO | {"strong": _COCO["strong"].model_copy(update={"order": "random"})},
    "cityscapes": {
        "labeled": ViewConfig(photometric="cityscapes", **_STREET, **_CUTOUT),
        "weak": ViewConfig(**_STREET),
        "strong": ViewConfig(colour=True, geometric=True, **_STREET, **_CUTOUT),
        "test": ViewConfig(short_side=(1024, 1024), long_side=2048, flip=0.0),
    },
    # The supervised baseline without the semi-supervised augmentation (no dagger): one scale and a flip.
    "plain": _COCO | {"labeled": ViewConfig(short_side=(800, 800))},
}


class AugmentConfig(BaseModel):
    """The four streams. What is not given comes from ``preset``; ``image_size`` scales all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset = Field(default="coco", description="where unnamed values come from (method 3, the paper's code)")
    image_size: int | None = Field(
        default=None,
        ge=16,
        description="px, the short side of the test view; the other views keep their ratio to it. Ours",
    )
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

    def view(self, kind: Kind) -> ViewConfig:
        """The pipeline of one stream, scaled to ``image_size``."""
        config: ViewConfig = getattr(self, kind)
        if self.image_size is None:
            return config
        return scale_view(config, self.image_size / self.test.short_side[1])


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything drawn for one image's view, on the CPU."""

    size: tuple[int, int]  # (h, w) of the view, before padding
    flip: bool
    steps: tuple[Step, ...]  # in the order of application
    colour: tuple[Colour, int]  # operation and level
    moved: Tensor  # (3, 3) float64, the geometric operation: view px -> view px
    patches: tuple[tuple[int, int, int, int], ...]  # x1, y1, x2, y2 px of the view
    matrix: Tensor  # (3, 3) float64: original px -> view px, all of the above composed


def view_seed(seed: int, row: int, slot: int, kind: Kind | Literal["photometric"]) -> int:
    """The seed of one view: a hash of the run's seed, the global row, the position in it and the kind."""
    digest = hashlib.blake2b(f"{seed}/{row}/{slot}/{kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw(config: ViewConfig, size: tuple[int, int], seed: int) -> Plan:
    """Draws the view of an image of ``size`` = (H, W) px. The same arguments give the same plan anywhere."""
    rng = np.random.Generator(np.random.PCG64(seed))
    height, width = size
    short = rng.integers(config.short_side[0], config.short_side[1], endpoint=True)
    ratio = min(short / min(size), config.long_side / max(size))
    view = (max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)))
    flip = bool(rng.random() < config.flip)
    steps = _draw_order(config, rng)
    name, level = COLOURS[rng.integers(len(COLOURS))], int(rng.integers(*config.colour_level, endpoint=True))
    moved = _draw_move(config, view, rng) if config.geometric else geometry.identity()
    patches = _draw_patches(config, view, rng) if config.erase else ()
    matrix = geometry.scale(view[1] / width, view[0] / height)
    if flip:
        matrix = geometry.flip_horizontal(view[1]) @ matrix
    return Plan(
        size=view,
        flip=flip,
        steps=steps,
        colour=(name, level),
        moved=moved,
        patches=patches,
        matrix=moved @ matrix,
    )


def _draw_order(config: ViewConfig, rng: np.random.Generator) -> tuple[Step, ...]:
    steps: list[Step] = ["colour", "geometric", "erase"]
    shuffled = [steps[i] for i in rng.permutation(3)]
    if config.order == "erase_last":
        shuffled.sort(key=lambda step: step == "erase")  # stable: the other two stay shuffled
    return tuple(step for step in shuffled if getattr(config, step))


def _draw_move(config: ViewConfig, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """One of four (method 3), (3, 3) float64. Matrices refer to the unpadded view."""
    height, width = size
    choice, first, second = rng.integers(4), rng.uniform(-1, 1), rng.uniform(-1, 1)
    center = (width / 2, height / 2)
    if choice == 0:
        return geometry.translate(first * config.translate * width, 0.0)
    if choice == 1:
        return geometry.translate(0.0, first * config.translate * height)
    if choice == 2:
        return geometry.rotate(first * config.rotate, center)
    # The paper's code has tanh where tan was meant: at most .48 at 30 degrees.
    largest = np.radians(config.shear)
    return geometry.shear(float(np.tanh(first * largest)), float(np.tanh(second * largest)), center)


def _draw_patches(
    config: ViewConfig, size: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[int, int, int, int], ...]:
    height, width = size
    patches = []
    for _ in range(rng.integers(*config.erase_count, endpoint=True)):
        if config.erase_holes:
            w, h = config.erase_holes[rng.integers(len(config.erase_holes))]
            x, y = int(rng.integers(width)), int(rng.integers(height))
        else:
            share = rng.uniform(*config.erase_ratio)
            w, h = int(share * width), int(share * height)
            x, y = (int(rng.integers(width - w, endpoint=True)), int(rng.integers(height - h, endpoint=True)))
        patches.append((x, y, min(x + w, width), min(y + h, height)))
    return tuple(patches)


def plan(samples: list[Sample], config: AugmentConfig, seed: int, kind: Kind) -> list[Plan]:
    """One plan a sample; each depends on its own row, slot and size only, never on its neighbours."""
    view = config.view(kind)
    return [draw(view, (s.image.shape[1], s.image.shape[2]), view_seed(seed, s.row, s.slot, kind)) for s in samples]


def render(samples: list[Sample], plans: list[Plan], config: ViewConfig, device: torch.device | str) -> Views:
    """The pictures of the plans, padded with zeros bottom and right to a common multiple of 32 px."""
    height = max(-(-p.size[0] // PAD) * PAD for p in plans)
    width = max(-(-p.size[1] // PAD) * PAD for p in plans)
    images = torch.zeros(len(plans), 3, height, width, device=device)
    for out, sample, one in zip(images, samples, plans, strict=True):
        out[:, : one.size[0], : one.size[1]] = _picture(sample.image.to(device, non_blocking=True), one, config)
    return Views(
        images=images,
        sizes=torch.tensor([p.size for p in plans], device=device),
        matrix=torch.stack([p.matrix for p in plans]).float().to(device),
        image_ids=torch.tensor([s.image_id for s in samples]),
        rows=torch.tensor([s.row for s in samples]),
    )


def _picture(image: Tensor, plan: Plan, config: ViewConfig) -> Tensor:
    """One view (3, h, w) float in [0, 1] of a uint8 image (3, H, W) on its device."""
    view = _view_ops.resize(image.float().div_(255), plan.size)
    if plan.flip:
        view = view.flip(-1)
    for step in plan.steps:
        if step == "colour":
            view = _view_ops.colour(view, *plan.colour)
        elif step == "geometric":
            view = _view_ops.warp(view, plan.moved, config.fill)
        else:
            view = _view_ops.erase(view, plan.patches, config.erase_fill)
    return view


def make_views(
    samples: list[Sample], config: AugmentConfig, seed: int, kind: Kind, device: torch.device | str
) -> Views:
    """Views of one kind; ``seed`` is the run's. Raises ValueError without samples."""
    if not samples:
        raise ValueError(f"make_views: expected at least one sample for the {kind} view, got none")
    return render(samples, plan(samples, config, seed, kind), config.view(kind), device)


def make_targets(samples: list[Sample], plans: list[Plan], device: torch.device | str) -> list[Targets]:
    """The truth of labeled samples in the frame of their plans, less instances with a side below 1 px there.

    Masks stay as they were annotated: a flip reverses their columns (exact), scale goes into the affine, so
    they remain upright and are read by RoIAlign. A geometric operation goes into the affine as well.
    """
    return [_targets_of(sample, one, device) for sample, one in zip(samples, plans, strict=True)]


def _targets_of(sample: Sample, plan: Plan, device: torch.device | str) -> Targets:
    if sample.boxes is None or sample.labels is None or sample.masks is None:
        raise ValueError(f"make_targets: image {sample.image_id} has no truth; expected a labeled sample")
    # All small work on the CPU, where selecting rows waits for no device.
    size = torch.tensor(plan.size)
    boxes = geometry.clip_boxes(geometry.transform_boxes(sample.boxes.double(), plan.matrix), size).float()
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1.0).all(dim=1)
    grids = sample.masks if bool(keep.all()) else sample.masks[keep]
    if "geometric" in plan.steps:
        masks = Masks.full(grids.to(device)).warp(plan.matrix)
    else:
        height, width = sample.image.shape[1:]
        affine = geometry.scale(plan.size[1] / width, plan.size[0] / height).float().to(device)
        grids = grids.to(device, non_blocking=True)
        masks = Masks(grids=grids.flip(-1) if plan.flip else grids, affine=affine.expand(len(grids), 3, 3))
    return Targets(boxes=boxes[keep].to(device), labels=sample.labels[keep].to(device), masks=masks)


def make_batch(
    labeled: list[Sample],
    unlabeled: list[Sample],
    config: AugmentConfig,
    seed: int,
    device: torch.device | str,
) -> Batch:
    """Everything one rank needs for one step. Weak and strong views draw scale and flip independently."""
    if not labeled:
        raise ValueError("make_batch: expected at least one labeled sample, got none; batch.labeled must be >= 1")
    plans = plan(labeled, config, seed, "labeled")
    weak = make_views(unlabeled, config, seed, "weak", device) if unlabeled else None
    return Batch(
        labeled=render(labeled, plans, config.view("labeled"), device),
        targets=make_targets(labeled, plans, device),
        weak=weak,
        strong=make_views(unlabeled, config, seed, "strong", device) if unlabeled else None,
        scored=None if weak is None else scored_in(weak, unlabeled),
    )


def scored_in(weak: Views, samples: list[Sample]) -> list[Predictions] | None:
    """The masks from elsewhere in the frame of the weak views, where the samples have any."""
    given = [sample.scored for sample in samples if sample.scored is not None]
    if not given:
        return None
    if len(given) != len(samples):
        raise ValueError(f"scored_in: expected masks from elsewhere for all {len(samples)} samples, got {len(given)}")
    device = weak.matrix.device
    return [p.to(device).warp(m, size) for p, m, size in zip(given, weak.matrix, weak.sizes, strict=True)]
