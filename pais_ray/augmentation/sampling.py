"""Draw the random parameters of a view from a seed, on the CPU."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from pais_ray.augmentation.pixel_ops import COLORS, Color
from pais_ray.augmentation.presets import Kind, Step, ViewConfig, ViewSet
from pais_ray.augmentation.sample import Sample
from pais_ray.structures import geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewPlan:
    """All parameters drawn for the view of one image."""

    size: tuple[int, int]  # (h, w) of the view, before padding
    flip: bool
    steps: tuple[Step, ...]  # in order of application
    color: tuple[Color, int]  # operation and its level
    motion: Tensor  # (3, 3) float64, the geometric operation: view px -> view px
    patches: tuple[tuple[int, int, int, int], ...]  # x1, y1, x2, y2 px of the view
    matrix: Tensor  # (3, 3) float64: px of the original -> px of the view, all geometric parameters composed


def view_seed(seed: int, row: int, slot: int, kind: Kind | Literal["photometric"]) -> int:
    """The seed of one view: a hash of the run's seed, the global row, the position in the row, and the kind."""
    digest = hashlib.blake2b(f"{seed}/{row}/{slot}/{kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw_view(config: ViewConfig, size: tuple[int, int], seed: int) -> ViewPlan:
    """Draw the view of an image of ``size`` = (H, W) px. The same arguments give the same plan on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    height, width = size
    short = rng.integers(config.short_side[0], config.short_side[1], endpoint=True)
    ratio = min(short / min(size), config.long_side / max(size))
    view = (max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)))
    flip = bool(rng.random() < config.flip)
    steps = _draw_order(config, rng)
    name, level = COLORS[rng.integers(len(COLORS))], int(rng.integers(*config.color_level, endpoint=True))
    motion = _draw_motion(config, view, rng) if config.geometric else geometry.identity()
    patches = _draw_patches(config, view, rng) if config.erase else ()
    matrix = geometry.scale(view[1] / width, view[0] / height)
    if flip:
        matrix = geometry.flip_horizontal(view[1]) @ matrix
    return ViewPlan(
        size=view,
        flip=flip,
        steps=steps,
        color=(name, level),
        motion=motion,
        patches=patches,
        matrix=motion @ matrix,
    )


def _draw_order(config: ViewConfig, rng: np.random.Generator) -> tuple[Step, ...]:
    steps: list[Step] = ["color", "geometric", "erase"]
    shuffled = [steps[i] for i in rng.permutation(3)]
    if config.order == "erase_last":
        shuffled.sort(key=lambda step: step == "erase")  # the sort is stable: the other two stay shuffled
    return tuple(step for step in shuffled if getattr(config, step))


def _draw_motion(config: ViewConfig, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """The matrix (3, 3) float64 of one of four operations (method 3), in the frame of the view before padding."""
    height, width = size
    choice, first, second = rng.integers(4), rng.uniform(-1, 1), rng.uniform(-1, 1)
    center = (width / 2, height / 2)
    if choice == 0:
        return geometry.translate(first * config.translate * width, 0.0)
    if choice == 1:
        return geometry.translate(0.0, first * config.translate * height)
    if choice == 2:
        return geometry.rotate(first * config.rotate, center)
    # Released code: tanh, where tan was probably intended; at most .48 at 30 degrees.
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


def plan_views(samples: list[Sample], views: ViewSet, seed: int, kind: Kind) -> list[ViewPlan]:
    """One plan per sample. It depends on the row, the slot and the size of the sample, never on other samples."""
    view = views[kind]
    return [
        draw_view(view, (s.image.shape[1], s.image.shape[2]), view_seed(seed, s.row, s.slot, kind)) for s in samples
    ]
