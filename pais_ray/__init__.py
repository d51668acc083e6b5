"""pais_ray: semi-supervised instance segmentation on Ray.

Public names are resolved when they are asked for: importing torchvision costs seconds, `--help` must not.
"""

import importlib
from typing import Any

_HOMES = {
    "Batch": "pais_ray.structures",
    "Config": "pais_ray.config.tree",
    "KNet": "pais_ray.modeling.segmentors.knet",
    "KNetConfig": "pais_ray.modeling.segmentors.knet",
    "MaskRCNN": "pais_ray.modeling.segmentors.mask_rcnn",
    "MaskRCNNConfig": "pais_ray.modeling.segmentors.mask_rcnn",
    "Masks": "pais_ray.structures",
    "PAIS": "pais_ray.modeling.methods.pais",
    "Predictions": "pais_ray.structures",
    "Predictor": "pais_ray.inference.predictor",
    "Supervised": "pais_ray.modeling.methods.supervised",
    "Targets": "pais_ray.structures",
    "Views": "pais_ray.structures",
    "compose": "pais_ray.config.tree",
    "local_batches": "pais_ray.runs.batches",
    "score": "pais_ray.evaluation.scoring",
    "train_step": "pais_ray.train.step",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pais_ray' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
