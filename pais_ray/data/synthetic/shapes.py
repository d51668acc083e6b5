"""Outlines, colors and textures of single synthetic shapes. Torch-free."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Color = tuple[float, float, float]

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots", "clouds", "rings")  # one per class
CLASS_LOOK = 0.8  # probability that a shape has the hue and texture of its class; otherwise they are random
HUE_SPREAD = 0.07  # fraction of the color circle, in both directions; classes are 1/6 apart
OVERSAMPLING = 4  # of outlines, in each direction


def draw_shape(
    label: str, center: Point, radius: float, random: np.random.Generator
) -> tuple[tuple[int, int], np.ndarray]:
    """A shape with random rotation and aspect ratio: the corner (x, y) of its window, and its coverage (h, w) uint8."""
    squeeze = random.uniform(0.75, 1.0)
    direction = unit_vector(random.uniform(0, 360))
    reach = math.ceil(1.35 * radius) + 2
    corner = (math.floor(center[0]) - reach, math.floor(center[1]) - reach)
    outline = OUTLINES[label]
    loops = [[rotate_to((radius * x, radius * squeeze * y), direction, center) for x, y in loop] for loop in outline]
    return corner, fill(loops, corner, (2 * reach, 2 * reach))


def fill(loops: list[list[Point]], corner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Coverage (h, w) uint8 of a filled outline. A second loop is a hole."""
    image = Image.new("L", (shape[1] * OVERSAMPLING, shape[0] * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    for number, loop in enumerate(loops):
        points = [(round((x - corner[0]) * OVERSAMPLING), round((y - corner[1]) * OVERSAMPLING)) for x, y in loop]
        draw.polygon(points, fill=0 if number else 255)
    return np.asarray(image.reduce(OVERSAMPLING))


def draw_colors(label: str, random: np.random.Generator, shape: tuple[int, ...], radius: float) -> np.ndarray:
    """Colors (h, w, 3) of a shape: usually with the hue and texture of its class, otherwise random."""
    own = CLASSES.index(label)
    if random.random() < CLASS_LOOK:
        hue = own / len(CLASSES) + random.uniform(-HUE_SPREAD, HUE_SPREAD)
        kind = TEXTURES[own]
    else:
        hue, kind = random.random(), TEXTURES[int(random.integers(len(TEXTURES)))]
    saturation, value = random.uniform(0.55, 0.95), random.uniform(0.65, 1.0)
    light = hsv(hue, saturation, value)
    dark = hsv(hue + random.uniform(-0.05, 0.05), saturation, value * random.uniform(0.4, 0.75))
    return mix(dark, light, texture(kind, random, shape, max(5.0, radius * random.uniform(0.25, 0.5))))


def texture(kind: str, random: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """A pattern (h, w) in [0, 1] with a period of about ``scale`` px, randomly rotated and shifted."""
    height, width = shape[:2]
    if kind == "clouds":
        coarse = random.integers(0, 256, (2 + int(height / scale), 2 + int(width / scale)), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255.0
    cos, sin = unit_vector(random.uniform(0, 360))
    shift = random.uniform(0, 1, 2)
    ys, xs = (np.arange(height) - height / 2)[:, None] / scale, (np.arange(width) - width / 2) / scale
    u, v = cos * xs - sin * ys + shift[0], sin * xs + cos * ys + shift[1]
    if kind == "stripes":
        return 2 * np.abs(u - np.floor(u) - 0.5)
    if kind == "rings":
        radius = 1.5 * np.sqrt(u * u + v * v)
        return 2 * np.abs(radius - np.floor(radius) - 0.5)
    if kind == "checks":
        return (np.floor(u) + np.floor(v)) % 2
    if kind == "dots":
        u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
        return (u * u + v * v > 0.09).astype(np.float64)
    return np.clip(0.5 + 0.15 * u, 0, 1)  # plain: a weak gradient


def mix(dark: Color, light: Color, field: np.ndarray) -> np.ndarray:
    return np.array(dark) + field[:, :, None] * (np.array(light) - np.array(dark))


def hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * red, 255 * green, 255 * blue


def unit_vector(degrees: float) -> Point:
    """(cos, sin), rounded so that the result does not depend on the last bit of the math library."""
    return round(math.cos(math.radians(degrees)), 9), round(math.sin(math.radians(degrees)), 9)


def rotate_to(point: Point, direction: Point, center: Point) -> Point:
    """``point`` rotated to the unit vector ``direction`` and moved to ``center``."""
    (x, y), (cos, sin) = point, direction
    return center[0] + cos * x - sin * y, center[1] + sin * x + cos * y


def _corners(num: int, *radii: float) -> list[Point]:
    """``num`` points around the origin, with the given radii in turn."""
    polar = ((unit_vector(360 * k / num), radii[k % len(radii)]) for k in range(num))
    return [(cos * radius, sin * radius) for (cos, sin), radius in polar]


# Loops of points around the origin, within a radius of 1.35. A second loop is a hole.
OUTLINES: dict[str, list[list[Point]]] = {
    "disc": [_corners(48, 1.0)],
    "square": [[(0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9)]],
    "triangle": [_corners(3, 1.35)],
    "star": [_corners(10, 1.3, 0.52)],
    "ring": [_corners(48, 1.05), _corners(48, 0.55)],
    "cross": [
        [
            rotate_to(point, unit_vector(90 * quarter), (0.0, 0.0))
            for quarter in range(4)
            for point in ((1.2, -0.4), (1.2, 0.4), (0.4, 0.4))
        ]
    ],
}
