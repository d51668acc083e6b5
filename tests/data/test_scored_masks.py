"""Scored masks: ground truth as scored masks is learned like ground truth; weights and coordinates are correct."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pais_ray.augmentation import sampling, views
from pais_ray.augmentation.presets import AugmentConfig
from pais_ray.augmentation.views import make_batch, warp_scored_masks
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.records import unlabel
from pais_ray.data.annotations.rle import decode_rle, encode_masks
from pais_ray.data.sources import scored_masks
from pais_ray.modeling.methods.pais import PAIS
from pais_ray.structures import geometry
from pais_ray.structures.batch import Predictions, Views
from pais_ray.train.state import Teacher
from pais_ray.train.step import batch_losses
from tests.support.tiny import sample, state_of

VIEWS = AugmentConfig().at_size(64)
# Weights of one, as ground truth has them, and its normalizer.
PLAIN = PAIS(tau_cls=0.0, tau_iou=0.0, lambda_unlabeled=1.0, normalizer="mean", unlabeled_weights={"mask_iou": 1.0})


class NobodyAsks(Teacher):
    def predict(self, images, score_threshold=None):
        raise AssertionError("the teacher was asked, though masks were given")


def given(labeled, scores=None, ious=None) -> Predictions:
    """The ground truth of a sample as scored masks, converted as if read from a file."""
    num = len(labeled.labels)
    row = {
        "boxes": labeled.boxes.ravel().tolist(),
        "labels": labeled.labels.tolist(),
        "scores": [1.0] * num if scores is None else scores,
        "ious": [1.0] * num if ious is None else ious,
        "rles": encode_masks(labeled.masks.numpy().astype(bool)),
    }
    return scored_masks.to_predictions(row, *labeled.image.shape[1:])


def batch_of(labeled, predictions, unlabeled_row=1):
    bare = dataclasses.replace(labeled, boxes=None, labels=None, masks=None, scored=predictions)
    return make_batch([sample(0, 0, True)], [bare], VIEWS, seed=0, device="cpu")


def spied(batch, method):
    """The targets of the student on the strong views."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, images, targets):
            seen.append(targets)
            return {"class": torch.zeros(())}

    teacher = Teacher(torch.nn.Linear(1, 1))
    teacher.__class__ = NobodyAsks
    batch_losses(Spy(), teacher, batch, method, step=0)
    return seen[1]


@pytest.mark.parametrize("row", [1, 2, 5, 9])
def test_ground_truth_as_scored_masks_is_learned_like_ground_truth(row):
    state, labeled = state_of(), sample(row, 1, True)
    state.teacher.__class__ = NobodyAsks
    batch = batch_of(labeled, given(labeled))
    plans = sampling.plan_views([labeled], VIEWS, 0, "strong")
    truth = views.make_targets([labeled], plans, "cpu")
    (pseudo,) = spied(batch, PLAIN)
    torch.testing.assert_close(pseudo.boxes, truth[0].boxes, rtol=1e-5, atol=1e-4)
    assert torch.equal(pseudo.labels, truth[0].labels)
    torch.manual_seed(0)
    losses, logs = batch_losses(state.student, state.teacher, batch, PLAIN, step=0)
    torch.manual_seed(0)
    state.student(batch.labeled, batch.targets)  # the samplers draw for the labeled loss first
    expected = state.student(batch.strong, truth)
    assert logs["pseudo/kept"] == 1
    assert expected["mask"] > 0
    for name, value in expected.items():
        tolerance = 1e-4 if name not in ("mask", "mask_iou") else 0.02  # masks have a low resolution
        torch.testing.assert_close(losses[f"unlabeled/{name}"], value, rtol=tolerance, atol=1e-5)


def test_scores_and_ious_become_the_methods_weights_and_thresholds():
    labeled = sample(3, 1, True)
    three = dataclasses.replace(
        labeled,
        boxes=labeled.boxes.repeat(3, 1),
        labels=torch.tensor([0, 1, 1]),
        masks=labeled.masks.repeat(3, 1, 1),
    )
    batch = batch_of(labeled, given(three, scores=[0.9, 0.5, 0.2], ious=[0.6, 0.8, 0.9]))
    (targets,) = spied(batch, PAIS(tau_cls=0.3, alpha=3.0, beta=2.0))
    assert targets.labels.tolist() == [0, 1]
    torch.testing.assert_close(targets.class_weight, torch.tensor([0.9**3, 0.5**3]))
    torch.testing.assert_close(targets.mask_weight, torch.tensor([0.6**2, 0.8**2]))


def test_masks_and_boxes_are_in_the_coordinates_of_the_weak_view():
    """Half the size and flipped, computed manually: x -> 60 - x / 2, y -> y / 2."""
    mask = np.zeros((1, 80, 120), dtype=bool)
    mask[0, 20:60, 10:40] = True
    mask[0, 20:40, 10:20] = False
    row = {"boxes": [10, 20, 40, 60], "labels": [1], "scores": [0.7], "ious": [0.4], "rles": encode_masks(mask)}
    given = scored_masks.to_predictions(row, 80, 120)
    matrix = geometry.flip_horizontal(60) @ geometry.scale(0.5, 0.5)
    weak = dataclasses.replace(
        Views.of(torch.zeros(1, 3, 64, 64)), matrix=matrix.float()[None], sizes=torch.tensor([[40, 60]])
    )
    bare = dataclasses.replace(sample(0, 0, False), scored=given)
    (there,) = warp_scored_masks(weak, [bare])
    assert there.boxes.tolist() == [[40, 10, 55, 30]]
    assert (there.labels.tolist(), there.scores.tolist()) == ([1], pytest.approx([0.7]))
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[10:30, 40:55] = True
    expected[10:20, 50:55] = False
    assert torch.equal(there.masks.paste((40, 60))[0], expected)


def test_grids_are_small_and_agree_with_the_masks(image_sets):
    dataset = read_coco(str(image_sets / "coco/annotations/instances_train.json"), str(image_sets / "coco/images"))
    assert sum(len(record.rles) for record in dataset.records) == 38
    for record in dataset.records:
        row = {
            "boxes": record.boxes.ravel().tolist(),
            "labels": record.labels.tolist(),
            "scores": [0.5] * len(record.labels),
            "ious": [1.0] * len(record.labels),
            "rles": list(record.rles),
        }
        found = scored_masks.to_predictions(row, record.height, record.width)
        assert found.masks.grids.shape == (len(record.rles), scored_masks.SIDE, scored_masks.SIDE)
        for i, rle in enumerate(record.rles):
            full = torch.from_numpy(decode_rle([rle], record.height, record.width)[0]).bool()
            pasted = found.masks[i : i + 1].paste((record.height, record.width))[0]
            assert (full & pasted).sum() / (full | pasted).sum() > 0.95, (record.image_id, i)


def test_images_without_masks_give_no_pseudo_labels_and_masks_for_some_images_only_are_an_error():
    labeled = sample(4, 1, True)
    nothing = given(labeled)[:0]
    state = state_of()
    state.teacher.__class__ = NobodyAsks
    losses, logs = batch_losses(state.student, state.teacher, batch_of(labeled, nothing), PAIS(), step=0)
    assert logs["pseudo/empty_images"] == 1
    assert batch_of(labeled, nothing).to("cpu").scored is not None, "moving a batch keeps its masks"
    assert all(torch.isfinite(value) for value in losses.values())
    with pytest.raises(ValueError, match="all 2 samples, got 1"):
        warp_scored_masks(
            batch_of(labeled, nothing).weak, [sample(0, 1, False), dataclasses.replace(labeled, scored=nothing)]
        )


# ---- the file --------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tiny_coco):
    return read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))


def results_of(dataset, path, **more):
    """The ground truth of all images as a results file, with other keys added."""
    entries = [
        {
            "image_id": record.image_id,
            "category_id": dataset.categories[label].id,
            "segmentation": {"size": [record.height, record.width], "counts": rle.decode()},
            "score": 1.0,
            **more,
        }
        for record in dataset.records
        for label, rle in zip(record.labels, record.rles, strict=True)
    ]
    path.write_text(json.dumps(entries))
    return entries


def read(dataset, path, above=0.0, first=3):
    """The file, read for a data set whose ``first`` images are labeled."""
    unlabeled = [unlabel(record) for record in dataset.records[first:]]
    others = {record.image_id for record in dataset.records[:first]}
    return scored_masks.read_scored(str(path), unlabeled, others, dataset.categories, above)


def test_a_file_is_read_image_by_image(dataset, tmp_path):
    entries = results_of(dataset, tmp_path / "r.json", mask_iou=0.5)
    found = read(dataset, tmp_path / "r.json")
    assert len(found.images) == len(dataset.records) - 3
    for record, image in zip(dataset.records[3:], found.images, strict=True):
        assert image.labels.tolist() == record.labels.tolist()
        assert image.rles == record.rles
        assert np.abs(image.boxes - record.boxes).max(initial=0) <= 2, "without bbox, the box is the mask's"
        assert set(image.scores) <= {1.0}
        assert set(image.ious) <= {0.5}
    assert found.elsewhere == sum(len(record.labels) for record in dataset.records[:3])
    assert found.elsewhere + sum(len(image.scores) for image in found.images) == len(entries)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, 1.0), ({"iou": 0.25}, 0.25), ({"predicted_iou": 0.5}, 0.5), ({"mask_iou": 1, "predicted_iou": 0.5}, 1.0)],
)
def test_names_of_the_predicted_iou(dataset, tmp_path, keys, expected):
    results_of(dataset, tmp_path / "r.json", **keys)
    assert set(np.concatenate([image.ious for image in read(dataset, tmp_path / "r.json").images])) == {expected}


def test_masks_are_sorted_by_score_and_those_below_the_threshold_left_out(dataset, tmp_path):
    entries = results_of(dataset, tmp_path / "r.json")
    record = dataset.records[5]
    own = [entry for entry in entries if entry["image_id"] == record.image_id][:1] * 4
    scores = [0.2, 0.9, 0.35, 0.5]
    polygon = [[5, 5, 40, 5, 40, 30, 5, 30]]
    kept = [entry | {"score": score, "segmentation": polygon} for entry, score in zip(own, scores, strict=True)]
    empty = own[0] | {"segmentation": {"size": [record.height, record.width], "counts": [record.height * record.width]}}
    kept[1] |= {"bbox": [4, 6, 30, 20]}
    (tmp_path / "r.json").write_text(json.dumps([*kept, empty]))
    found = read(dataset, tmp_path / "r.json", above=0.35)
    image = found.images[2]
    assert image.scores.tolist() == pytest.approx([0.9, 0.5, 0.35])
    assert image.boxes.tolist() == [[4, 6, 34, 26], [5, 5, 40, 30], [5, 5, 40, 30]]
    assert (found.below, found.empty, found.elsewhere) == (1, 1, 0)
    assert sum(len(image.scores) for image in found.images) == 3
    assert "3 scored masks in 1 of 9 unlabeled images, none in 8\n  score 0.38 / 0.50 / 0.82" in found.summary()


def test_the_table_contains_the_masks_read(dataset, tmp_path):
    results_of(dataset, tmp_path / "r.json")
    images = read(dataset, tmp_path / "r.json").images
    for row, image in zip(scored_masks.to_table(images)["scored"].to_pylist(), images, strict=True):
        assert row["boxes"] == image.boxes.ravel().tolist()
        assert tuple(row["rles"]) == image.rles
