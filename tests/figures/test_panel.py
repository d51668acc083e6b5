"""The panel of pseudo-labels shows kept predictions in color, dropped ones in gray, and the targets beside them."""

import numpy as np
import torch
from PIL import Image

from pais_ray.figures import overlay, panel
from pais_ray.figures.canvas import CAPTION_HEIGHT
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

FACTOR = 4  # images of 96 x 128 px are enlarged by it
BLUE = (0, 0, 255)


def test_kept_predictions_are_in_color_and_dropped_ones_in_gray(tmp_path):
    boxes = np.array([(20, 40, 60, 80), (80, 50, 120, 90)], dtype=np.float32)
    masks = np.zeros((2, 96, 128), dtype=bool)
    masks[0, 40:80, 20:60] = True
    masks[1, 50:90, 80:120] = True
    image = np.full((96, 128, 3), BLUE, dtype=np.uint8)
    soft = Masks.full(torch.from_numpy(masks))
    found = Predictions(
        boxes=torch.from_numpy(boxes),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.2]),
        ious=torch.tensor([0.8, 0.1]),
        masks=soft,
    )
    targets = Targets.ground_truth(boxes=found.boxes[:1], labels=found.labels[:1], masks=soft[:1])
    kept = torch.tensor([True, False])
    row = panel.PanelRow(weak=image, strong=image[::-1], predictions=found, kept=kept, targets=targets)
    no_instances = panel.PanelRow(weak=image, strong=image, predictions=found[:0], kept=kept[:0], targets=targets[[]])
    drawn = panel.pseudo_label_panel([row, no_instances], ["cat", "dog"], tmp_path / "figures" / "panel.png")
    with Image.open(tmp_path / "figures" / "panel.png") as file:
        assert (np.asarray(file) == drawn).all()
    rows = slice(CAPTION_HEIGHT, CAPTION_HEIGHT + 96 * FACTOR)
    weak, strong = drawn[rows, : 128 * FACTOR], drawn[rows, 128 * FACTOR + 6 :]
    tint = (np.array(BLUE) * 0.6 + np.array(overlay.instance_color(0)) * 0.4).astype(np.uint8)
    assert (weak[60 * FACTOR, 40 * FACTOR] == tint).all()
    assert (strong[60 * FACTOR, 40 * FACTOR] == tint).all()
    assert (weak[70 * FACTOR, 100 * FACTOR] == BLUE).all(), "dropped masks are not filled"
    border = weak[89 * FACTOR : 90 * FACTOR, 80 * FACTOR : 120 * FACTOR].reshape(-1, 3)
    gray, blue = (border == overlay.GRAY).all(axis=1), (border == BLUE).all(axis=1)
    assert gray.any(), "the border of a dropped box is gray"
    assert blue.any(), "and dashed"
    assert not (strong == overlay.GRAY).all(axis=2).any()
    second = drawn[rows.stop + 6 + CAPTION_HEIGHT :, : 128 * FACTOR]
    assert (second == BLUE).all(), "an image without predictions is unchanged"


def test_only_the_best_dropped_predictions_are_drawn():
    count = 5
    boxes = torch.tensor([[20.0 * i, 40.0, 20.0 * i + 10, 60.0] for i in range(count)])
    found = Predictions(
        boxes=boxes,
        labels=torch.zeros(count, dtype=torch.int64),
        scores=torch.tensor([0.1, 0.5, 0.3, 0.2, 0.4]),
        ious=torch.full((count,), 0.5),
        masks=Masks.full(torch.zeros(count, 96, 128, dtype=torch.bool)),
    )
    nothing = Targets.ground_truth(boxes=boxes[:0], labels=found.labels[:0], masks=found.masks[:0])
    image = np.full((96, 128, 3), BLUE, dtype=np.uint8)
    row = panel.PanelRow(
        weak=image, strong=image, predictions=found, kept=torch.zeros(count, dtype=torch.bool), targets=nothing
    )
    drawn = panel.pseudo_label_panel([row], ["cat"], max_dropped=2)[CAPTION_HEIGHT:]
    bottom = (drawn[60 * FACTOR - 1, : 128 * FACTOR] == overlay.GRAY).all(axis=1)
    found_boxes = [i for i in range(count) if bottom[20 * i * FACTOR : (20 * i + 10) * FACTOR].any()]
    assert found_boxes == [1, 4]
