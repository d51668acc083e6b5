"""The smallest segmentor that a run can train, `segmentor.name=tests.support.small_segmentor`.

Its checkpoints take a few kilobytes, so a whole run directory can be committed. It predicts one instance per image.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pais_ray.modeling.protocols import Segmentor, SegmentorConfig
from pais_ray.structures.batch import Predictions, Targets, Views
from pais_ray.structures.masks import Masks

CHANNELS, GRID = 8, 4


class _Config(SegmentorConfig):
    name: Literal["tests.support.small_segmentor"] = "tests.support.small_segmentor"


class SmallSegmentor(Segmentor):
    Config = _Config

    def __init__(self, num_classes: int, config: _Config | None = None, pretrained: bool = True) -> None:
        super().__init__(num_classes, config, pretrained)
        self.config = config or _Config()
        self.backbone = nn.Conv2d(3, CHANNELS, kernel_size=8, stride=8)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.classes = nn.Linear(CHANNELS, num_classes)
        self.box = nn.Linear(CHANNELS, 4)
        self.iou = nn.Linear(CHANNELS, 1)
        self.mask = nn.Linear(CHANNELS, GRID * GRID)

    def forward(self, views: Views, targets: list[Targets]) -> dict[str, Tensor]:
        """The losses of the first instance of each image."""
        features = self._features(views)
        logits, boxes, masks = self.classes(features), self._boxes(features, views), self.mask(features)
        terms = {name: [features.sum() * 0] for name in ("class", "box", "mask", "mask_iou")}
        for i, target in enumerate(targets):
            if len(target) == 0:
                continue
            cells = target.masks[:1].crop_resize(target.boxes[:1], GRID).flatten()
            scale = views.sizes[i].max()
            terms["class"].append(target.class_weight[0] * F.cross_entropy(logits[i], target.labels[0]))
            terms["box"].append(target.box_weight[0] * F.l1_loss(boxes[i] / scale, target.boxes[0] / scale))
            terms["mask"].append(target.mask_weight[0] * F.binary_cross_entropy_with_logits(masks[i], cells))
            terms["mask_iou"].append(self.iou(features[i]).square().sum())
        return {name: torch.stack(values).sum() / len(targets) for name, values in terms.items()}

    def predict(self, views: Views, score_threshold: float | None = None) -> list[Predictions]:
        features = self._features(views)
        scores, labels = self.classes(features).softmax(dim=1).max(dim=1)
        boxes, ious = self._boxes(features, views), self.iou(features).sigmoid()
        grids = self.mask(features).sigmoid().view(-1, GRID, GRID)
        found = []
        for i in range(len(views)):
            kept = slice(0, int(scores[i] > (score_threshold or 0)))
            prediction = Predictions(
                boxes=boxes[i : i + 1],
                labels=labels[i : i + 1],
                scores=scores[i : i + 1],
                ious=ious[i],
                masks=Masks.in_boxes(grids[i : i + 1], boxes[i : i + 1]),
            )
            found.append(prediction[kept])
        return found

    def _features(self, views: Views) -> Tensor:
        """(B, CHANNELS)."""
        return self.norm(self.backbone(views.images)).relu().mean(dim=(2, 3))

    def _boxes(self, features: Tensor, views: Views) -> Tensor:
        """(B, 4) XYXY px."""
        center, side = (part.sigmoid() for part in self.box(features).split(2, dim=1))
        size = views.sizes.flip(1).to(features)  # (w, h)
        return torch.cat([center * size / 2, (center + side) * size / 2 + 4], dim=1)
