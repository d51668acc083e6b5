"""Figures of the pseudo-labels of one batch, figures/pseudo_labels_NNNNNNNN.png."""

from pathlib import Path

import numpy as np
import torch

from pais_ray.figures.panel import PanelRow, pseudo_label_panel
from pais_ray.modeling.precision import autocast
from pais_ray.modeling.protocols import Method
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Views
from pais_ray.train.state import TrainState


def write_panel(
    batch: Batch | None,
    state: TrainState,
    method: Method,
    precision: str,
    class_names: list[str],
    folder: Path,
) -> None:
    """Draw the weak and the strong view of each unlabeled image, with its kept and dropped predictions and both scores.

    The teacher predicts again, because the step's predictions lack those below the method's score threshold, which are
    what explains missing pseudo-labels. Writes nothing for a batch without unlabeled images. Raises OSError.
    """
    if batch is None or batch.weak is None or batch.strong is None:
        return
    predictions = batch.scored
    if predictions is None:
        with autocast(batch.weak.images.device, precision):
            predictions = state.teacher.predict(batch.weak)
    weak_to_strong = geometry.compose(batch.strong.matrix, geometry.invert(batch.weak.matrix))
    rows = [
        PanelRow(
            weak=_pixels(batch.weak, i),
            strong=_pixels(batch.strong, i),
            predictions=prediction.to("cpu"),
            kept=method.keeps(prediction).cpu(),
            targets=method.pseudo_labels(prediction).warp(weak_to_strong[i], batch.strong.sizes[i]).to("cpu"),
        )
        for i, prediction in enumerate(predictions)
    ]
    folder.mkdir(exist_ok=True)  # without parents: if the storage is gone, they would be created on another disk
    pseudo_label_panel(rows, class_names, folder / f"pseudo_labels_{state.step:08d}.png")


def _pixels(views: Views, i: int) -> np.ndarray:
    """(h, w, 3) uint8: view ``i`` without padding."""
    height, width = views.sizes[i].tolist()
    return (views.images[i, :, :height, :width].permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy()
