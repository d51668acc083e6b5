"""A torchvision ResNet with a feature pyramid, its weights, and the pixels it wants: what all segmentors share.

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
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from pais_ray.modeling.protocols import SegmentorConfig
from pais_ray.structures.batch import Views

LEVELS = ["0", "1", "2", "3"]  # torchvision's names of P2..P5, strides 4..32; P6 ("pool") feeds an RPN alone
NAMED = ("imagenet", "coco")  # weights that torchvision fetches


class BackboneConfig(SegmentorConfig):
    """What every segmentor's section says of its backbone."""

    preset: str = "r50"
    backbone: str = "resnet50"  # any torchvision ResNet
    # None, `imagenet` (paper), another name the segmentor knows, a local .safetensors or .pth file
    weights: str | None = "imagenet"
    norm: Literal["frozen_bn", "group"] = "frozen_bn"  # `group` by default without weights
    # -1 none, 0 the stem, 1 the stem and layer1 (paper, released code), ...; -1 by default without weights
    frozen_stages: int = Field(default=1, ge=-1, le=4)
    fpn_channels: int = Field(default=256, gt=0)

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what differs from the fields' defaults, by preset

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """What is given over the preset, and what follows from the weights where neither says it."""
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "r50")
        both = {**(cls.PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **given}
        weights = both.get("weights", "imagenet")
        if weights is None:  # frozen statistics of nothing would normalize nothing
            return {"norm": "group", "frozen_stages": -1, **both}
        return {**both, "norm": "frozen_bn"} if weights in NAMED and "norm" not in given else both

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
        if self.weights in NAMED and self.norm != "frozen_bn":
            raise ValueError(f"weights: {self.weights!r} come with batch norm, norm is {self.norm!r}; use frozen_bn")
        return self


class NormalizePixels(nn.Module):
    """RGB in [0, 1] -> ImageNet statistics, zero in the padding. Not part of a checkpoint."""

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
    """(B, h, w) bool: cells of ``stride`` px whose top left corner is no padding; ``sizes`` (B, 2) in px."""
    rows = torch.arange(shape[0], device=sizes.device)[None, :, None] * stride < sizes[:, 0, None, None]
    cols = torch.arange(shape[1], device=sizes.device)[None, None, :] * stride < sizes[:, 1, None, None]
    return rows & cols


def as_views(images: Views | Tensor) -> Views:
    """Plain images (B, 3, H, W) are views without padding."""
    return Views.of(images) if isinstance(images, Tensor) else images


def resnet_fpn(config: BackboneConfig) -> BackboneWithFPN:
    """P2..P5 and a pooled P6, without weights; its body is called `body`, its pyramid `fpn`."""
    norm = FrozenBatchNorm2d if config.norm == "frozen_bn" else group_norm
    # Residual branches that begin at zero help the network without pretrained weights.
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
    """At least 4 channels a group, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels)


def read_weights(config: BackboneConfig, named: Mapping[str, object] | None = None) -> Mapping[str, Tensor] | None:
    """The state that ``config.weights`` names; a file's may be wrapped under `model` or `state_dict`.

    ``named`` are torchvision weights beside `imagenet`. ValueError where it cannot be had.
    """
    if config.weights is None:
        return None
    named = {"imagenet": torchvision.models.get_model_weights(config.backbone)["IMAGENET1K_V1"], **(named or {})}
    if config.weights in named:
        chosen = named[config.weights]
        try:
            return chosen.get_state_dict(progress=False, check_hash=True)  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(
                f"segmentor.weights: could not fetch {chosen.url} ({error}); "  # type: ignore[attr-defined]
                "download it elsewhere and give the file's path, or use none"
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
    """Loads a ResNet classifier's state or one of the whole ``model``.

    Layers under ``class_layers``, whose size is the number of classes, stay as initialized where that number
    differs; ``heads`` where ``state`` is a classifier; ``optional`` ones where it has none of them. Anything
    else must fit, else ValueError.
    """
    if "conv1.weight" in state:
        state = {f"backbone.body.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        optional = ("backbone.fpn.", *heads)
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if not (k.startswith(class_layers) and k in own and v.shape != own[k].shape)}
    left_out = set(state) - set(fits)
    # Batch norms count batches; the frozen ones have nothing to count.
    unknown = [k for k in fits if k not in own and not k.endswith("num_batches_tracked")]
    missing = [k for k in own if k not in fits and k not in left_out and not k.startswith(optional)]
    wrong = [k for k in fits if k in own and fits[k].shape != own[k].shape]
    if unknown or missing or wrong:
        raise ValueError(
            f"segmentor.weights: {source!r} does not fit this network: "
            f"{len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}; "
            "check segmentor.backbone, norm and fpn_channels"
        )
    model.load_state_dict({k: v for k, v in fits.items() if k in own}, strict=False)
