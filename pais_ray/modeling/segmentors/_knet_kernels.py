"""K-Net's parts: feature fusion, the kernel head, the kernel updater and the update stages (K-Net, NeurIPS 2021).

Legend: B images, N kernels, D channels, C classes, h x w cells of stride 8.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pais_ray.modeling.backbones import group_norm

PRIOR = 0.01  # initial probability of every class (released code, RetinaNet)
PRIOR_BIAS = -4.59511985013459  # its logit, log(0.01 / 0.99)
TEMPERATURE = 10_000.0  # base of the frequencies of the positional encoding (released code)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageOutput:
    """The output of the kernel head or of one update stage, in float32."""

    masks: Tensor  # (B, N, h, w) logits
    classes: Tensor | None = None  # (B, N, C) logits; the kernel head has none
    ious: Tensor | None = None  # (B, N) logits of the predicted mask IoU; the kernel head has none


def conv_norm_relu(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, group_norm(outside), nn.ReLU(inplace=True))


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Positional encoding (channels, height, width): sines and cosines of y and x, of which each spans one period."""
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

    P2 is downsampled once, P4 and P5 are upsampled once and twice, and two branches read their sum. P5 gets a sine
    positional encoding first: kernels distinguish equal objects by position.
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
    """Sums (B, N, D) of ``features`` (B, D, h, w) over the cells inside each kernel's mask (B, N, h, w).

    The masks are binary, as in the released code, so no gradient reaches the logits. The sums run over thousands of
    cells and are computed in fp32.
    """
    with torch.autocast(features.device.type, enabled=False):
        inside = (mask_logits > 0).float().flatten(2)  # a sigmoid above one half
        return inside @ features.float().flatten(2).transpose(1, 2)


def apply_kernels(kernels: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, N, h, w), float32: a 1x1 convolution of ``features`` (B, D, h, w) by kernels (B, N, D)."""
    return (kernels @ features.flatten(2)).float().unflatten(2, features.shape[-2:])


class KernelHead(nn.Module):
    """The initial masks, from kernels that are parameters, and the auxiliary semantic map."""

    def __init__(self, channels: int, num_kernels: int, num_classes: int) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(num_kernels, channels))  # N(0, 1): released code
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        assert self.semantic.bias is not None
        nn.init.constant_(self.semantic.bias, PRIOR_BIAS)

    def forward(
        self, for_masks: Tensor, for_classes: Tensor, masks: Tensor | None = None
    ) -> tuple[StageOutput, Tensor, Tensor]:
        """Return the initial masks, the kernels (B, N, D) with the features inside their masks added, and the features
        (B, D, h, w) of both kinds. ``masks`` (B, N, h, w) logits replace the initial masks as the areas to sum over."""
        first = StageOutput(masks=apply_kernels(self.kernels.expand(len(for_masks), -1, -1), for_masks))
        features = for_masks + for_classes
        area = first.masks if masks is None else masks
        return first, self.kernels + group_features(area, features), features


class KernelUpdater(nn.Module):
    """A kernel and the sum of the features inside its mask -> the new kernel, mixed by two gates.

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
    """Multi-head attention of (B, N, D) over N. nn.MultiheadAttention is not used, because its fast path in eval mode
    rounds differently from training mode."""

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
    """One update: sum features inside the last masks, update the kernels, self-attention over them, three branches."""

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
        last = self.class_branch[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, PRIOR_BIAS)

    @staticmethod
    def _branch(channels: int, out: int) -> nn.Sequential:
        hidden = nn.Linear(channels, channels, bias=False)
        return nn.Sequential(hidden, nn.LayerNorm(channels), nn.ReLU(inplace=True), nn.Linear(channels, out))

    def forward(self, features: Tensor, kernels: Tensor, masks: Tensor) -> tuple[StageOutput, Tensor]:
        """Return the output and the new kernels (B, N, D). ``features`` is (B, D, h, w), ``kernels`` (B, N, D), and
        ``masks`` (B, N, h, w) are the logits of the stage before."""
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


def kernel_outputs(
    fusion: SemanticFPN,
    kernel_head: KernelHead,
    stages: Iterable[nn.Module],
    pyramid: list[Tensor],
    masks: Sequence[Tensor] | None = None,
) -> tuple[list[StageOutput], Tensor]:
    """The outputs of the kernel head and of every stage for P2..P5, and the semantic features (B, D, h, w).

    ``masks`` are mask logits (B, N, h, w) for the kernel head and every stage, which replace the computed ones as the
    areas to sum features over, to compare two implementations stage by stage.
    """
    for_masks, for_classes = fusion(pyramid)
    first, kernels, features = kernel_head(for_masks, for_classes, None if masks is None else masks[0])
    outputs = [first]
    for i, stage in enumerate(stages):
        output, kernels = stage(features, kernels, outputs[-1].masks if masks is None else masks[i])
        outputs.append(output)
    return outputs, for_classes


def mask_values(masks: Tensor, points: Tensor | None) -> Tensor:
    """Values of stride-8 ``masks`` (X, n, h, w): (X, n, 4 * h * w) at every cell of stride 4, or (X, n, K) at
    ``points`` (X, K, 2) in [-1, 1] of the view."""
    if points is None:
        shape = (2 * masks.shape[2], 2 * masks.shape[3])
        return F.interpolate(masks, shape, mode="bilinear", align_corners=False).flatten(2)
    return sample_points(masks, points)


def sample_points(masks: Tensor, points: Tensor) -> Tensor:
    """Values (X, n, K) of ``masks`` (X, n, h, w) at ``points`` (X, K, 2) in [-1, 1]."""
    return F.grid_sample(masks, points[:, :, None], mode="bilinear", align_corners=False)[..., 0]
