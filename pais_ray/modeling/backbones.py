"""What all segmentors share: a torchvision ResNet with a feature pyramid, its weights, and its pixel normalization.

Legend: B images, H x W pixels of the padded view.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import safetensors.torch
import torch
import torchvision
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from pais_ray.modeling.protocols import SegmentorConfig
from pais_ray.structures.batch import Views

LEVELS = ["0", "1", "2", "3"]  # torchvision's names of P2..P5, strides 4..32; only an RPN uses P6, called "pool"
NAMED_WEIGHTS = ("imagenet", "coco")  # names of weights that torchvision downloads


class BackboneConfig(SegmentorConfig):
    """The settings of the backbone, which every segmentor has."""

    preset: str = Field(default="r50", description="Name of the group of defaults for the settings not given.")
    backbone: str = Field(default="resnet50", description="Name of a torchvision ResNet. Default: from paper 4.2.")
    weights: str | None = Field(
        default="imagenet",
        description="Initial weights: `imagenet`, a local .safetensors or .pth file, or null for random weights. Mask "
        "R-CNN also accepts `coco`. Default: imagenet, from paper 4.2.",
    )
    norm: Literal["frozen_bn", "group"] = Field(
        default="frozen_bn",
        description="Normalization layers of the backbone: batch norm with frozen statistics, or group norm. Default: "
        "frozen_bn, from torchvision, or group if weights is null.",
    )
    frozen_stages: int = Field(
        default=1,
        ge=-1,
        le=4,
        description="Backbone stages that are not trained: -1 for none, 0 for the stem, n for the stem and layers 1 "
        "to n. Default: 1, from the released code, or -1 if weights is null.",
    )
    fpn_channels: int = Field(
        default=256,
        gt=0,
        description="Number of channels of the feature pyramid. Default: from torchvision and the released code.",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # preset -> its differences from the defaults of the fields

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """Fill settings that are not given from the preset, then from the weights."""
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "r50")
        both = {**(cls.PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **given}
        weights = both.get("weights", "imagenet")
        if weights is None:  # without weights there are no batch statistics to freeze
            return {"norm": "group", "frozen_stages": -1, **both}
        return {**both, "norm": "frozen_bn"} if weights in NAMED_WEIGHTS and "norm" not in given else both

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, value: str) -> str:
        known = [n for n in torchvision.models.list_models(torchvision.models) if "resne" in n]
        if value not in known:
            near = difflib.get_close_matches(value, known, 1, 0)[0]
            raise ValueError(f"expected one of {known}, got {value!r}; did you mean {near!r}?")
        return value

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights in NAMED_WEIGHTS and self.norm != "frozen_bn":
            raise ValueError(f"weights: {self.weights!r} has batch norm, but norm is {self.norm!r}; use frozen_bn")
        return self


class NormalizePixels(nn.Module):
    """Normalize RGB in [0, 1] by the ImageNet statistics; the padding becomes zero. It has no checkpoint state."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, views: Views) -> Tensor:
        """(B, 3, H, W)."""
        valid = valid_pixels(views.sizes, views.images.shape[-2:])
        return (views.images - self.mean) / self.std * valid[:, None]


def valid_pixels(sizes: Tensor, shape: tuple[int, int] | torch.Size, stride: int = 1) -> Tensor:
    """Mask (B, h, w) of the cells of ``stride`` px whose top left corner is not padding; ``sizes`` (B, 2) in px."""
    rows = torch.arange(shape[0], device=sizes.device)[None, :, None] * stride < sizes[:, 0, None, None]
    cols = torch.arange(shape[1], device=sizes.device)[None, None, :] * stride < sizes[:, 1, None, None]
    return rows & cols


def as_views(images: Views | Tensor) -> Views:
    """``images``, as views without padding if they are a plain tensor (B, 3, H, W)."""
    return Views.of(images) if isinstance(images, Tensor) else images


def resnet_fpn(config: BackboneConfig) -> BackboneWithFPN:
    """The network for P2..P5 and a pooled P6, randomly initialized; the ResNet is called `body`, the pyramid `fpn`."""
    norm = FrozenBatchNorm2d if config.norm == "frozen_bn" else group_norm
    # Zero-initialized residual branches help a network without pretrained weights.
    body = getattr(torchvision.models, config.backbone)(
        weights=None, norm_layer=norm, zero_init_residual=config.norm == "group"
    )
    stem = nn.ModuleList([body.conv1, body.bn1])
    for stage in (stem, body.layer1, body.layer2, body.layer3, body.layer4)[: config.frozen_stages + 1]:
        stage.requires_grad_(False)
    narrow = body.inplanes // 8
    return BackboneWithFPN(
        body,
        return_layers={f"layer{i + 1}": name for i, name in enumerate(LEVELS)},
        in_channels_list=[narrow * 2**i for i in range(4)],
        out_channels=config.fpn_channels,
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at least 4 channels per group and at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels)


def read_weights(config: BackboneConfig, named: Mapping[str, WeightsEnum] | None = None) -> Mapping[str, Tensor] | None:
    """Read the state that ``config.weights`` names, or None. In a file it may be nested under `model` or `state_dict`.

    ``named`` are torchvision weights in addition to `imagenet`. Raises ValueError if the weights are not available.
    """
    if config.weights is None:
        return None
    named = {"imagenet": torchvision.models.get_model_weights(config.backbone)["IMAGENET1K_V1"], **(named or {})}
    if config.weights in named:
        chosen = named[config.weights]
        try:
            return chosen.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ValueError(
                f"segmentor.weights: could not download {chosen.url} ({error}); "
                "download the file elsewhere and give its path, or use null"
            ) from error
    path = Path(config.weights)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"segmentor.weights: expected a .safetensors, .pth or .pt file, got {path.name!r}")
    if not path.is_file():
        names = ", ".join(repr(n) for n in named)
        raise ValueError(f"segmentor.weights: expected {names} or a file; {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("model", state.get("state_dict", state))


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    class_layers: tuple[str, ...],
    heads: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> None:
    """Load ``state``, which is that of a ResNet classifier or of the whole ``model``.

    Some layers may stay as initialized: those under ``class_layers``, whose size is the number of classes, if that
    number differs; ``heads`` if ``state`` is a classifier; ``optional`` ones if ``state`` lacks them. Raises ValueError
    if anything else does not fit; the message names ``source``.
    """
    if "conv1.weight" in state:
        state = {f"backbone.body.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        optional = ("backbone.fpn.", *heads)
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if not (k.startswith(class_layers) and k in own and v.shape != own[k].shape)}
    left_out = set(state) - set(fits)
    # The batch counters of batch norms do not exist in frozen ones.
    unknown = [k for k in fits if k not in own and not k.endswith("num_batches_tracked")]
    missing = [k for k in own if k not in fits and k not in left_out and not k.startswith(optional)]
    wrong = [k for k in fits if k in own and fits[k].shape != own[k].shape]
    if unknown or missing or wrong:
        raise ValueError(
            f"segmentor.weights: {source!r} does not fit this network: "
            f"{len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of a different shape {wrong[:3]}; "
            "check segmentor.backbone, norm and fpn_channels"
        )
    model.load_state_dict({k: v for k, v in fits.items() if k in own}, strict=False)
