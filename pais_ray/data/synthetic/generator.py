"""Generate a COCO data set of textured shapes that occlude each other: the built-in default and a test fixture.

Every image is a pure function of (seed, part, position). Pixels are computed with sums, products and square roots only,
because numpy's sin and cos differ in the last bit between processors. The same library versions therefore produce the
same bytes on every machine. Torch-free.
"""

import io
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pais_ray.data.synthetic.shapes import (
    CLASSES,
    TEXTURES,
    draw_colors,
    draw_shape,
    fill,
    hsv,
    mix,
    rotate_to,
    texture,
    unit_vector,
)

VERSION = 1  # increase it with every change of the generated files
MARKER = "synthetic.json"

Corner = tuple[int, int]

# Ids start at 0 and have gaps, as in real data sets.
CATEGORIES = dict(zip(CLASSES, (0, 2, 3, 5, 9, 10), strict=True))

# Radii in px of a 192 px image, for COCO's size classes (areas below 32^2, below 96^2 and larger), and their shares.
RADII = ((10.0, 17.0), (20.0, 45.0), (60.0, 80.0))
BUCKET_SHARE = (0.27, 0.45, 0.28)
MIN_VISIBLE = 0.4  # fraction of an instance's area; otherwise the occluding shape is placed elsewhere
MIN_AREA = 40  # px of an instance
RLE_SHARE = 0.15  # of the masks that polygons could represent


def generate(folder: str, *, train: int = 240, val: int = 60, size: int = 192, seed: int = 0) -> None:
    """Write ``train.json``, ``val.json`` and ``images/`` to ``folder``: ``train`` and ``val`` images of
    ``size`` x ``size`` px.

    The folder appears atomically. If it already contains the same data set it is unchanged; another generated data set
    is replaced. Raises ValueError for invalid arguments, and if the folder contains other files.
    """
    if train < 1 or val < 1 or size < 64 or seed < 0:
        got = f"got {train}, {val}, {size}, {seed}"
        raise ValueError(f"synthetic: expected train >= 1, val >= 1, size >= 64 and seed >= 0, {got}")
    identity = {"version": VERSION, "seed": seed, "train": train, "val": val, "size": size}
    folder = os.path.abspath(folder)
    if _marker(folder) == identity:
        return
    if os.path.isdir(folder) and os.listdir(folder) and _marker(folder) is None:
        raise ValueError(f"{folder}: expected an empty or generated folder, got other files; choose another folder")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=os.path.dirname(folder))
    try:
        os.chmod(partial, 0o755)
        os.mkdir(os.path.join(partial, "images"))
        for part, (name, count, start) in enumerate((("train", train, 0), ("val", val, train))):
            _write_part(partial, name, [(part, start + i, i) for i in range(count)], size, seed)
        with open(os.path.join(partial, MARKER), "w") as file:
            json.dump(identity, file)
        _move_into_place(partial, folder, identity)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _marker(folder: str) -> dict[str, int] | None:
    try:
        with open(os.path.join(folder, MARKER)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _move_into_place(partial: str, folder: str, identity: dict[str, int]) -> None:
    """Rename the finished folder to its destination, unless another process has already written the same data set."""
    if _marker(folder) not in (None, identity):
        old = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=os.path.dirname(folder))
        os.rename(folder, os.path.join(old, "replaced"))
        shutil.rmtree(old)
    try:
        os.rename(partial, folder)
    except OSError:
        if _marker(folder) != identity:
            raise


def _write_part(folder: str, name: str, places: list[tuple[int, int, int]], size: int, seed: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part, image_id, position in places:
        random = np.random.default_rng([seed, part, position])
        scene = _scene(random, position, size)
        # as in real data sets, some files are lossless and most are not
        suffix = "png" if position % 10 == 0 else "jpg"
        file_name = f"{name}_{position:06d}.{suffix}"
        buffer = io.BytesIO()
        image = Image.fromarray(scene.pixels)
        if suffix == "png":
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=93)
        with open(os.path.join(folder, "images", file_name), "wb") as file:
            file.write(buffer.getvalue())
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for item in scene.annotations(random):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | item)
    tree = {
        "info": {"description": f"pais_ray synthetic shapes, version {VERSION}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": CATEGORIES[c], "name": c, "supercategory": "shape"} for c in CLASSES],
    }
    with open(os.path.join(folder, f"{name}.json"), "w") as file:
        json.dump(tree, file, separators=(",", ":"))


@dataclass(kw_only=True)
class Scene:
    """An image that is being painted. ``owner`` (H, W) is 0 for background, otherwise 1 + the index of the topmost
    instance, so that a visible pixel belongs to one instance only."""

    pixels: np.ndarray  # (H, W, 3) uint8
    owner: np.ndarray  # (H, W) int64
    labels: list[str]
    crowds: list[bool]
    areas: list[int]  # px, before occlusion

    def paint(
        self,
        cover: np.ndarray,
        colors: np.ndarray,
        corner: tuple[int, int],
        label: str | None,
        crowd: bool = False,
    ) -> bool:
        """Paint ``colors`` (h, w, 3) through ``cover`` (h, w) uint8 with its top left corner at (x, y).

        An object with label None is not annotated. Returns False, and paints nothing, if too little of this instance
        or of another one would be visible.
        """
        (x, y), (height, width) = corner, self.owner.shape
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + len(cover), height), min(x + cover.shape[1], width)
        if bottom <= top or right <= left:
            return False
        cover = cover[top - y : bottom - y, left - x : right - x]
        colors = colors[top - y : bottom - y, left - x : right - x]
        solid = cover >= 128
        area = int(solid.sum())
        window = self.owner[top:bottom, left:right]
        num = len(self.areas) + 1
        hidden = np.bincount(window[solid], minlength=num)[1:]
        visible = np.bincount(self.owner.ravel(), minlength=num)[1:] - hidden
        too_little = (hidden > 0) & (visible < MIN_VISIBLE * np.array(self.areas))
        if too_little.any() or (label is not None and area < MIN_AREA):
            return False
        alpha = cover[:, :, None] / 255.0
        under = self.pixels[top:bottom, left:right]
        under[:] = np.rint(alpha * colors + (1 - alpha) * under).astype(np.uint8)
        window[solid] = 0 if label is None else num
        if label is not None:
            self.labels.append(label)
            self.crowds.append(crowd)
            self.areas.append(area)
        return True

    def annotations(self, random: np.random.Generator) -> list[dict[str, Any]]:
        """COCO annotations of the visible instances, without ids. Crowds, masks with a hole and a share of the other
        masks are uncompressed RLE; the rest are polygons along pixel edges, which represent the mask exactly."""
        out = []
        for index, (label, crowd) in enumerate(zip(self.labels, self.crowds, strict=True)):
            mask = self.owner == index + 1
            polygons = None if crowd or random.random() < RLE_SHARE else outline(mask)
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            entry: dict[str, Any] = {
                "category_id": CATEGORIES[label],
                "bbox": [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)],
                "area": int(mask.sum()),
                "segmentation": run_lengths(mask) if polygons is None else polygons,
                "iscrowd": int(crowd),
            }
            out.append(entry)
        return out


def outline(mask: np.ndarray) -> list[list[int]] | None:
    """Polygons [x1, y1, ...] along the pixel edges of a mask (H, W) bool, one per 4-connected part; None if a part has
    a hole, which polygons cannot represent."""
    padded = np.pad(mask, 1).astype(np.int8)
    down, across = np.diff(padded, axis=0), np.diff(padded, axis=1)
    # Unit edges with the mask on their right: east along tops, west along bottoms, south along right sides, north along
    # left sides. Maps a corner to the directions of the edges that start there.
    leaving: dict[Corner, list[Corner]] = {}
    for steps, value, offset, direction in (
        (down, 1, (-1, 0), (1, 0)),
        (down, -1, (0, 0), (-1, 0)),
        (across, -1, (0, -1), (0, 1)),
        (across, 1, (0, 0), (0, -1)),
    ):
        for y, x in np.argwhere(steps == value).tolist():
            leaving.setdefault((x + offset[0], y + offset[1]), []).append(direction)
    polygons = []
    while leaving:
        start = min(leaving)  # the topmost of the leftmost corners: the outline turns there, and one edge starts there
        corner, direction, twice_area = start, (0, 0), 0
        polygon: list[int] = []
        while True:
            choices = leaving[corner]
            right = (-direction[1], direction[0])
            # if two pixels touch at this corner only, a right turn stays with the same pixel
            heading = right if right in choices else choices[0]
            choices.remove(heading)
            if not choices:
                del leaving[corner]
            if heading != direction:
                polygon += corner
            direction = heading
            following = (corner[0] + direction[0], corner[1] + direction[1])
            twice_area += corner[0] * following[1] - following[0] * corner[1]
            corner = following
            if corner == start:
                break
        if twice_area < 0:
            return None
        polygons.append(polygon)
    return polygons


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO RLE of a mask (H, W) bool: runs along the columns, background first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def _scene(random: np.random.Generator, position: int, size: int) -> Scene:
    """One image. Special contents depend on its position, so that even a small data set has every kind."""
    pixels, owner = _background(random, size), np.zeros((size, size), dtype=np.int64)
    scene = Scene(pixels=pixels, owner=owner, labels=[], crowds=[], areas=[])
    if position % 12 != 7:  # every twelfth image has no instances
        num_shapes = int(random.integers(2, 8))
        crowd_at = int(random.integers(num_shapes)) if position % 8 == 2 else -1
        for number in range(num_shapes):
            if number == crowd_at:
                _add_crowd(scene, random, size)
            _add_shape(scene, random, size)
        if position % 4 == 1:
            _add_pole(scene, random, size)
    grain = random.integers(-7, 8, (size, size, 1))
    scene.pixels = np.clip(scene.pixels + grain, 0, 255).astype(np.uint8)
    return scene


def _add_shape(scene: Scene, random: np.random.Generator, size: int) -> None:
    label = CLASSES[int(random.integers(len(CLASSES)))]
    low, high = RADII[int(random.choice(len(RADII), p=BUCKET_SHARE))]
    for _ in range(12):
        radius = random.uniform(low, high) * size / 192
        x, y = random.uniform(0.5 * radius, size - 0.5 * radius, 2).tolist()
        corner, cover = draw_shape(label, (x, y), radius, random)
        if scene.paint(cover, draw_colors(label, random, cover.shape, radius), corner, label):
            return


def _add_crowd(scene: Scene, random: np.random.Generator, size: int) -> None:
    """Add many tiny shapes of one class that occlude each other, annotated as one crowd region."""
    label = CLASSES[int(random.integers(len(CLASSES)))]
    reach = random.uniform(0.1, 0.18) * size
    side = 2 * math.ceil(reach + 0.05 * size + 4)  # no shape crosses the border of this canvas
    cover, colors = np.zeros((side, side, 1)), np.zeros((side, side, 3))
    for _ in range(int(random.integers(18, 34))):
        radius = random.uniform(0.022, 0.034) * size
        center = (side / 2 + random.uniform(-reach, reach, 2)).tolist()
        (left, top), tiny = draw_shape(label, center, radius, random)
        window = (slice(top, top + len(tiny)), slice(left, left + tiny.shape[1]))
        alpha = tiny[:, :, None] / 255.0
        under = cover[window] * (1 - alpha)
        color = draw_colors(label, random, tiny.shape, radius)
        cover[window] = alpha + under
        share = np.divide(alpha, cover[window], out=np.zeros_like(alpha), where=alpha > 0)
        colors[window] += share * (color - colors[window])
    solid = np.rint(cover[:, :, 0] * 255).astype(np.uint8)
    for _ in range(12):
        x, y = random.integers(-side // 8, size - side + side // 8, 2).tolist()
        if scene.paint(solid, colors, (x, y), label, crowd=True):
            return


def _add_pole(scene: Scene, random: np.random.Generator, size: int) -> None:
    """Add a thin bar across the image. It is not annotated and splits the instances that it crosses."""
    large = [i for i, area in enumerate(scene.areas) if area > 0.01 * size * size and not scene.crowds[i]]
    for _ in range(6 if large else 0):
        ys, xs = np.nonzero(scene.owner == large[int(random.integers(len(large)))] + 1)
        half = random.uniform(1.5, 3.5) * size / 192
        direction = unit_vector(random.uniform(0, 180))
        ends = [(x * 2 * size, y * half) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        bar = [rotate_to(end, direction, (float(xs.mean()), float(ys.mean()))) for end in ends]
        cover = fill([bar], (0, 0), (size, size))
        hue = random.random()
        colors = mix(hsv(hue, 0.2, 0.1), hsv(hue, 0.2, 0.3), texture("clouds", random, (size, size), 12.0))
        if scene.paint(cover, colors, (0, 0), None):
            return


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """Dark clouds (size, size, 3) uint8 of two scales with a faint texture."""
    hue, value = random.random(), random.uniform(0.25, 0.75)
    dark = hsv(hue, random.uniform(0.05, 0.35), value * 0.55)
    light = hsv(hue + random.uniform(-0.2, 0.2), random.uniform(0.05, 0.35), value)
    coarse, fine = (texture("clouds", random, (size, size), scale) for scale in (size / 4, size / 24))
    kind = TEXTURES[int(random.integers(len(TEXTURES)))]
    pattern = texture(kind, random, (size, size), random.uniform(0.05, 0.2) * size)
    return np.rint(mix(dark, light, 0.5 * coarse + 0.25 * fine + 0.25 * pattern)).astype(np.uint8)
