"""Outlines and textures of the synthetic shapes: what one shape looks like, without a scene. Torch-free."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Color = tuple[float, float, float]

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots", "clouds", "rings")  # of each class
CLASS_LOOK = 0.8  # how often a shape wears its class's hue and texture; otherwise any
HUE_SPREAD = 0.07  # of the color circle, either way; classes are 1/6 apart
OVERSAMPLING = 4  # of outlines, per side


def draw_shape(
    label: str, center: Point, radius: float, random: np.random.Generator
) -> tuple[tuple[int, int], np.ndarray]:
    """Corner (x, y) of a window around the shape, turned and squeezed at random, and cover (h, w) uint8."""
    squeeze = random.uniform(0.75, 1.0)
    along = turn(random.uniform(0, 360))
    reach = math.ceil(1.35 * radius) + 2
    corner = (math.floor(center[0]) - reach, math.floor(center[1]) - reach)
    loops = [[place((radius * x, radius * squeeze * y), along, center) for x, y in loop] for loop in OUTLINES[label]]
    return corner, fill(loops, corner, (2 * reach, 2 * reach))


def fill(loops: list[list[Point]], corner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Coverage (h, w) uint8 of a filled outline; a second loop is a hole in it."""
    image = Image.new("L", (shape[1] * OVERSAMPLING, shape[0] * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    for number, loop in enumerate(loops):
        points = [(round((x - corner[0]) * OVERSAMPLING), round((y - corner[1]) * OVERSAMPLING)) for x, y in loop]
        draw.polygon(points, fill=0 if number else 255)
    return np.asarray(image.reduce(OVERSAMPLING))


def look(label: str, random: np.random.Generator, shape: tuple[int, ...], radius: float) -> np.ndarray:
    """Colors (h, w, 3) of a shape: mostly the hue and texture of its class, sometimes any."""
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
    """A field (h, w) in [0, 1] that repeats about every ``scale`` px, turned and shifted at random."""
    height, width = shape[:2]
    if kind == "clouds":
        coarse = random.integers(0, 256, (2 + int(height / scale), 2 + int(width / scale)), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255.0
    cos, sin = turn(random.uniform(0, 360))
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
    return np.clip(0.5 + 0.15 * u, 0, 1)  # plain: a slow gradient


def mix(dark: Color, light: Color, field: np.ndarray) -> np.ndarray:
    return np.array(dark) + field[:, :, None] * (np.array(light) - np.array(dark))


def hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * red, 255 * green, 255 * blue


def turn(degrees: float) -> Point:
    """(cos, sin), rounded so that the last bit of a mathematics library does not show."""
    return round(math.cos(math.radians(degrees)), 9), round(math.sin(math.radians(degrees)), 9)


def place(point: Point, along: Point, center: Point) -> Point:
    """``point`` turned into the direction ``along`` and moved to ``center``."""
    (x, y), (cos, sin) = point, along
    return center[0] + cos * x - sin * y, center[1] + sin * x + cos * y


def _corners(num: int, *radii: float) -> list[Point]:
    """``num`` points about the origin, at the given radii in turn."""
    places = ((turn(360 * k / num), radii[k % len(radii)]) for k in range(num))
    return [(cos * radius, sin * radius) for (cos, sin), radius in places]


# Loops of points about the origin, within 1.35; a second loop is a hole.
OUTLINES: dict[str, list[list[Point]]] = {
    "disc": [_corners(48, 1.0)],
    "square": [[(0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9)]],
    "triangle": [_corners(3, 1.35)],
    "star": [_corners(10, 1.3, 0.52)],
    "ring": [_corners(48, 1.05), _corners(48, 0.55)],
    "cross": [
        [
            place(point, turn(90 * quarter), (0.0, 0.0))
            for quarter in range(4)
            for point in ((1.2, -0.4), (1.2, 0.4), (0.4, 0.4))
        ]
    ],
}
