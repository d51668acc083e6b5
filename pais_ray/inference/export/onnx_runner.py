"""An exported segmentor on images, with numpy, Pillow and onnxruntime alone: `python run.py IMAGE... --draw DIR`.

This file imports nothing of its package: `pais-ray export` puts a copy of it, run.py, beside the model.

Legend: N instances, H x W px of the image, h x w px of the view, which is the image resized and padded.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

FORMAT = 1  # of what the manifest says of the model; a reader refuses what it does not know
MANIFEST, MODEL = "manifest.json", "model.onnx"
DETECTIONS = ["boxes", "labels", "scores", "ious", "masks", "windows"]  # outputs of every exported segmentor
ON = 0.5  # a mask covers the pixels where it is above
TINT = 0.5  # of a mask's color over the picture
HUE = 0.618  # turns between the colors of two neighbors: the golden ratio never comes back


@dataclass(frozen=True, kw_only=True)
class Instances:
    """What is seen in one image, best first, in the image's own pixels."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px
    labels: np.ndarray  # (N,) int64, positions in Detector.categories
    scores: np.ndarray  # (N,) float32 in [0, 1]
    ious: np.ndarray  # (N,) float32 in [0, 1], the predicted IoU of the mask
    masks: np.ndarray  # (N, H, W) bool


class Detector:
    """The model in ``folder``, as `pais-ray export` wrote it. ValueError where it is not whole."""

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"onnxruntime: {error}; install it with `pip install onnxruntime`") from error

        self.manifest = read_manifest(Path(folder))
        self.categories: list[dict[str, Any]] = self.manifest["categories"]  # id and name as in the data set
        self.session = onnxruntime.InferenceSession(str(Path(folder) / MODEL), providers=list(providers))

    def predict(self, image: np.ndarray, score: float = 0.0) -> Instances:
        """Instances of ``image`` (H, W, 3) uint8 RGB, upright, that score at least ``score``."""
        images, size = self.view(image)
        boxes, labels, scores, ious, masks, windows = self.session.run(DETECTIONS, {"images": images, "size": size})
        kept = scores >= score
        (view_height, view_width), (height, width) = size[0], image.shape[:2]
        scale = np.tile(np.array([width / view_width, height / view_height]), 2)
        border = np.tile(np.array([width, height]), 2)
        return Instances(
            boxes=np.clip(boxes[kept] * scale, 0, border).astype(np.float32),
            labels=labels[kept],
            scores=scores[kept],
            ious=ious[kept],
            masks=paste(masks[kept], windows[kept] * scale, (height, width)),
        )

    def results(self, image: np.ndarray, image_id: int) -> list[dict[str, Any]]:
        """COCO results of one image, best first: bbox XYWH px, segmentation as uncompressed RLE."""
        found = self.predict(image)
        x1, y1, x2, y2 = found.boxes.T.astype(float)
        boxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
        return [
            {
                "image_id": image_id,
                "category_id": self.categories[label]["id"],
                "bbox": box.tolist(),
                "score": float(score),
                "mask_iou": float(iou),
                "segmentation": run_lengths(mask),
            }
            for box, label, score, iou, mask in zip(
                boxes, found.labels, found.scores, found.ious, found.masks, strict=True
            )
        ]

    def view(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(1, 3, h, w) float32 in [0, 1], padded with zeros bottom and right, and the valid size (1, 2) int64."""
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image: expected an array (H, W, 3) uint8 RGB, got {kind}")
        if image.size == 0:
            raise ValueError(f"image: expected at least one pixel, got {image.shape}")
        wanted = self.manifest["onnx"]["input"]
        sides = image.shape[:2]
        ratio = min(wanted["short_side"] / min(sides), wanted["long_side"] / max(sides))
        height, width = (max(1, int(side * ratio + 0.5)) for side in sides)
        multiple = wanted["multiple"]
        out = np.zeros((1, 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple), np.float32)
        for channel in range(3):
            # In float, unlike Pillow's 8-bit resize, which rounds.
            plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)
            out[0, channel, :height, :width] = plane.resize((width, height), Image.Resampling.BILINEAR)
        return out.clip(0, 1), np.array([[height, width]], np.int64)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `pais-ray export` says of the ``folder``, whose model is the one it speaks of."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        known, model = manifest["onnx"]["format"], manifest["files"][MODEL]["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {MANIFEST}; give a folder that `pais-ray export` wrote") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the manifest of an ONNX export ({error!r}); export again") from error
    if known != FORMAT:
        raise ValueError(f"{path}: format {known}, this version reads {FORMAT}; use the run.py beside the model")
    with (folder / MODEL).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model:
            raise ValueError(f"{folder / MODEL}: differs from its manifest; the file is damaged, export again")
    return manifest


def read_image(path: str | Path) -> np.ndarray:
    """The upright picture (H, W, 3) uint8 RGB of an image file; alpha is dropped, 16-bit gray scaled by its range."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        upright.info.pop("transparency", None)  # else Pillow mixes colors with it
        if upright.mode.startswith("I"):
            gray = np.clip(np.asarray(upright).astype(np.int64), 0, 65535)
            upright = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        return np.array(upright.convert("RGB"))


def paste(grids: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks (N, H, W) bool of soft ``grids`` (N, rows, columns), each stretched over its window (N, 4) px of an image
    of ``size`` = (H, W): bilinear between the centers of cells, zero around the grid."""
    height, width = size
    out = np.zeros((len(grids), height, width), bool)
    for mask, grid, (left, top, right, bottom) in zip(
        out, np.pad(grids, ((0, 0), (1, 1), (1, 1))), windows, strict=True
    ):
        x1, y1 = max(int(np.floor(left)), 0), max(int(np.floor(top)), 0)
        x2, y2 = min(int(np.ceil(right)), width), min(int(np.ceil(bottom)), height)
        if x2 <= x1 or y2 <= y1:
            continue
        row, low = _between(y1, y2, top, bottom, grids.shape[1])
        column, near = _between(x1, x2, left, right, grids.shape[2])
        lines = grid[row] * low[:, None] + grid[row + 1] * (1 - low)[:, None]
        mask[y1:y2, x1:x2] = lines[:, column] * near + lines[:, column + 1] * (1 - near) > ON
    return out


def _between(start: int, stop: int, low: float, high: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """For the pixels start..stop of a side whose ``cells`` lie from ``low`` to ``high``: the last cell before each
    pixel's center, counted with one cell of border, and that cell's share."""
    at = (np.arange(start, stop) + 0.5 - low) / (high - low) * cells - 0.5
    at = at.clip(-1, cells)
    before = np.minimum(np.floor(at), cells - 1)
    return before.astype(np.int64) + 1, (before + 1 - at).astype(np.float32)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """``mask`` (H, W) as COCO's uncompressed RLE: lengths of runs down the columns, the first of zeros."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def draw(image: np.ndarray, found: Instances, names: Sequence[str]) -> Image.Image:
    """The image with its instances over it."""
    picture = image.astype(np.float32)
    colors = [np.array(_color(i)) for i in range(len(found.scores))]
    for mask, color in zip(found.masks, colors, strict=True):
        picture[mask] = (1 - TINT) * picture[mask] + TINT * color
    drawn = Image.fromarray(picture.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for box, label, score, color in zip(found.boxes, found.labels, found.scores, colors, strict=True):
        pen.rectangle(box.tolist(), outline=tuple(color))
        pen.text((box[0] + 2, box[1]), f"{names[label]} {score:.2f}", fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def _color(index: int) -> tuple[int, ...]:
    return Image.new("HSV", (1, 1), (int(255 * (index * HUE % 1)), 200, 255)).convert("RGB").getpixel((0, 0))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Instances in images, by an exported model.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the export")
    parser.add_argument("--score", type=float, default=0.5, help="instances below it are not told")
    parser.add_argument("--draw", type=Path, help="folder for pictures with the instances over them")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.model)
        for path in arguments.images:
            tell(detector, path, arguments.score, arguments.draw)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def tell(detector: Detector, path: Path, score: float, folder: Path | None) -> None:
    """Prints the instances of an image file, one JSON object a line; draws them into ``folder``."""
    image = read_image(path)
    found = detector.predict(image, score)
    names = [c["name"] for c in detector.categories]
    for box, label, at, mask in zip(found.boxes, found.labels, found.scores, found.masks, strict=True):
        line = {"file": str(path), "category": names[label], "score": float(at), "box": box.tolist()}
        print(json.dumps({**line, "segmentation": run_lengths(mask)}))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        draw(image, found, names).save(folder / f"{path.stem}.png")


if __name__ == "__main__":
    main()
