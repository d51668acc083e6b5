"""The contracts of the two kinds of plugins: a `Segmentor` learns from targets and predicts, a `Method` turns the
teacher's predictions into targets. The rest of the package uses them through this file only.

Legend: B images, N instances, H x W pixels of the padded view.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pais_ray.structures.batch import Predictions, Targets, Views


class SegmentorConfig(BaseModel):
    """Base of the settings of a segmentor, which are the section `segmentor:` of a config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name of the segmentor, which selects its settings.")


class Segmentor(nn.Module, ABC):
    """Base class of the networks. A segmentor does not depend on teachers, thresholds or methods: all that a method
    decides is in the weights of the targets.
    """

    Config: ClassVar[type[SegmentorConfig]]

    def __init__(self, num_classes: int, config: SegmentorConfig | None = None, pretrained: bool = True) -> None:
        """Build the network for ``num_classes`` classes, background not counted. If ``pretrained``, load the weights
        that ``config`` names; pass False if a checkpoint is going to replace them."""
        super().__init__()
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, views: Views, targets: list[Targets]) -> dict[str, Tensor]:
        """Return named losses for B views and their B targets. Each loss is a scalar that depends on the parameters
        even without targets, so that all ranks communicate the same gradients."""

    @abstractmethod
    def predict(self, views: Views, score_threshold: float | None = None) -> list[Predictions]:
        """Return the predictions for each of the B views, best first, whatever the mode of the module. Those with a
        score below ``score_threshold`` may be dropped early."""


class ExportGraph(nn.Module, ABC):
    """A segmentor's prediction for one image as a graph of tensors that an exporter can trace, for any image size."""

    @abstractmethod
    def forward(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Return detections, best first, and the raw outputs that ``heads`` returns.

        ``images`` is (1, 3, H, W) in [0, 1], with H and W multiples of 32; ``size`` (1, 2) int64 is the (h, w) of the
        image without padding. Detections: ``boxes`` (N, 4) px of the view, ``labels``, ``scores``, ``ious`` (N,) and
        ``masks`` (N, h, w) in [0, 1], each stretched over its row of ``windows`` (N, 4) px.
        """

    @abstractmethod
    def heads(self, images: Tensor, size: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the raw outputs as the segmentor computes them. Discrete choices are taken from ``found``, an earlier
        result of the graph, because a difference in the last bit may change them and make the rest incomparable."""


@runtime_checkable
class Exportable(Protocol):
    """A segmentor that can be exported as ONNX."""

    def graph(self) -> ExportGraph:
        """Return the prediction as a graph over the same layers."""
        ...


class Method(Protocol):
    """What the training step asks of a semi-supervised method. A method is a frozen pydantic model: its fields are the
    section `method:` of a config. ``step`` counts from 0."""

    @property
    def name(self) -> str: ...

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the method learns from unlabeled images."""
        ...

    @property
    def score_threshold(self) -> float:
        """Score below which no prediction can become a pseudo-label."""
        ...

    @property
    def labeled_weights(self) -> dict[str, float]:
        """Multiplier of each labeled loss by its name; 1 for losses not listed."""
        ...

    @property
    def unlabeled_weights(self) -> dict[str, float]:
        """Multiplier of each unlabeled loss by its name; 1 for losses not listed."""
        ...

    def labeled_weight(self, step: int) -> float:
        """Weight of the labeled term at ``step``."""
        ...

    def unlabeled_weight(self, step: int) -> float:
        """Weight of the unlabeled term at ``step``; at 0 the unlabeled images are not used."""
        ...

    def decay(self, step: int) -> float:
        """EMA decay of the teacher after ``step``."""
        ...

    def keeps(self, predictions: Predictions) -> Tensor:
        """Mask (N,) bool of the predictions that become pseudo-labels."""
        ...

    def pseudo_labels(self, predictions: Predictions) -> Targets:
        """Targets made of the kept predictions of one image, with their weights and without gradient."""
        ...
