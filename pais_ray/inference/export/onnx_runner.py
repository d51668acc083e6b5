"""Run an exported segmentor on images with numpy, Pillow and onnxruntime: `python run.py IMAGE... --draw DIR`.

This file imports nothing from its package, because `pais-ray export` copies it to run.py beside the model.

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

FORMAT = 1  # version of the manifest's entry; other versions are refused
MANIFEST, MODEL = "manifest.json", "model.onnx"
DETECTIONS = ["boxes", "labels", "scores", "ious", "masks", "windows"]  # the outputs of every exported segmentor
MASK_THRESHOLD = 0.5  # a mask covers the pixels with a higher value
MASK_OPACITY = 0.5
HUE_STEP = 0.618  # between consecutive instances; the golden ratio gives different hues


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The instances of one image in its own pixels, in descending order of score."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px
    labels: np.ndarray  # (N,) int64, indices into Detector.categories
    scores: np.ndarray  # (N,) float32 in [0, 1]
    ious: np.ndarray  # (N,) float32 in [0, 1], the predicted IoU of the mask
    masks: np.ndarray  # (N, H, W) bool


class Detector:
    """The model in ``folder``, as `pais-ray export` wrote it. Raises ValueError if it is incomplete or damaged."""

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"onnxruntime: {error}; install it with `pip install onnxruntime`") from error

        self.manifest = read_manifest(Path(folder))
        self.categories: list[dict[str, Any]] = self.manifest["categories"]  # id and name, as in the data set
        self.session = onnxruntime.InferenceSession(str(Path(folder) / MODEL), providers=list(providers))

    def predict(self, image: np.ndarray, score: float = 0.0) -> Instances:
        """The instances of the upright ``image`` (H, W, 3) uint8 RGB with a score of at least ``score``."""
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
        """COCO results of one image in descending order of score: bbox XYWH px, segmentation as uncompressed RLE."""
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
        """The view (1, 3, h, w) float32 in [0, 1], padded with zeros at the bottom and the right, and its valid size
        (1, 2) int64. Raises ValueError if ``image`` is not (H, W, 3) uint8."""
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image: expected an array (H, W, 3) uint8 RGB, got {kind}")
        if image.size == 0:
            raise ValueError(f"image: expected at least one pixel, got {image.shape}")
        parameters = self.manifest["onnx"]["input"]
        sides = image.shape[:2]
        ratio = min(parameters["short_side"] / min(sides), parameters["long_side"] / max(sides))
        height, width = (max(1, int(side * ratio + 0.5)) for side in sides)
        multiple = parameters["multiple"]
        out = np.zeros((1, 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple), np.float32)
        for channel in range(3):
            # In float, because Pillow's 8-bit resize rounds.
            plane = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)
            out[0, channel, :height, :width] = plane.resize((width, height), Image.Resampling.BILINEAR)
        return out.clip(0, 1), np.array([[height, width]], np.int64)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``. Raises ValueError if it is missing or invalid, or if the model differs from it."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, sha256 = manifest["onnx"]["format"], manifest["files"][MODEL]["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: expected a folder that `pais-ray export` wrote, got no {MANIFEST}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the manifest of an ONNX export, got {error!r}; export again") from error
    if version != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {version}; use the run.py beside the model")
    with (folder / MODEL).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{folder / MODEL}: differs from its manifest, so it is damaged; export again")
    return manifest


def read_image(path: str | Path) -> np.ndarray:
    """The upright image (H, W, 3) uint8 RGB of a file; alpha is dropped, and 16-bit gray is scaled to 8 bits."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        upright.info.pop("transparency", None)  # otherwise Pillow blends colors with it
        if upright.mode.startswith("I"):
            gray = np.clip(np.asarray(upright).astype(np.int64), 0, 65535)
            upright = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        return np.array(upright.convert("RGB"))


def paste(grids: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks (N, H, W) bool of soft ``grids`` (N, rows, columns), each stretched over its window (N, 4) XYXY px of an
    image of ``size`` = (H, W): bilinear between the centers of cells, zero outside the grid."""
    height, width = size
    out = np.zeros((len(grids), height, width), bool)
    for mask, grid, (left, top, right, bottom) in zip(
        out, np.pad(grids, ((0, 0), (1, 1), (1, 1))), windows, strict=True
    ):
        x1, y1 = max(int(np.floor(left)), 0), max(int(np.floor(top)), 0)
        x2, y2 = min(int(np.ceil(right)), width), min(int(np.ceil(bottom)), height)
        if x2 <= x1 or y2 <= y1:
            continue
        row, upper = _interpolate(y1, y2, top, bottom, grids.shape[1])
        column, left_share = _interpolate(x1, x2, left, right, grids.shape[2])
        lines = grid[row] * upper[:, None] + grid[row + 1] * (1 - upper)[:, None]
        mask[y1:y2, x1:x2] = lines[:, column] * left_share + lines[:, column + 1] * (1 - left_share) > MASK_THRESHOLD
    return out


def _interpolate(start: int, stop: int, low: float, high: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """For the pixels start..stop of a side whose ``cells`` extend from ``low`` to ``high``: the index of the last cell
    before each pixel's center, counted with one border cell, and the weight of that cell."""
    at = (np.arange(start, stop) + 0.5 - low) / (high - low) * cells - 0.5
    at = at.clip(-1, cells)
    before = np.minimum(np.floor(at), cells - 1)
    return before.astype(np.int64) + 1, (before + 1 - at).astype(np.float32)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """``mask`` (H, W) as COCO's uncompressed RLE: lengths of runs in column order, starting with zeros."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def draw(image: np.ndarray, found: Instances, names: Sequence[str]) -> Image.Image:
    """The image with its instances drawn over it."""
    picture = image.astype(np.float32)
    colors = [np.array(_color(i)) for i in range(len(found.scores))]
    for mask, color in zip(found.masks, colors, strict=True):
        picture[mask] = (1 - MASK_OPACITY) * picture[mask] + MASK_OPACITY * color
    drawn = Image.fromarray(picture.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for box, label, score, color in zip(found.boxes, found.labels, found.scores, colors, strict=True):
        pen.rectangle(box.tolist(), outline=tuple(color))
        pen.text((box[0] + 2, box[1]), f"{names[label]} {score:.2f}", fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def _color(index: int) -> tuple[int, ...]:
    return Image.new("HSV", (1, 1), (int(255 * (index * HUE_STEP % 1)), 200, 255)).convert("RGB").getpixel((0, 0))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Detect instances in images with an exported model.")
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the exported model")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score of printed and drawn instances")
    parser.add_argument("--draw", type=Path, help="folder for the images with their instances drawn over them")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.model)
        for path in arguments.images:
            report(detector, path, arguments.score, arguments.draw)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def report(detector: Detector, path: Path, score: float, folder: Path | None) -> None:
    """Print the instances of an image file, one JSON object per line, and draw them into ``folder`` if it is given."""
    image = read_image(path)
    found = detector.predict(image, score)
    names = [c["name"] for c in detector.categories]
    for box, label, value, mask in zip(found.boxes, found.labels, found.scores, found.masks, strict=True):
        line = {"file": str(path), "category": names[label], "score": float(value), "box": box.tolist()}
        print(json.dumps({**line, "segmentation": run_lengths(mask)}))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        draw(image, found, names).save(folder / f"{path.stem}.png")


if __name__ == "__main__":
    main()
