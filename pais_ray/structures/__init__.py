"""The tensors that every layer exchanges: views, predictions, targets and masks."""

from pais_ray.structures.batch import Batch, Normalizer, Predictions, Targets, Views
from pais_ray.structures.masks import Masks

__all__ = ["Batch", "Masks", "Normalizer", "Predictions", "Targets", "Views"]
