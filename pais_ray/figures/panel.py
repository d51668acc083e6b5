"""The panel of pseudo-labels: unlabeled images as the teacher and the student see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pais_ray.figures import canvas
from pais_ray.figures.overlay import draw_tagged
from pais_ray.structures.batch import Predictions, Targets


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """One unlabeled image with the teacher's predictions and the student's targets; tensors on the CPU."""

    weak: np.ndarray  # (H, W, 3) uint8
    strong: np.ndarray  # (h, w, 3) uint8
    predictions: Predictions  # of the teacher, in the weak view
    kept: Tensor  # (N,) bool: which predictions became pseudo-labels
    targets: Targets  # the pseudo-labels in the strong view


def pseudo_label_panel(
    rows: Sequence[PanelRow], names: Sequence[str], path: Path | str | None = None, max_dropped: int = 15
) -> np.ndarray:
    """An image (H, W, 3) uint8 with one row per unlabeled image, written to ``path`` as PNG if it is given.

    Left: the weak view with pseudo-labels in color and the best ``max_dropped`` dropped predictions in dashed gray,
    each tagged with class, class score c and predicted mask IoU s. Right: the strong view with the pseudo-labels
    warped to it.
    """
    views = [view for row in rows for view in (_draw_weak(row, names, max_dropped), _draw_strong(row, names))]
    panel = canvas.grid(views, columns=2)
    if path is not None:
        canvas.save(panel, path)
    return panel


def _draw_weak(row: PanelRow, names: Sequence[str], max_dropped: int) -> np.ndarray:
    kept, found = row.kept.cpu().numpy(), row.predictions
    labels, scores, ious = (value.tolist() for value in (found.labels, found.scores, found.ious))
    tags = [
        f"{names[label]} c{_two_digits(c)} s{_two_digits(s)}" for label, c, s in zip(labels, scores, ious, strict=True)
    ]
    boxes = found.boxes.numpy()
    chosen, dropped = np.flatnonzero(kept), np.flatnonzero(~kept)
    masks = found.masks[row.kept.cpu()].paste(row.weak.shape[:2]).numpy()
    drawn = dropped[np.argsort(-np.asarray(scores)[dropped], kind="stable")][:max_dropped]
    image = draw_tagged(
        row.weak,
        boxes[chosen],
        [tags[i] for i in chosen],
        masks,
        dropped=(boxes[drawn], [tags[i] for i in drawn]),
    )
    return canvas.add_caption(image, f"weak view: {len(chosen)} kept, {len(dropped)} dropped")


def _draw_strong(row: PanelRow, names: Sequence[str]) -> np.ndarray:
    tags = [names[label] for label in row.targets.labels.tolist()]
    masks = row.targets.masks.paste(row.strong.shape[:2]).numpy()
    image = draw_tagged(row.strong, row.targets.boxes.numpy(), tags, masks)
    return canvas.add_caption(image, f"strong view: {len(row.targets)} pseudo-labels")


def _two_digits(value: float) -> str:
    """0.934 -> ".93", 1.0 -> "1.0"."""
    text = f"{float(value):.2f}"
    return text[1:] if text.startswith("0.") else text[:3]
