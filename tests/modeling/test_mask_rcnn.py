"""Mask R-CNN: torchvision's losses and detections, Eq. 5 by hand, geometry, weights from files."""

import dataclasses

import pytest
import safetensors.torch
import torch
import torchvision
from pydantic import ValidationError
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d

from pais_ray.modeling.segmentors.mask_rcnn import CLASS_LAYERS, MaskRCNN, MaskRCNNConfig
from pais_ray.structures.batch import Targets, Views
from pais_ray.structures.masks import Masks

HEIGHT, WIDTH = 64, 96
NORMALIZERS = ("mean", "pos", "pos_neg", "weight_sum")
SIZES = [(64, 96), (50, 70)]
SMALL = {
    "preset": "nano",
    "fpn_channels": 16,
    "box_head_dim": 32,
    "mask_head_dim": 16,
    "mask_head_convs": 2,
    "mask_iou_dim": 8,
}


def build(**settings):
    torch.manual_seed(0)
    return MaskRCNN(3, MaskRCNNConfig(**(SMALL | settings)))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def views():
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(Views.of(images), sizes=torch.tensor(SIZES))


def target(boxes, labels, **fields):
    boxes = torch.tensor(boxes)
    masks = torch.rand(len(boxes), HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2)) > 0.4
    annotated = Targets.ground_truth(boxes=boxes, labels=torch.tensor(labels), masks=Masks.full(masks))
    return dataclasses.replace(annotated, **fields)


@pytest.fixture(scope="module")
def targets():
    boxes = [[4.5, 4.25, 40.0, 44.5], [50.0, 10.0, 92.5, 60.75], [20.0, 20.0, 60.0, 50.0]]
    return [target(boxes, [0, 2, 1]), target([[10.0, 6.5, 60.0, 46.0]], [1])]


class Neutral(nn.Module):
    """Stands where torchvision resizes and normalizes: images come ready-made, boxes stay."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def forward(self, _, targets=None):
        return self.batch, targets

    def postprocess(self, result, *_):
        return result


def torchvision_twin(model, views):
    """torchvision's own Mask R-CNN over the same layers, with the same numbers."""
    config = model.config
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = torch.zeros_like(views.images)
    for image, raw, (h, w) in zip(images, views.images, SIZES, strict=True):
        image[:, :h, :w] = ((raw - mean[:, None, None]) / std[:, None, None])[:, :h, :w]
    twin = TorchvisionMaskRCNN(
        model.backbone,
        rpn_anchor_generator=model.rpn.anchor_generator,
        rpn_head=model.rpn.head,
        rpn_pre_nms_top_n_train=config.rpn_pre_nms,
        rpn_pre_nms_top_n_test=config.rpn_pre_nms,
        rpn_post_nms_top_n_train=config.rpn_post_nms,
        rpn_post_nms_top_n_test=config.rpn_post_nms,
        rpn_batch_size_per_image=config.rpn_batch_size,
        box_roi_pool=model.roi_heads.box_roi_pool,
        box_head=model.roi_heads.box_head,
        box_predictor=model.roi_heads.box_predictor,
        box_batch_size_per_image=config.box_batch_size,
        mask_roi_pool=model.roi_heads.mask_roi_pool,
        mask_head=model.roi_heads.mask_head,
        mask_predictor=model.roi_heads.mask_predictor,
    )
    twin.transform = Neutral(ImageList(images, SIZES))
    return twin


def run(model, views, targets):
    torch.manual_seed(5)
    return {name: value.item() for name, value in model(views, targets).items()}


def test_unit_weights_give_the_losses_of_torchvision(model, views, targets):
    twin = torchvision_twin(model, views).train()
    assert type(twin.rpn) is RegionProposalNetwork
    plain = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.grids.to(torch.uint8)} for t in targets]
    torch.manual_seed(5)
    expected = twin(list(views.images), plain)
    ours = run(model, views, targets)
    names = {
        "class": "loss_classifier",
        "box": "loss_box_reg",
        "mask": "loss_mask",
        "objectness": "loss_objectness",
        "proposal_box": "loss_rpn_box_reg",
    }
    assert set(ours) == {*names, "mask_iou"}
    for name, theirs in names.items():
        assert expected[theirs].item() > 0
        assert ours[name] == pytest.approx(expected[theirs].item(), rel=1e-6, abs=1e-6), name


def test_predictions_equal_those_of_torchvision(model, views):
    twin = torchvision_twin(model, views).eval()
    with torch.no_grad():
        expected = twin(list(views.images))
    for ours, theirs in zip(model.predict(views), expected, strict=True):
        assert len(ours) > 0
        torch.testing.assert_close(ours.boxes, theirs["boxes"])
        torch.testing.assert_close(ours.scores, theirs["scores"])
        assert torch.equal(ours.labels, theirs["labels"] - 1)
        torch.testing.assert_close(ours.masks.grids, theirs["masks"][:, 0])


def test_pos_neg_equals_eq_5_computed_by_hand(model, views, targets):
    weights = [torch.tensor([0.2, 0.7, 0.4]), torch.tensor([0.9])]
    weighted = [
        dataclasses.replace(t, class_weight=w, negative_weight=0.6, normalizer="pos_neg")
        for t, w in zip(targets, weights, strict=True)
    ]
    ours = run(model, views, weighted)["class"]
    torch.manual_seed(5)
    batch, features = model.features(views)
    proposals, _ = model.rpn.propose(batch, features, weighted)
    plain = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": None} for t in weighted]
    rois, matched, labels, _ = model.roi_heads.select_training_samples(proposals, plain)
    logits, _ = model.roi_heads.classify(features, rois)
    positives, negatives = [], []
    rows = iter(logits.log_softmax(dim=1).tolist())
    for weight, owners, classes in zip(weights, matched, labels, strict=True):
        for owner, label in zip(owners.tolist(), classes.tolist(), strict=True):
            row = next(rows)
            if label > 0:
                positives.append(-weight[owner].item() * row[label])
            else:
                negatives.append(-0.6 * row[0])
    assert positives
    assert negatives
    expected = sum(positives) / len(positives) + sum(negatives) / len(negatives)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_an_instance_of_zero_weight_has_no_gradient_in_its_class(model, views, targets):
    """The class logits see no positive term of an instance that weighs zero."""
    weightless = [dataclasses.replace(t, class_weight=(t.labels != 1).float()) for t in targets]

    def bias_gradient(targets, negative):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        model(views, [dataclasses.replace(t, negative_weight=negative) for t in targets])["class"].backward()
        return model.roi_heads.box_predictor.cls_score.bias.grad

    # Softmax pushes a class up (negative gradient) only through positives of that class.
    assert bias_gradient(targets, 0.0)[2] < 0
    assert bias_gradient(weightless, 0.0)[2] > 0
    only = [dataclasses.replace(targets[1], class_weight=torch.zeros(1))]
    nothing = [dataclasses.replace(t, class_weight=t.class_weight * 0) for t in targets[:1]]
    assert (bias_gradient(nothing + only, 0.0) == 0).all()


def test_a_zero_proposal_weight_removes_a_target_from_the_rpn_only(model, views, targets):
    weight = torch.tensor([1.0, 0.0, 1.0])
    out = [dataclasses.replace(targets[0], proposal_weight=weight), targets[1]]
    fewer = [targets[0][torch.tensor([0, 2])], targets[1]]
    ours, expected = run(model, views, out), run(model, views, fewer)
    for name in ("objectness", "proposal_box"):
        assert ours[name] == expected[name]
    assert ours["mask"] != expected["mask"]


def test_proposal_weights_scale_the_box_loss_of_the_rpn(model, views, targets):
    half = [dataclasses.replace(t, proposal_weight=t.proposal_weight * 0.5) for t in targets]
    ours, whole = run(model, views, half), run(model, views, targets)
    assert ours["proposal_box"] == pytest.approx(0.5 * whole["proposal_box"], rel=1e-5)
    assert ours["objectness"] < whole["objectness"]


def test_boxes_are_averaged_over_all_sampled_rois_and_masks_over_positives(model, views, targets):
    by = {n: run(model, views, [dataclasses.replace(t, normalizer=n) for t in targets]) for n in NORMALIZERS}
    for losses in by.values():
        assert losses["box"] == by["mean"]["box"]
        assert losses["mask"] == by["mean"]["mask"]
    assert by["pos"]["class"] > by["mean"]["class"]


def test_the_mask_iou_loss_is_already_weighted(model, views, targets):
    heavy = build(mask_iou_loss_weight=0.5)
    ours, expected = run(heavy, views, targets), run(model, views, targets)
    assert ours["mask_iou"] == pytest.approx(2 * expected["mask_iou"], rel=1e-6)


def test_padding_does_not_affect_the_losses(model, views, targets):
    images = views.images.clone()
    images[1, :, SIZES[1][0] :] = 0.9
    images[1, :, :, SIZES[1][1] :] = 0.1
    assert run(model, dataclasses.replace(views, images=images), targets) == run(model, views, targets)


def test_strides_do_not_depend_on_the_size_of_the_first_view(model, views, targets):
    """MultiScaleRoIAlign derives them once; a small image in a large padding must not mislead it."""
    fresh = build()
    small = dataclasses.replace(views, sizes=torch.tensor([[24, 30], [20, 20]]))
    fresh.predict(small)
    assert run(fresh, views, targets) == run(model, views, targets)


def test_boxes_keep_their_precision_under_autocast(model, views, targets):
    """Half precision at 1000 px is a grid of 4 px: anchors, deltas and proposals stay in float32."""
    seen = []
    handle = model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: seen.extend(out))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(views, targets)
        predictions = model.predict(views)
    handle.remove()
    assert {v.dtype for v in (*seen, *losses.values(), predictions[0].boxes)} == {torch.float32}
    assert predictions[0].masks.grids.dtype == predictions[0].ious.dtype == torch.float32


def test_mask_targets_and_predicted_masks_have_the_same_geometry(model, views):
    """What the mask head is taught for a box, pasted where predict puts its masks, is the mask again."""
    found = model.predict(views)[0]
    torch.testing.assert_close(found.masks.affine, Masks.in_boxes(found.masks.grids, found.boxes + 0.5).affine)
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    mask[0, 12:44, 17:59] = 1
    truth, box = Masks.full(mask), torch.tensor([[12.3, 8.1, 66.7, 50.4]])
    taught = truth.crop_resize(box + 0.5, 28)
    pasted = Masks.in_boxes(taught, box + 0.5).paste((HEIGHT, WIDTH))
    iou = (pasted & mask.bool()).sum() / (pasted | mask.bool()).sum()
    assert iou > 0.97


def test_max_mask_rois_limits_the_mask_losses(views, targets):
    capped = build(max_mask_rois=2)
    seen = []
    capped.roi_heads.mask_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    capped(views, targets)
    assert seen == [4]


def test_dropped_detections_never_reach_the_mask_head(model, views):
    seen = []
    handle = model.roi_heads.mask_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    everything = model.predict(views)
    bar = everything[0].scores[2].item()
    kept = sum(len(p) for p in model.predict(views, score_threshold=bar))
    handle.remove()
    assert seen == [sum(len(p) for p in everything), kept]
    assert kept < seen[0]


def test_boxes_without_area_and_unknown_labels_are_refused(model, views, targets):
    flat = target([[4.0, 4.0, 4.0, 9.0]], [0])
    foreign = target([[4.0, 4.0, 8.0, 9.0]], [3])
    for bad in (flat, foreign):
        with pytest.raises(ValueError, match=r"x1 < x2, y1 < y2 and labels in 0\.\.2"):
            model(views, [targets[0], bad])


def test_images_without_proposals_and_targets_have_zero_losses(model, views, targets):
    """Weights that run away may propose nothing at all."""
    with torch.no_grad():
        _, features = model.features(views)
    nothing = [t[:0] for t in targets]
    losses = model.roi_heads.losses(features, [torch.zeros(0, 4)] * 2, nothing)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)


def test_presets_apply_only_to_settings_not_given():
    nano = MaskRCNNConfig(preset="nano", fpn_channels=32)
    assert (nano.backbone, nano.fpn_channels, nano.norm, nano.frozen_stages) == ("resnet18", 32, "group", -1)
    released = MaskRCNNConfig()
    assert (released.backbone, released.weights, released.frozen_stages) == ("resnet50", "imagenet", 1)
    assert (released.mask_iou_dim, released.mask_iou_pool, released.mask_iou_loss_weight) == (1024, 1, 0.25)
    assert MaskRCNNConfig(**nano.model_dump()) == nano
    assert set(MaskRCNNConfig.PRESETS["nano"]) <= set(MaskRCNNConfig.model_fields)


def test_without_weights_nothing_is_frozen_by_default():
    assert MaskRCNNConfig(weights=None).norm == "group"
    assert MaskRCNNConfig(preset="nano", weights="imagenet").norm == "frozen_bn"
    config = MaskRCNNConfig(weights=None, norm="frozen_bn", frozen_stages=2)
    assert (config.norm, config.frozen_stages) == ("frozen_bn", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet51"}, "did you mean 'resnet50'"),
        ({"weights": "imagenet", "norm": "group"}, "use frozen_bn"),
        ({"preset": "nano", "weights": "coco", "norm": "frozen_bn"}, "only for preset r50 with resnet50"),
        ({"alhpa": 1}, "Extra inputs"),
        ({"preset": "huge"}, "'r50' or 'nano'"),
        ({"preset": []}, "'r50' or 'nano'"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MaskRCNNConfig(**settings)


def test_frozen_stages_count_from_the_stem():
    frozen = build(norm="frozen_bn", frozen_stages=1).backbone.body
    trainable = {name.split(".")[0] for name, p in frozen.named_parameters() if p.requires_grad}
    assert trainable == {"layer2", "layer3", "layer4"}


def test_a_classifier_file_initializes_the_backbone(tmp_path):
    torch.manual_seed(7)
    classifier = torchvision.models.resnet18(weights=None)
    classifier.bn1.running_mean.fill_(0.25)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    body = build(weights=str(tmp_path / "resnet18.pth"), norm="frozen_bn").backbone.body
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert torch.equal(body.conv1.weight, classifier.conv1.weight)
    assert torch.equal(body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    assert (body.bn1.running_mean == 0.25).all()


@pytest.mark.parametrize("branch", [True, False], ids=["whole", "without_mask_iou"])
def test_a_checkpoint_with_other_classes_initializes_all_but_the_class_layers(tmp_path, branch):
    torch.manual_seed(7)
    source = MaskRCNN(5, MaskRCNNConfig(**SMALL)).state_dict()
    state = {k: v for k, v in source.items() if branch or "mask_iou_head" not in k}
    safetensors.torch.save_file(state, tmp_path / "five.safetensors")
    ours = build(weights=str(tmp_path / "five.safetensors")).state_dict()
    fresh = build().state_dict()
    for name, value in ours.items():
        if name.startswith(CLASS_LAYERS):
            assert value.shape != source[name].shape
        elif "mask_iou_head" in name and not branch:
            assert torch.equal(value, fresh[name]), name
        else:
            assert torch.equal(value, source[name]), name


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer9.weight": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match=r"unknown .*layer9.*check segmentor\.backbone"):
        build(weights=str(tmp_path / "strange.pth"), norm="frozen_bn")
    with pytest.raises(ValueError, match="no such file"):
        build(weights=str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=r"expected a \.safetensors, \.pth or \.pt file"):
        build(weights="imagenot")
