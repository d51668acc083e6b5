"""Generates a data set in the layout of Cityscapes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 80)


def write_scene(root: Path, part: str, city: str, number: int, values: np.ndarray) -> str:
    """Writes image and instanceIds.png of one scene; returns CITY/NAME."""
    name = f"{city}/{city}_{number:06d}_000019"
    for folder in ("gtFine", "leftImg8bit"):
        (root / folder / part / city).mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(root / "gtFine" / part / f"{name}_gtFine_instanceIds.png")
    picture = np.random.default_rng(number).integers(0, 255, (*values.shape, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "leftImg8bit" / part / f"{name}_leftImg8bit.png")
    return name


def scene(*rectangles: tuple[int, int, int, int, int], background: int = 7) -> np.ndarray:
    """Returns values (60, 80) with rectangles (value, top, left, bottom, right) painted in order on road."""
    values = np.full(SIZE, background)
    for value, top, left, bottom, right in rectangles:
        values[top:bottom, left:right] = value
    return values


def polygons(*objects: tuple[str, int, int, int, int], **more: object) -> dict[str, object]:
    """Returns the polygons.json of the same rectangles, by label; the border of a polygon belongs to it."""
    entries = [
        {"label": label, "polygon": [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]}
        for label, top, left, bottom, right in objects
    ]
    return {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": entries, **more}


def write_polygons(root: Path, part: str, name: str, tree: object) -> None:
    """Writes the polygons.json of a scene and removes its instanceIds.png."""
    (root / "gtFine" / part / f"{name}_gtFine_polygons.json").write_text(json.dumps(tree))
    (root / "gtFine" / part / f"{name}_gtFine_instanceIds.png").unlink(missing_ok=True)
