"""K-Net's parts: feature fusion, the kernel head, the kernel updater and the update stages (K-Net, NeurIPS 2021).

Legend: B images, N kernels, D channels, C classes, h x w cells of stride 8.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pais_ray.modeling.backbones import group_norm

PRIOR = 0.01  # probability a class begins with (released code, RetinaNet)
PRIOR_BIAS = -4.59511985013459  # its logit, log(.01 / .99)
TEMPERATURE = 10_000.0  # of the positional encoding (released code)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageOutput:
    """What the kernel head or one update stage says, all float32."""

    masks: Tensor  # (B, N, h, w) logits
    classes: Tensor | None = None  # (B, N, C) logits; the kernel head has none
    ious: Tensor | None = None  # (B, N) logits of the predicted mask IoU; the kernel head has none


def conv_norm_relu(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, group_norm(outside), nn.ReLU(inplace=True))


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(channels, height, width): sines and cosines of y and x, each of which runs over one period."""
    half = channels // 2
    rate = TEMPERATURE ** (2 * (torch.arange(half, device=device) // 2) / half)

    def waves(length: int) -> Tensor:
        angle = torch.arange(1, length + 1, device=device)[:, None] / (length + 1e-6) * (2 * torch.pi) / rate
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # (length, half)

    y = waves(height).T[:, :, None].expand(-1, -1, width)
    x = waves(width).T[:, None, :].expand(-1, height, -1)
    return torch.cat([y, x])


class SemanticFPN(nn.Module):
    """P2..P5 -> features for masks and features for classes, both (B, D, h, w) of stride 8.

    P2 is halved, P4 and P5 are doubled once and twice, their sum splits in two. P5 gets a sine positional
    encoding first: kernels have to tell equal objects apart by where they are.
    """

    def __init__(self, inside: int, channels: int) -> None:
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

        def level(doublings: int, convs: int) -> nn.Sequential:
            parts: list[nn.Module] = []
            for i in range(convs):
                parts.append(conv_norm_relu(inside if i == 0 else channels, channels, 3))
                parts += [up] if i < doublings else []
            return nn.Sequential(*parts)

        halved = conv_norm_relu(inside, channels, 3, stride=2)
        self.levels = nn.ModuleList([halved, level(0, 1), level(1, 2), level(2, 3)])
        self.masks = nn.Sequential(conv_norm_relu(channels, channels, 1), conv_norm_relu(channels, channels, 1))
        self.classes = nn.Sequential(conv_norm_relu(channels, channels, 1), conv_norm_relu(channels, channels, 1))

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        *fine, coarse = pyramid
        _, channels, height, width = coarse.shape
        pyramid = [*fine, coarse + sine_positions(height, width, channels, coarse.device).to(coarse)]
        fused = torch.stack([convs(p) for convs, p in zip(self.levels, pyramid, strict=True)]).sum(dim=0)
        return self.masks(fused), self.classes(fused)


def group_features(mask_logits: Tensor, features: Tensor) -> Tensor:
    """(B, N, D): the sum of ``features`` (B, D, h, w) over the cells where each kernel's mask (B, N, h, w) is on.

    Hard masks, as in the released code: no gradient reaches the logits. In fp32: thousands of cells add up.
    """
    with torch.autocast(features.device.type, enabled=False):
        on = (mask_logits > 0).float().flatten(2)  # sigmoid over one half
        return on @ features.float().flatten(2).transpose(1, 2)


def apply_kernels(kernels: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, N, h, w), float32: a 1x1 convolution of ``features`` (B, D, h, w) by kernels (B, N, D)."""
    return (kernels @ features.flatten(2)).float().unflatten(2, features.shape[-2:])


class KernelHead(nn.Module):
    """The first masks, from kernels that are parameters; and the auxiliary semantic map."""

    def __init__(self, channels: int, num_kernels: int, num_classes: int) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(num_kernels, channels))  # N(0, 1): released code
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        nn.init.constant_(self.semantic.bias, PRIOR_BIAS)  # type: ignore[arg-type]

    def forward(self, for_masks: Tensor, for_classes: Tensor) -> tuple[StageOutput, Tensor, Tensor]:
        """(first masks, kernels (B, N, D) with what they saw, features (B, D, h, w) of both kinds)."""
        first = StageOutput(masks=apply_kernels(self.kernels.expand(len(for_masks), -1, -1), for_masks))
        features = for_masks + for_classes
        return first, self.kernels + group_features(first.masks, features), features


class KernelUpdater(nn.Module):
    """A kernel and the features its mask covered -> the new kernel, mixed by two gates.

    With F the features and K the kernel, both (..., D): g = lin(F)[:D] * lin(K)[:D];
    out = relu(LN(fc(sigmoid(LN(update(g))) * LN(lin(F)[D:]) + sigmoid(LN(keep(g))) * LN(lin(K)[D:])))).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.of_features = nn.Linear(channels, 2 * channels)
        self.of_kernel = nn.Linear(channels, 2 * channels)
        self.update = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Sigmoid())
        self.keep = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Sigmoid())
        self.norm_features = nn.LayerNorm(channels)
        self.norm_kernel = nn.LayerNorm(channels)
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True))

    def forward(self, features: Tensor, kernel: Tensor) -> Tensor:
        gate_f, value_f = self.of_features(features).chunk(2, dim=-1)
        gate_k, value_k = self.of_kernel(kernel).chunk(2, dim=-1)
        gate = gate_f * gate_k
        mixed = self.update(gate) * self.norm_features(value_f) + self.keep(gate) * self.norm_kernel(value_k)
        return self.out(mixed)


class SelfAttention(nn.Module):
    """Multi-head attention of (B, N, D) over N. Not nn.MultiheadAttention, whose fast path in eval mode rounds
    otherwise than in training mode."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inside, self.outside = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, kernels: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inside(kernels).chunk(3, dim=2)
        )
        return self.outside(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class UpdateStage(nn.Module):
    """Group features by the last masks, update the kernels, let them see each other, read off three branches."""

    def __init__(self, channels: int, num_classes: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.transform = nn.Conv2d(channels, channels, 1)
        self.updater = KernelUpdater(channels)
        self.attention = SelfAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn), nn.ReLU(inplace=True), nn.Linear(ffn, channels))
        self.ffn_norm = nn.LayerNorm(channels)
        self.class_branch = self._branch(channels, num_classes)
        self.mask_branch = self._branch(channels, channels)
        self.iou_branch = self._branch(channels, 1)
        for parameter in self.parameters():  # released code
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_branch[-1].bias, PRIOR_BIAS)  # type: ignore[arg-type]

    @staticmethod
    def _branch(channels: int, out: int) -> nn.Sequential:
        hidden = nn.Linear(channels, channels, bias=False)
        return nn.Sequential(hidden, nn.LayerNorm(channels), nn.ReLU(inplace=True), nn.Linear(channels, out))

    def forward(self, features: Tensor, kernels: Tensor, masks: Tensor) -> tuple[StageOutput, Tensor]:
        """``features`` (B, D, h, w), ``kernels`` (B, N, D), last ``masks`` (B, N, h, w) logits -> (output, kernels)."""
        features = self.transform(features)
        kernels = self.updater(group_features(masks, features), kernels)
        kernels = self.attention_norm(kernels + self.attention(kernels))
        kernels = self.ffn_norm(kernels + self.ffn(kernels))
        output = StageOutput(
            masks=apply_kernels(self.mask_branch(kernels), features),
            classes=self.class_branch(kernels).float(),
            ious=self.iou_branch(kernels)[..., 0].float(),
        )
        return output, kernels


def read(masks: Tensor, points: Tensor | None) -> Tensor:
    """Logits (X, n, P) of stride-8 ``masks`` (X, n, h, w): at every cell of stride 4, or at ``points`` (X, K, 2) in
    [-1, 1] of the view."""
    if points is None:
        shape = (2 * masks.shape[2], 2 * masks.shape[3])
        return F.interpolate(masks, shape, mode="bilinear", align_corners=False).flatten(2)
    return sample_at(masks, points)


def sample_at(masks: Tensor, points: Tensor) -> Tensor:
    """Values (X, n, K) of ``masks`` (X, n, h, w) at ``points`` (X, K, 2) in [-1, 1]."""
    return F.grid_sample(masks, points[:, :, None], mode="bilinear", align_corners=False)[..., 0]
