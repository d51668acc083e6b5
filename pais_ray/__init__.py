"""pais_ray: semi-supervised instance segmentation on Ray.

The names in ``__all__`` are the public API; everything else may change between versions without notice. They are
imported on first use, because importing torchvision takes seconds and `pais-ray --help` must answer at once.

* Configuration: ``compose`` builds a ``Config`` from config names and overrides; ``run_schedule`` derives its schedule.
* Training without Ray: ``build_state``, ``local_batches``, and ``train_step`` with ``StepSettings``.
  A ``Batch`` consists of ``Views``, ``Targets`` and ``Masks``.
* Segmentors: ``MaskRCNN``, ``KNet`` and their configs. Methods: ``PAIS``, ``Supervised``.
* After training: ``Predictor`` and its ``Predictions``; ``score`` computes AP.
"""

import importlib

_HOMES = {  # public name -> the module that defines it
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
    "StepSettings": "pais_ray.train.step",
    "Supervised": "pais_ray.modeling.methods.supervised",
    "Targets": "pais_ray.structures",
    "Views": "pais_ray.structures",
    "build_state": "pais_ray.train.state",
    "compose": "pais_ray.config.tree",
    "local_batches": "pais_ray.runs.batches",
    "run_schedule": "pais_ray.config.tree",
    "score": "pais_ray.evaluation.scoring",
    "train_step": "pais_ray.train.step",
}
_MOVED = {  # module of version 0.1 -> its present place
    "access": "cluster.token",
    "analysis": "evaluation.pseudo_labels",
    "audit": "reports.audit",
    "backbones": "modeling.backbones",
    "batch_predict": "inference.batch",
    "compare": "reports.compare",
    "evaluate": "evaluation.scoring",
    "evaluate_cityscapes": "evaluation.evaluators.cityscapes",
    "export": "inference.export.export",
    "gallery": "reports.gallery",
    "geometry": "structures.geometry",
    "guards": "train.guards",
    "losses": "modeling.losses",
    "methods": "modeling.methods",
    "mirror": "tracking.mirror",
    "optim": "modeling.optim",
    "overlays": "config.overlays",
    "plots": "figures.charts",
    "plugins": "modeling.registry",
    "ranking": "tracking.logged_models",
    "registry": "inference.serving.registry",
    "segmentors": "modeling.segmentors",
    "served": "inference.serving.served",
    "submit": "cluster.jobs",
    "tables": "reports.tables",
    "tail": "files.json_lines",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MOVED:
        raise AttributeError(f"module 'pais_ray.{name}' is now 'pais_ray.{_MOVED[name]}'")
    raise AttributeError(f"module 'pais_ray' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
