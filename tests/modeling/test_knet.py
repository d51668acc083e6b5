"""K-Net: each part against a slow reference; losses, masks and options."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pais_ray.modeling.methods.pais import PAIS
from pais_ray.modeling.segmentors._knet_decode import extent, mask_boxes
from pais_ray.modeling.segmentors._knet_kernels import (
    PRIOR,
    KernelHead,
    KernelUpdater,
    SelfAttention,
    SemanticFPN,
    StageOutput,
    UpdateStage,
    group_features,
    mask_values,
    sine_positions,
)
from pais_ray.modeling.segmentors.knet import KNet, KNetConfig
from pais_ray.structures.batch import Predictions, Targets, Views
from pais_ray.structures.masks import Masks

D = 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(layer, row):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


def normed(layer, row):
    mean = sum(row) / len(row)
    var = sum((v - mean) ** 2 for v in row) / len(row)
    return [
        (v - mean) / math.sqrt(var + layer.eps) * g + b
        for v, g, b in zip(row, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def sigmoid(row):
    return [1 / (1 + math.exp(-v)) for v in row]


def shaken(module):
    """Norms that do something, so that a forgotten one shows."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return module


def test_kernel_updater_equals_the_two_gates_written_out():
    updater = shaken(KernelUpdater(D))
    feature, kernel = torch.randn(D).tolist(), torch.randn(D).tolist()
    f, k = linear(updater.of_features, feature), linear(updater.of_kernel, kernel)
    gate = [a * b for a, b in zip(f[:D], k[:D], strict=True)]
    update = sigmoid(normed(updater.update[1], linear(updater.update[0], gate)))
    keep = sigmoid(normed(updater.keep[1], linear(updater.keep[0], gate)))
    from_f, from_k = normed(updater.norm_features, f[D:]), normed(updater.norm_kernel, k[D:])
    mixed = [u * a + g * b for u, a, g, b in zip(update, from_f, keep, from_k, strict=True)]
    expected = [max(v, 0.0) for v in normed(updater.out[1], linear(updater.out[0], mixed))]
    found = updater(torch.tensor(feature)[None, None], torch.tensor(kernel)[None, None])[0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_group_features_sum_the_cells_inside_a_mask():
    masks, features = torch.randn(2, 3, 4, 5), torch.randn(2, D, 4, 5)
    found = group_features(masks, features)
    for b in range(2):
        for n in range(3):
            cells = [features[b, :, y, x] for y in range(4) for x in range(5) if masks[b, n, y, x].sigmoid() > 0.5]
            torch.testing.assert_close(found[b, n], torch.stack(cells).sum(dim=0))


def test_group_features_do_not_overflow_under_fp16():
    with torch.autocast("cpu", dtype=torch.float16):
        found = group_features(torch.ones(1, 1, 100, 168), torch.full((1, 2, 100, 168), 8.0).half())
    assert found.dtype == torch.float32
    assert (found == 8.0 * 16_800).all()


def test_self_attention_equals_the_softmax_of_products():
    attention = SelfAttention(D, heads=2)
    kernels = torch.randn(1, 5, D)
    q, k, v = attention.inside(kernels[0]).chunk(3, dim=1)
    parts = []
    for h in range(2):
        own = slice(h * 4, h * 4 + 4)
        weights = (q[:, own] @ k[:, own].T / math.sqrt(4)).softmax(dim=1)
        parts.append(weights @ v[:, own])
    torch.testing.assert_close(attention(kernels)[0], attention.outside(torch.cat(parts, dim=1)))


def test_stage_masks_are_products_of_kernels_and_features():
    stage = shaken(UpdateStage(D, 3, heads=2, ffn=16))
    features, kernels, masks = torch.randn(1, D, 4, 6), torch.randn(1, 5, D), torch.randn(1, 5, 4, 6)
    output, new = stage(features, kernels, masks)
    own = stage.mask_branch(new)[0]
    seen = stage.transform(features)[0]
    for n, y, x in [(0, 0, 0), (3, 2, 5), (4, 3, 1)]:
        assert output.masks[0, n, y, x].item() == pytest.approx((own[n] @ seen[:, y, x]).item(), rel=1e-4, abs=1e-5)
    assert output.classes.shape == (1, 5, 3)
    assert output.ious.shape == (1, 5)


def test_initial_class_scores_equal_the_prior():
    head, stage = KernelHead(D, 4, 3), UpdateStage(D, 3, heads=2, ffn=16)
    for bias in (head.semantic.bias, stage.class_branch[-1].bias):
        torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, PRIOR))


def test_kernel_head_adds_the_features_inside_each_mask():
    head = KernelHead(D, 4, 3)
    for_masks, for_classes = torch.randn(2, D, 4, 6), torch.randn(2, D, 4, 6)
    first, kernels, features = head(for_masks, for_classes)
    torch.testing.assert_close(features, for_masks + for_classes)
    torch.testing.assert_close(first.masks[1, 2], torch.einsum("d,dhw->hw", head.kernels[2], for_masks[1]))
    seen = features[1][:, first.masks[1, 2] > 0].sum(dim=1)
    torch.testing.assert_close(kernels[1, 2], head.kernels[2] + seen)


def test_fusion_brings_every_level_to_stride_8():
    fusion = SemanticFPN(D, D)
    pyramid = [torch.randn(2, D, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    masks, classes = fusion(pyramid)
    assert masks.shape == classes.shape == (2, D, 8, 12)
    # P4 is doubled after its first convolution, P5 after its first two (released code).
    kinds = [[type(m).__name__ for m in level] for level in fusion.levels[1:]]
    assert kinds == [
        ["Sequential"],
        ["Sequential", "Upsample", "Sequential"],
        ["Sequential", "Upsample", "Sequential", "Upsample", "Sequential"],
    ]


def test_positional_encodings_are_distinct_and_bounded():
    where = sine_positions(3, 5, 16, torch.device("cpu"))
    assert where.shape == (16, 3, 5)
    assert where.abs().max() <= 1
    flat = where.flatten(1).T
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3
    assert where[0, 1, 0].item() == pytest.approx(math.sin(2 * math.pi * 2 / 3), abs=1e-4)  # y, first wave
    assert where[8, 0, 1].item() == pytest.approx(math.sin(2 * math.pi * 2 / 5), abs=1e-4)  # x, first wave


def tiny(**settings):
    """Of scores around one half: the background's loss at the prior of .01 drowns in fp32."""
    network = KNet(3, KNetConfig(preset="nano", num_kernels=8, **settings)).eval()
    for stage in network.stages:
        torch.nn.init.zeros_(stage.class_branch[-1].bias)
    return network


def squares(normalizer="mean", weight=1.0, negative=1.0):
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 8:32, 8:40], masks[1, 20:60, 50:90] = 1, 1
    boxes = torch.tensor([[8.0, 8, 40, 32], [50, 20, 90, 60]])
    weights = torch.full((2,), weight)
    annotated = Targets.ground_truth(boxes=boxes, labels=torch.tensor([0, 2]), masks=Masks.full(masks))
    return dataclasses.replace(
        annotated,
        class_weight=weights,
        mask_weight=weights,
        negative_weight=negative,
        normalizer=normalizer,
    )


def plain_losses(network, images, target):
    """K-Net's supervised loss for one image, from the outputs, one pair at a time."""
    outputs, _ = network.outputs(Views.of(images))
    wanted = F.avg_pool2d(target.masks.grids[:, None].float(), 4)[:, 0].flatten(1)
    matches = network._match(outputs, [target], wanted, None)
    total = {"class": 0.0, "mask": 0.0, "mask_iou": 0.0}
    for output, match in zip(outputs, matches, strict=True):
        pairs = dict(zip(match.kernel.tolist(), match.target.tolist(), strict=True))
        logits = F.interpolate(output.masks, scale_factor=2, mode="bilinear", align_corners=False)[0].flatten(1)
        for n, t in pairs.items():
            soft = logits[n].sigmoid()
            bce = -(wanted[t] * soft.log() + (1 - wanted[t]) * (1 - soft).log()).mean()
            dice = 1 - 2 * (soft * wanted[t]).sum() / (soft.square().sum() + wanted[t].square().sum() + 2e-3)
            total["mask"] += (bce + 4 * dice).item() / len(pairs)
            if output.ious is not None:
                on, true = soft >= 0.5, wanted[t] >= 0.5
                iou = (on & true).sum() / (on | true).sum()
                total["mask_iou"] += F.binary_cross_entropy_with_logits(output.ious[0, n], iou).item() / len(pairs)
        if output.classes is not None:
            for n, row in enumerate(output.classes[0].sigmoid().tolist()):
                for c, p in enumerate(row):
                    hit = n in pairs and target.labels[pairs[n]] == c
                    term = 0.25 * (1 - p) ** 2 * -math.log(p) if hit else 0.75 * p**2 * -math.log(1 - p)
                    total["class"] += 2 * term / len(pairs)
    return total


def test_unit_weights_give_the_supervised_loss():
    network, images = tiny(), torch.rand(1, 3, 64, 96)
    found = network(images, [squares()])
    for name, expected in plain_losses(network, images, squares()).items():
        assert found[name].item() == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("normalizer", ["mean", "pos", "pos_neg"])
def test_zero_weights_remove_exactly_the_positives(normalizer):
    network, images = tiny(), torch.rand(1, 3, 64, 96)
    without = network(images, [squares(normalizer, weight=0.0)])
    assert without["mask"] == 0
    only_positives = network(images, [squares(normalizer, negative=0.0)])
    whole = network(images, [squares(normalizer)])
    assert without["class"].item() == pytest.approx((whole["class"] - only_positives["class"]).item(), rel=1e-3)


def test_daloss_weights_apply_to_the_matched_kernel_and_its_mask():
    network, images = tiny(), torch.rand(1, 3, 64, 96)
    c, s = 0.8, 0.9
    truth, scores, ious = squares(), torch.full((2,), c), torch.full((2,), s)
    held = Predictions(boxes=truth.boxes, labels=truth.labels, scores=scores, ious=ious, masks=truth.masks)
    target = PAIS(normalizer="mean", negative_weight=0.0).pseudo_labels(held)
    weighted = network(images, [target])
    plain = network(images, [squares(negative=0.0)])
    assert weighted["class"].item() == pytest.approx(c**4 * plain["class"].item(), rel=1e-4)
    assert weighted["mask"].item() == pytest.approx(s**4 * plain["mask"].item(), rel=1e-4)


def test_losses_at_random_points_approximate_the_dense_losses():
    dense, images = tiny(), torch.rand(1, 3, 64, 96)
    sampled = tiny(mask_points=6000)
    sampled.load_state_dict(dense.state_dict())
    a, b = dense(images, [squares()]), sampled(images, [squares()])
    assert b["mask"].item() == pytest.approx(a["mask"].item(), rel=0.05)
    assert b["semantic"].item() == pytest.approx(a["semantic"].item(), rel=1e-5)


def test_mask_values_are_read_at_stride_4_or_at_points():
    masks = torch.randn(2, 3, 4, 6)
    assert mask_values(masks, None).shape == (2, 3, 8 * 12)
    middle = torch.zeros(2, 1, 2)  # the center of the view
    center = masks[:, :, 1:3, 2:4].mean(dim=(2, 3))
    torch.testing.assert_close(mask_values(masks, middle)[..., 0], center)


def test_a_kernel_gives_one_detection_or_one_per_class():
    best, images = tiny(), torch.rand(1, 3, 64, 96)
    released = tiny(classes_per_kernel="all", detections=24)
    released.load_state_dict(best.state_dict())
    one, several = best.predict(images)[0], released.predict(images)[0]
    assert len(one) <= 8
    assert len(several) == 3 * len(one)  # of three classes
    assert several.scores[0] == one.scores[0]
    same = (several.masks.grids[:, None] == one.masks.grids[None]).flatten(2).all(dim=2)
    assert (same.sum(dim=0) >= 3).all()


def test_boxes_enclose_the_masks():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    masks[1, 5, 7] = True
    boxes, seen = mask_boxes(masks, torch.tensor([22, 30]))
    assert boxes[:2].tolist() == [[8, 4, 20, 12], [28, 20, 30, 22]]
    assert seen.tolist() == [True, True, False]
    assert [v.tolist() for v in extent(torch.tensor([[False, True, True, False]]))] == [[1], [3]]


def test_masks_are_zero_in_the_padding():
    network = tiny()
    views = Views.of(torch.rand(1, 3, 64, 96))
    views = type(views)(**{**vars(views), "sizes": torch.tensor([[40, 50]])})
    soft = network.predict(views)[0].masks.grids
    assert soft[:, 10:].max() == 0
    assert soft[:, :, 13:].max() == 0


def test_a_diverged_network_gives_a_loss_that_is_not_finite():
    network, images = tiny().train(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        network.stages[0].mask_branch[-1].weight.fill_(float("nan"))
    assert not network(images, [squares()])["mask"].isfinite()


def test_a_label_out_of_range_is_refused():
    masks = Masks.full(torch.ones(1, 64, 96))
    target = Targets.ground_truth(boxes=torch.ones(1, 4), labels=torch.tensor([3]), masks=masks)
    with pytest.raises(ValueError, match=r"labels in 0..2, got 3"):
        tiny()(torch.rand(1, 3, 64, 96), [target])


def test_channels_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match="multiple of 4"):
        KNetConfig(preset="nano", attention_heads=5)


def test_a_classifier_file_initializes_only_the_backbone(tmp_path):
    import torchvision
    from safetensors.torch import save_file

    body = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18.safetensors"
    save_file(body.state_dict(), path)
    settings = {"preset": "nano", "weights": str(path), "norm": "frozen_bn", "num_kernels": 8}
    network = KNet(3, KNetConfig(**settings))
    assert torch.equal(network.backbone.body.conv1.weight, body.conv1.weight)
    whole = tmp_path / "knet.safetensors"
    save_file(network.state_dict(), whole)
    again = KNet(5, KNetConfig(**{**settings, "weights": str(whole)}))  # another number of classes
    assert torch.equal(again.stages[1].transform.weight, network.stages[1].transform.weight)
    assert again.stages[0].class_branch[3].weight.shape[0] == 5
    with pytest.raises(ValueError, match="does not fit"):
        KNet(3, KNetConfig(**{**settings, "weights": str(whole), "num_kernels": 9}))


class Largest(TorchDispatchMode):
    """The most elements of any tensor made, with and without a graph being recorded."""

    def __init__(self):
        super().__init__()
        self.with_graph = self.without_graph = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        most = max((t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), default=0)
        if torch.is_grad_enabled():
            self.with_graph = max(self.with_graph, most)
        else:
            self.without_graph = max(self.without_graph, most)
        return out


@pytest.mark.parametrize("points", [None, 500])
def test_losses_never_hold_all_kernels_at_stride_4_with_a_graph(points):
    """What docs/architecture.md computes for 800x1333: N kernels at stride 4 only inside matching, T with a graph."""
    images, kernels, each, cells = 2, 40, 3, 32 * 40
    network = KNet(3, KNetConfig(preset="nano", num_kernels=kernels, mask_points=points))
    outputs = [StageOutput(masks=torch.randn(images, kernels, 32, 40, requires_grad=True))]
    for _ in range(3):
        classes = torch.randn(images, kernels, 3, requires_grad=True)
        ious = torch.randn(images, kernels, requires_grad=True)
        masks = torch.randn(images, kernels, 32, 40, requires_grad=True)
        outputs.append(StageOutput(masks=masks, classes=classes, ious=ious))
    target = squares()[torch.tensor([0, 1, 1])]
    compared = points or 4 * cells
    wanted = torch.rand(images * each, compared)
    where = network._points(images, wanted.device)
    with Largest() as largest:
        total = network._matched_losses(outputs, [target] * images, wanted, where)
    assert all(v.isfinite() for v in total.values())
    assert largest.without_graph <= images * kernels * compared * (2 if points else 1)  # a point is two numbers
    # The pairs' masks where they are compared, or their stride-8 logits.
    assert largest.with_graph <= images * each * max(compared * (2 if points else 1), cells)
