"""Views: ground truth of one view, moved by the matrices, equals the ground truth of the other view."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError

from pais_ray.augmentation import pixel_ops, presets, sampling, views
from pais_ray.augmentation.presets import AugmentConfig, ViewConfig
from pais_ray.augmentation.sample import Sample
from pais_ray.structures import geometry
from pais_ray.structures.masks import Masks

SIZE = (180, 240)  # h, w
SMALL = AugmentConfig().at_size(192)


# ---- scenes ---------------------------------------------------------------------------------------------


def polygons(seed, size=SIZE, count=5):
    """Star-shaped polygons, each (K, 2) float64 px: neither symmetric nor axis-aligned."""
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(25, 60, 9)
        spot = rng.uniform(0.2, 0.8, 2) * [size[1], size[0]]
        corners = spot + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        shapes.append(corners.clip(0, [size[1], size[0]]))  # parts outside of the image are not annotated
    return shapes


def fill(polygon, size):
    """Bool (h, w): pixel centers inside, by counting the edges crossed to the left."""
    ys, xs = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    inside = np.zeros(size, dtype=bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crossed = (y1 > ys) != (y2 > ys)
        if crossed.any():
            inside ^= crossed & (xs > x1 + (ys - y1) / (y2 - y1) * (x2 - x1))
    return inside


def truth_in(shapes, matrix, size):
    """The scene drawn directly in a view, bool (N, h, w), without pixels of another view."""
    moved = [geometry.transform_points(torch.from_numpy(s), matrix.double()).numpy() for s in shapes]
    return torch.from_numpy(np.stack([fill(m, size) for m in moved]))


def sample(seed=0, size=SIZE, row=0, slot=0, count=5):
    """A smooth image with polygons of uniform color, and their annotations."""
    rng = np.random.default_rng(seed)
    shapes = polygons(seed, size, count)
    masks = np.stack([fill(s, size) for s in shapes]) if count else np.zeros((0, *size), bool)
    ys, xs = np.mgrid[0 : size[0], 0 : size[1]]
    image = np.stack([127 + 100 * np.sin(xs / (20 + 9 * c) + ys / 37 + c) for c in range(3)], axis=-1)
    for mask in masks:
        image[mask] = rng.uniform(20, 235, 3)
    boxes = [[m.any(0).nonzero()[0][[0, -1]], m.any(1).nonzero()[0][[0, -1]]] for m in masks]
    boxes = np.array([[x[0], y[0], x[1] + 1, y[1] + 1] for x, y in boxes], np.float32).reshape(-1, 4)
    labels = np.arange(len(masks), dtype=np.int64)
    return Sample.of(
        cv2.GaussianBlur(image, (0, 0), 2).astype(np.uint8),
        image_id=100 + seed,
        row=row,
        slot=slot,
        boxes=boxes,
        labels=labels,
        masks=masks.astype(np.uint8),
    )


def ious(a, b):
    return ((a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)).tolist()


def large(masks):
    return masks.sum(dim=(1, 2)) > 32 * 32


def as_resolution(masks, size, resolution):
    """Full-size masks in the representation of a segmentor."""
    full = Masks.full(masks)
    if resolution == "28x28":
        boxes = torch.stack([tight_box(m) for m in masks])
        return Masks.in_boxes(full.crop_resize(boxes, 28), boxes)
    return Masks.strided(full.to_grid(4, size), 4) if resolution == "stride 4" else full


def tight_box(mask):
    ys, xs = mask.nonzero().unbind(1)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


# ---- geometry of views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", ["full", "28x28", "stride 4"])
def test_warped_weak_ground_truth_equals_strong_ground_truth(resolution):
    scores = []
    for seed in range(8):
        one, shapes = sample(seed), polygons(seed)
        (weak,) = sampling.plan_views([one], SMALL, seed, "weak")
        (strong,) = sampling.plan_views([one], SMALL, seed, "strong")
        weak_to_strong = strong.matrix @ geometry.invert(weak.matrix)
        seen = truth_in(shapes, weak.matrix, weak.size)
        expected = truth_in(shapes, strong.matrix, strong.size)
        chosen = large(seen) & large(expected)
        carried = as_resolution(seen[chosen], weak.size, resolution).warp(weak_to_strong)
        scores += ious(carried.paste(strong.size), expected[chosen])
    assert len(scores) > 15
    assert np.mean(scores) > (0.96 if resolution == "full" else 0.9)
    assert min(scores) > 0.75


@pytest.mark.parametrize("resolution", ["full", "28x28", "stride 4"])
def test_ground_truth_follows_a_chain_of_all_operations(resolution):
    shapes, size = polygons(3), (200, 260)
    chain = (
        geometry.scale(1.2, 1.1)
        @ geometry.shear(0.3, -0.2, (120, 90))
        @ geometry.rotate(25, (120, 90))
        @ geometry.flip_horizontal(SIZE[1])
    )
    expected, seen = truth_in(shapes, chain, size), truth_in(shapes, geometry.identity(), SIZE)
    chosen = large(expected) & large(seen)
    carried = as_resolution(seen[chosen], SIZE, resolution)
    for step in (
        geometry.flip_horizontal(SIZE[1]),
        geometry.rotate(25, (120, 90)),
        geometry.shear(0.3, -0.2, (120, 90)),
        geometry.scale(1.2, 1.1),
    ):
        carried = carried.warp(step)
    assert chosen.sum() >= 3
    assert np.mean(ious(carried.paste(size), expected[chosen])) > (0.97 if resolution == "full" else 0.9)


def test_warped_weak_pixels_equal_strong_pixels():
    config = {**SMALL, "strong": SMALL["strong"].model_copy(update={"color": False, "erase": False})}
    flips = 0
    for seed in range(10):
        one = sample(seed)
        weak, strong = (views.make_views([one], config, seed, kind, "cpu") for kind in ("weak", "strong"))
        matrix = (strong.matrix[0] @ geometry.invert(weak.matrix[0])).double()
        flips += bool(matrix[0, 0] < 0)
        (h, w), (weak_h, weak_w) = strong.sizes[0].tolist(), weak.sizes[0].tolist()
        # OpenCV counts from pixel centers, this project from pixel corners.
        centers = (geometry.translate(-0.5, -0.5) @ matrix @ geometry.translate(0.5, 0.5))[:2].numpy()
        pixels = weak.images[0, :, :weak_h, :weak_w].permute(1, 2, 0).numpy()
        carried = cv2.warpAffine(pixels, centers, (w, h), flags=cv2.INTER_LINEAR)
        inside = cv2.warpAffine(np.ones((weak_h, weak_w), np.float32), centers, (w, h)) > 0.999
        off = np.abs(carried - strong.images[0, :, :h, :w].permute(1, 2, 0).numpy())[inside]
        assert inside.mean() > 0.4
        assert off.mean() < 0.002, seed  # a flip or a warp off by one px gives .003 to .012
    assert 0 < flips < 10


def test_boxes_follow_masks():
    for seed in range(8):
        one, shapes = sample(seed), polygons(seed)
        (strong,) = sampling.plan_views([one], SMALL, seed, "strong")
        size = torch.tensor(strong.size)
        around = torch.from_numpy(np.stack([np.concatenate([s.min(0), s.max(0)]) for s in shapes]))
        carried = geometry.clip_boxes(geometry.transform_boxes(around, strong.matrix), size)
        for box, mask in zip(carried, truth_in(shapes, strong.matrix, strong.size), strict=True):
            if mask.any():
                tight = tight_box(mask)
                assert (box[:2] <= tight[:2] + 0.5).all()  # the center of the first pixel inside
                assert (box[2:] >= tight[2:] - 0.5).all()


def test_an_identity_view_returns_the_image():
    one = sample()
    config = AugmentConfig(test=ViewConfig(short_side=(SIZE[0], SIZE[0]), flip=0.0)).at_size(None)
    view = views.make_views([one], config, 0, "test", "cpu")
    assert torch.equal(view.images[0, :, : SIZE[0], : SIZE[1]], one.image.float() / 255)
    assert torch.equal(view.matrix[0], torch.eye(3))


def test_a_double_flip_is_exact():
    one = sample()
    config = AugmentConfig(test=ViewConfig(short_side=(SIZE[0], SIZE[0]), flip=1.0)).at_size(None)
    flipped = views.make_views([one], config, 0, "test", "cpu")
    once = (flipped.images[0, :, : SIZE[0], : SIZE[1]] * 255).round().byte()
    assert torch.equal(once, one.image.flip(-1))
    assert torch.equal(flipped.matrix[0], geometry.flip_horizontal(SIZE[1]).float())
    twice = Sample(image=once, image_id=1, row=0, slot=0)
    back = views.make_views([twice], config, 0, "test", "cpu")
    assert torch.equal(back.images[0, :, : SIZE[0], : SIZE[1]], one.image.float() / 255)
    assert torch.equal(back.matrix[0] @ flipped.matrix[0], torch.eye(3))


def test_resizing_averages_when_it_shrinks():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::4] = 252  # plain bilinear sampling at 1/4 would see only some of the columns
    config = AugmentConfig(test=ViewConfig(short_side=(16, 16), flip=0.0)).at_size(None)
    small = views.make_views([Sample(image=stripes, image_id=0, row=0, slot=0)], config, 0, "test", "cpu")
    inner = small.images[0, :, 2:14, 2:14]
    torch.testing.assert_close(inner, torch.full_like(inner, 63 / 255), atol=0.03, rtol=0)


def test_a_warp_fills_the_outside_with_the_fill_value():
    image = torch.rand(3, 40, 60)
    moved = pixel_ops.warp(image, geometry.translate(10, 0), 125 / 255)
    torch.testing.assert_close(moved[:, :, :10], torch.full((3, 40, 10), 125 / 255))
    torch.testing.assert_close(moved[:, :, 10:], image[:, :, :50], atol=1e-4, rtol=0)


def test_ground_truth_of_photographs_follows_the_views(image_sets):
    photographs = image_sets / "coco"
    tree = json.loads((photographs / "annotations/instances_train.json").read_text())
    scores = []
    for entry in tree["images"][:6]:
        found = [a for a in tree["annotations"] if a["image_id"] == entry["id"] and not a["iscrowd"]]
        found = [[np.array(part).reshape(-1, 2) for part in a["segmentation"]] for a in found[:5]]
        picture = np.array(Image.open(photographs / "images" / entry["file_name"]).convert("RGB"))
        one = Sample.of(picture, image_id=entry["id"])
        (weak,), (strong,) = (sampling.plan_views([one], SMALL, 7, kind) for kind in ("weak", "strong"))
        for parts in found:
            seen, expected = (truth_in(parts, p.matrix, p.size).any(0, keepdim=True) for p in (weak, strong))
            if large(seen) and large(expected):
                carried = as_resolution(seen, weak.size, "28x28")
                carried = carried.warp(strong.matrix @ geometry.invert(weak.matrix))
                scores += ious(carried.paste(strong.size), expected)
    assert len(scores) >= 3
    assert np.mean(scores) > 0.9


# ---- randomness -----------------------------------------------------------------------------------------


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.matrix, b.matrix)


def test_a_view_depends_on_seed_row_and_slot():
    one = sample()
    first = views.make_views([one], SMALL, 1, "strong", "cpu")
    assert same(first, views.make_views([one], SMALL, 1, "strong", "cpu"))
    assert not same(first, views.make_views([one], SMALL, 2, "strong", "cpu"))
    assert not same(first, views.make_views([sample(row=1)], SMALL, 1, "strong", "cpu"))
    assert not same(first, views.make_views([sample(slot=1)], SMALL, 1, "strong", "cpu"))


def test_views_do_not_depend_on_the_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = views.make_views([sample()], SMALL, 1, "strong", "cpu")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert same(first, views.make_views([sample()], SMALL, 1, "strong", "cpu"))


def test_view_seeds_are_stable_between_versions():
    assert sampling.view_seed(0, 0, 0, "weak") == 934783230364932384
    kinds = ("labeled", "weak", "strong", "test", "photometric")
    names = [(s, g, slot, kind) for s in range(3) for g in range(30) for slot in range(4) for kind in kinds]
    assert len({sampling.view_seed(*name) for name in names}) == len(names)


def test_a_view_does_not_depend_on_other_images_of_the_batch():
    one, other = sample(0, slot=1), sample(1, size=(120, 300), slot=2)
    alone = views.make_views([one], SMALL, 5, "strong", "cpu")
    both = views.make_views([other, one], SMALL, 5, "strong", "cpu")
    h, w = alone.sizes[0].tolist()
    assert torch.equal(both.matrix[1], alone.matrix[0])
    assert torch.equal(both.images[1, :, :h, :w], alone.images[0, :, :h, :w])


def test_weak_and_strong_draw_scale_and_flip_independently():
    pairs = [
        (sampling.draw_view(SMALL["weak"], SIZE, sampling.view_seed(0, g, 0, "weak")),
         sampling.draw_view(SMALL["strong"], SIZE, sampling.view_seed(0, g, 0, "strong")))
        for g in range(200)
    ]  # fmt: skip
    assert 70 < sum(weak.flip == strong.flip for weak, strong in pairs) < 130
    scales = np.array([(weak.size[0], strong.size[0]) for weak, strong in pairs])
    assert abs(np.corrcoef(scales.T)[0, 1]) < 0.25


def test_draws_cover_the_ranges_of_the_paper():
    plans = [sampling.draw_view(AugmentConfig().strong, (480, 640), seed) for seed in range(600)]
    assert {p.color for p in plans} == {(c, n) for c in pixel_ops.COLORS for n in range(1, 10)}
    shorts = [min(p.size) for p in plans]
    assert 400 <= min(shorts) < 420
    assert max(max(p.size) for p in plans) == 1333  # 4:3 images reach the limit at a short side of 1000
    assert {len(p.patches) for p in plans} == {1, 2, 3, 4}
    for p in plans:
        assert all(0 <= x1 <= x2 <= p.size[1] and 0 <= y1 <= y2 <= p.size[0] for x1, y1, x2, y2 in p.patches)
        assert all(x2 - x1 <= 0.2 * p.size[1] and y2 - y1 <= 0.2 * p.size[0] for x1, y1, x2, y2 in p.patches)


def test_geometric_draws_stay_within_the_ranges_of_the_paper():
    kinds = {"x": 0, "y": 0, "rotate": 0, "shear": 0}
    for seed in range(400):
        drawn = sampling.draw_view(AugmentConfig().strong, (480, 640), seed)
        (a, b, tx), (c, d, ty), _ = drawn.motion.tolist()
        center = torch.tensor([[drawn.size[1] / 2, drawn.size[0] / 2]], dtype=torch.float64)
        if (a, b, c, d) == (1, 0, 0, 1):
            assert abs(tx) <= 0.1 * drawn.size[1]
            assert abs(ty) <= 0.1 * drawn.size[0]
            kinds["x" if ty == 0 else "y"] += 1
            continue
        torch.testing.assert_close(geometry.transform_points(center, drawn.motion), center)
        if abs(a - d) < 1e-12 and abs(b + c) < 1e-12:
            assert abs(np.degrees(np.arctan2(c, a))) <= 30
            kinds["rotate"] += 1
        else:
            assert abs(b) <= np.tanh(np.radians(30))  # .48, not tan's .58
            assert abs(c) <= np.tanh(np.radians(30))
            kinds["shear"] += 1
    assert min(kinds.values()) > 70


@pytest.mark.parametrize(("preset", "orders"), [("coco", 2), ("coco_knet", 6)])
def test_the_order_of_the_strong_operations(preset, orders):
    config = AugmentConfig(preset=preset)
    seen = {sampling.draw_view(config.strong, SIZE, seed).steps for seed in range(100)}
    assert len(seen) == orders
    assert preset == "coco_knet" or all(steps[-1] == "erase" for steps in seen)
    assert sampling.draw_view(config.weak, SIZE, 0).steps == ()
    assert sampling.draw_view(config.labeled, SIZE, 0).steps == ("color",)


# ---- color and erase -----------------------------------------------------------------------------------


def pil(name, level, image):
    factor = 0.18 * level + 0.1
    match name:
        case "identity":
            return image
        case "autocontrast" | "equalize":
            return getattr(ImageOps, name)(image)
        case "solarize":
            return ImageOps.solarize(image, min(int(25.6 * level), 255))
        case "posterize":
            return ImageOps.posterize(image, 4 - int(0.4 * level))
        case _:
            return getattr(ImageEnhance, name.capitalize())(image).enhance(factor)


@pytest.mark.parametrize("level", [1, 4, 9])
@pytest.mark.parametrize("name", pixel_ops.COLORS)
def test_color_operations_agree_with_pil(name, level):
    noise = np.random.default_rng(0).normal(0, 6, (*SIZE, 3))
    picture = sample().image.permute(1, 2, 0).numpy() * 0.7 + 30 + noise
    picture = picture.clip(0, 255).astype(np.uint8)
    ours = pixel_ops.color(torch.from_numpy(picture).permute(2, 0, 1).float() / 255, name, level) * 255
    theirs = torch.from_numpy(np.array(pil(name, level, Image.fromarray(picture)))).permute(2, 0, 1)
    # PIL rounds to whole levels: its gray, its mean (times up to 1.72) and its result.
    torch.testing.assert_close(ours, theirs.float(), atol=2.0, rtol=0)
    exact = name in ("identity", "equalize", "solarize", "posterize")
    assert (ours - theirs).abs().mean() < (1e-3 if exact else 0.9)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_a_uniform_image_keeps_its_color(name):
    flat = torch.full((3, 8, 8), 100 / 255)
    torch.testing.assert_close(pixel_ops.color(flat, name, 5), flat)


def test_posterize_tolerates_rounding_errors_of_resizing():
    almost = torch.full((3, 8, 8), (128 - 1e-3) / 255)
    torch.testing.assert_close(pixel_ops.color(almost, "posterize", 9), torch.full((3, 8, 8), 128 / 255))


def test_an_unknown_color_operation_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"expected one of identity, autocontrast.*got 'hue'"):
        pixel_ops.color(torch.zeros(3, 4, 4), "hue", 1)


def test_erase_changes_the_patches_only():
    image = torch.rand(3, 20, 30)
    before = image.clone()
    erased = pixel_ops.erase(image, ((2, 3, 10, 8), (0, 0, 0, 5)), (0.1, 0.2, 0.3))
    assert torch.equal(image, before)
    assert torch.equal(erased[:, 3, 2], torch.tensor([0.1, 0.2, 0.3]))
    assert (erased != image).any(dim=0).sum() == 8 * 5


def test_cutout_of_cityscapes_is_clipped_at_the_border():
    config = AugmentConfig(preset="cityscapes").strong
    patches = [p for seed in range(100) for p in sampling.draw_view(config, (1024, 2048), seed).patches]
    assert max(x2 - x1 for x1, _, x2, _ in patches) == 400
    assert all(x2 <= 2048 and y2 <= 1024 for _, _, x2, y2 in patches)


# ---- configuration --------------------------------------------------------------------------------------


def test_image_size_scales_every_length_with_the_test_view():
    assert (SMALL["weak"].short_side, SMALL["weak"].long_side) == ((96, 288), 320)
    assert (SMALL["test"].short_side, SMALL["test"].long_side) == ((192, 192), 320)
    assert AugmentConfig().at_size(None)["strong"] == AugmentConfig().strong
    street = AugmentConfig(preset="cityscapes").at_size(512)["labeled"]
    assert street.short_side == (400, 512)
    assert street.erase_holes[-1] == (200, 100)


def test_a_preset_provides_the_values_that_are_not_given():
    config = AugmentConfig(preset="coco_knet", strong={"flip": 0.0})
    assert (config.strong.flip, config.strong.order, config.strong.erase) == (0.0, "random", True)
    assert config.weak == presets.PRESETS["coco_knet"]["weak"]
    assert AugmentConfig(preset="plain").labeled.short_side == (800, 800)
    assert not AugmentConfig(preset="plain").labeled.color
    assert AugmentConfig(preset="cityscapes").labeled.photometric == "cityscapes"


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_a_dumped_config_loads_unchanged(preset):
    config = AugmentConfig(preset=preset, weak={"rotate": 10.0})
    assert AugmentConfig(**config.model_dump()) == config
    assert AugmentConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "words",
    [
        {"preset": "kitti"},
        {"stong": {}},
        {"strong": {"flp": 1}},
        {"weak": {"flip": 2}},
        {"weak": {"short_side": (9, 3)}},
    ],
)
def test_invalid_settings_are_refused(words):
    with pytest.raises(ValidationError):
        AugmentConfig(**words)


# ---- batches --------------------------------------------------------------------------------------------


def test_views_are_padded_with_zeros_to_a_common_multiple_of_32():
    made = views.make_views([sample(0), sample(1, size=(150, 400), slot=1)], SMALL, 0, "labeled", "cpu")
    assert made.images.shape[2] % 32 == made.images.shape[3] % 32 == 0
    assert made.image_ids.tolist() == [100, 101]
    for image, (h, w) in zip(made.images, made.sizes.tolist(), strict=True):
        assert image[:, h:].abs().sum() == image[:, :, w:].abs().sum() == 0
        assert 0 <= image.min() < 0.3 < 0.7 < image.max() <= 1
    assert (made.images.shape[2] - made.sizes[:, 0].max()) < 32
    assert (made.images.shape[3] - made.sizes[:, 1].max()) < 32


@pytest.mark.parametrize("geometric", [False, True])
def test_labeled_targets_are_the_ground_truth_of_their_view(geometric):
    config = AugmentConfig(labeled={"geometric": geometric}).at_size(192)
    flips = set()
    for seed in range(6):
        one = sample(seed)
        batch = views.make_batch([one], [], config, seed, "cpu")
        (targets,), size = batch.targets, tuple(batch.labeled.sizes[0].tolist())
        flips.add(bool(batch.labeled.matrix[0, 0, 0] < 0))
        assert targets.masks.upright is not geometric
        shapes = [polygons(seed)[i] for i in targets.labels]
        expected = truth_in(shapes, batch.labeled.matrix[0], size)
        chosen = large(expected)
        pasted = targets.masks.paste(size)
        assert np.mean(ious(pasted[chosen], expected[chosen])) > 0.93
        crops = Masks.in_boxes(targets.masks.crop_resize(targets.boxes, 28), targets.boxes).paste(size)
        assert np.mean(ious(crops[chosen], expected[chosen])) > 0.9
        if not geometric:
            tight = torch.stack([tight_box(m) for m in pasted[chosen]])
            assert (targets.boxes[chosen] - tight).abs().mean() < 1  # spikes thinner than a pixel vanish
    assert flips == {True, False}


def test_instances_that_vanish_in_the_view_are_dropped():
    one = sample(count=2)
    masks = torch.cat([one.masks, torch.zeros(1, *SIZE, dtype=torch.uint8)])
    masks[2, 10, 10] = 1
    speck = torch.cat([one.boxes, torch.tensor([[10.0, 10.0, 11.0, 11.0]])])
    one = Sample(image=one.image, image_id=1, row=0, slot=0, boxes=speck, labels=torch.arange(3), masks=masks)
    config = AugmentConfig(labeled=ViewConfig(short_side=(90, 90))).at_size(None)
    (targets,) = views.make_batch([one], [], config, 0, "cpu").targets
    assert targets.labels.tolist() == [0, 1]
    assert len(targets.masks) == 2


def test_images_without_instances_have_empty_targets():
    (targets,) = views.make_batch([sample(count=0)], [], SMALL, 0, "cpu").targets
    assert len(targets) == 0
    assert targets.masks.crop_resize(targets.boxes, 28).shape == (0, 28, 28)


def test_weak_and_strong_views_of_a_batch_have_the_same_images():
    unlabeled = [sample(i, row=4, slot=i) for i in (1, 2, 3)]
    batch = views.make_batch([sample(0, row=4)], unlabeled, SMALL, 0, "cpu")
    assert batch.weak.image_ids.tolist() == batch.strong.image_ids.tolist() == [101, 102, 103]
    assert batch.weak.rows.tolist() == [4, 4, 4]
    assert len(batch.targets) == len(batch.labeled) == 1
    assert views.make_batch([sample(0)], [], SMALL, 0, "cpu").strong is None


def test_missing_samples_and_missing_annotations_are_refused():
    with pytest.raises(ValueError, match="expected at least one labeled sample"):
        views.make_batch([], [sample()], SMALL, 0, "cpu")
    with pytest.raises(ValueError, match="expected at least one sample for the weak view"):
        views.make_views([], SMALL, 0, "weak", "cpu")
    bare = Sample(image=sample().image, image_id=9, row=0, slot=0)
    with pytest.raises(ValueError, match="image 9 without annotations"):
        views.make_batch([bare], [], SMALL, 0, "cpu")
