"""Pictures show what they are given, where it is, and files are whole or absent."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pais_ray.figures import charts
from pais_ray.figures import instances as instances_module
from pais_ray.files import atomic
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

GRAY = np.full((96, 128, 3), 128, dtype=np.uint8)


def instances(*boxes, size=(96, 128)):
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), masks


def draw(boxes, masks, image=GRAY, readable=0):
    num = len(boxes)
    return instances_module.overlay(
        image, boxes, np.zeros(num, int), np.linspace(0.9, 0.5, num), masks, ["cat"], readable
    )


def test_overlay_tints_the_mask_in_its_color_and_leaves_the_rest():
    boxes, masks = instances((20, 40, 60, 80), (80, 50, 120, 90))
    before = GRAY.copy()
    picture = draw(boxes, masks)
    assert (before == GRAY).all()
    assert picture.shape == GRAY.shape
    assert picture.dtype == np.uint8
    for i, (x, y) in enumerate([(40, 60), (100, 70)]):
        tint = (128 * 0.6 + np.array(instances_module.color(i)) * 0.4).astype(np.uint8)
        assert (picture[y, x] == tint).all()
    masks[0, :, :30] = False  # apart from the box, whose border has the same color
    assert (draw(boxes, masks)[60, 30] == instances_module.color(0)).all(), "the outline is opaque"
    assert (draw(boxes, masks)[60, 28] == 128).all()
    assert (picture[92:, :70] == 128).all()
    assert (picture[:25] == 128).all()


def test_small_masks_stay_visible_on_large_ones_whatever_their_score():
    boxes, masks = instances((50, 50, 60, 60), (10, 10, 120, 90))
    picture = draw(boxes, masks).astype(int)
    inside, outside = picture[55, 55], picture[80, 100]
    toward = np.array(instances_module.color(0)) - outside
    assert ((inside - outside) * toward >= 0).all()
    assert (inside != outside).any()


def test_small_pictures_are_enlarged_so_that_tags_can_be_read():
    boxes, masks = instances((20, 40, 60, 80))
    assert draw(boxes, masks, readable=512).shape == (384, 512, 3)
    assert draw(boxes, masks, readable=500).shape == (384, 512, 3)


@pytest.mark.parametrize(
    "box", [(0, 0, 128, 96), (-5, -5, 10, 10), (120, 90, 140, 120), (30, 30, 30, 30), (200, 200, 220, 220)]
)
def test_any_box_is_drawn_without_complaint(box):
    masks = np.zeros((1, 96, 128), dtype=bool)
    assert draw(np.array([box], dtype=np.float32), masks).shape == GRAY.shape


def test_nothing_to_draw_gives_the_picture_back():
    boxes, masks = instances()
    assert (draw(boxes, masks) == GRAY).all()


def test_colors_differ():
    chosen = np.array([instances_module.color(i) for i in range(30)]).astype(int)
    distance = np.abs(chosen[:, None] - chosen[None]).sum(-1) + 1000 * np.eye(30, dtype=int)
    assert distance.min() > 20
    near = [np.abs(chosen[i] - chosen[j]).sum() for i in range(30) for j in range(i + 1, min(i + 4, 30))]
    assert min(near) > 100


def test_overlay_is_fast():
    size = (480, 640)
    corners = np.random.default_rng(0).integers(0, 400, (50, 2))
    boxes, masks = instances(*[(int(x), int(y), int(x) + 80, int(y) + 60) for x, y in corners], size=size)
    image = np.zeros((*size, 3), dtype=np.uint8)
    draw(boxes, masks, image)
    started = time.process_time()
    draw(boxes, masks, image)
    assert time.process_time() - started < 0.5  # 0.05 s where nothing else runs; matplotlib takes more than 1 s


def test_panel_shows_kept_in_color_and_dropped_in_gray(tmp_path):
    boxes, masks = instances((20, 40, 60, 80), (80, 50, 120, 90))
    image = np.full((96, 128, 3), (0, 0, 255), dtype=np.uint8)
    soft = Masks.full(torch.from_numpy(masks))
    found = Predictions(
        boxes=torch.from_numpy(boxes),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.2]),
        ious=torch.tensor([0.8, 0.1]),
        masks=soft,
    )
    targets = Targets(boxes=found.boxes[:1], labels=found.labels[:1], masks=soft[:1])
    row = instances_module.PanelRow(
        weak=image, strong=image[::-1], predictions=found, kept=torch.tensor([True, False]), targets=targets
    )
    empty = instances_module.PanelRow(
        weak=image,
        strong=image,
        predictions=found[:0],
        kept=torch.zeros(0, dtype=torch.bool),
        targets=targets[[]],
    )
    panel = instances_module.pseudo_label_panel([row, empty], ["cat", "dog"], tmp_path / "figures" / "panel.png")
    with Image.open(tmp_path / "figures" / "panel.png") as file:
        assert (np.asarray(file) == panel).all()
    factor = 4
    weak, right = (
        panel[24 : 24 + 96 * factor, : 128 * factor],
        panel[24 : 24 + 96 * factor, 128 * factor + 6 :],
    )
    tint = (np.array((0, 0, 255)) * 0.6 + np.array(instances_module.color(0)) * 0.4).astype(np.uint8)
    assert (weak[60 * factor, 40 * factor] == tint).all()
    assert (right[60 * factor, 40 * factor] == tint).all()
    assert (weak[70 * factor, 100 * factor] == (0, 0, 255)).all(), "dropped masks are not filled"
    dropped_border = weak[89 * factor : 90 * factor, 80 * factor : 120 * factor].reshape(-1, 3)
    assert (dropped_border == instances_module.GRAY).all(axis=1).any()
    assert not (right.reshape(-1, 3) == instances_module.GRAY).all(axis=1).any()


def test_grid_places_images_line_by_line():
    images = [np.full((10 + i, 20, 3), i, dtype=np.uint8) for i in range(5)]
    picture = instances_module.grid(images, columns=2, gap=3)
    assert picture.shape == (11 + 13 + 14 + 6, 43, 3)
    assert (picture[0, 0] == 0).all()
    assert (picture[0, 23] == 1).all()
    assert (picture[14, 0] == 2).all()
    assert (picture[30, 0] == 4).all()
    assert (picture[30, 30] == 255).all()
    assert instances_module.grid([], 2).ndim == 3


def test_metrics_are_grouped_by_the_first_part_of_their_name():
    rows = [
        {"step": 10, "labeled/mask": 1.0, "pseudo/kept": 2, "lr": 0.1, "unlabeled/class": float("nan")},
        {"step": 20, "labeled/mask": 0.5, "teacher/segm_AP": 0.2, "student/segm_AP": 0.1, "note": "text"},
        {"step": 20, "teacher/segm_AP_class/cat": 0.9, "teacher/segm_APs": None, "flag": True},
        {"labeled/mask": 7.0},
    ]
    groups = charts._grouped(rows)
    assert list(groups) == ["labeled", "AP", "pseudo", "other"]
    assert groups["labeled"] == {"mask": ([10, 20], [1.0, 0.5])}
    assert groups["AP"] == {"teacher/segm_AP": ([20], [0.2]), "student/segm_AP": ([20], [0.1])}


def test_curves_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [{"step": i, "labeled/mask": 1 / (i + 1), "teacher/segm_AP": i / 10} for i in range(5)]
    path = tmp_path / "figures" / "curves.png"
    charts.curves(rows, path)
    with Image.open(path) as file:
        assert min(file.size) > 200
        assert np.asarray(file.convert("L")).std() > 5
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        instances_module.save(GRAY, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_no_metrics_yet_is_a_picture_that_says_so(tmp_path):
    charts.curves([], tmp_path / "curves.png")
    assert Image.open(io.BytesIO((tmp_path / "curves.png").read_bytes())).size[0] > 100


def test_saved_pictures_are_read_back(tmp_path):
    instances_module.save(GRAY, tmp_path / "a.png")
    instances_module.save(GRAY, tmp_path / "a.jpg")
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        with Image.open(tmp_path / name) as file:
            assert file.format == kind
            assert file.size == (128, 96)
