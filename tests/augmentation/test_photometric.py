"""Laws of the albumentations adapter."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pais_ray.augmentation.photometric import Photometric


@pytest.fixture(scope="module")
def image():
    ys, xs = np.mgrid[0:48, 0:64]
    waves = [127 + 90 * np.sin(xs / 7 + c) * np.cos(ys / 5 - c) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(image):
    preset = Photometric("cityscapes")
    pictures = [preset.apply(image, seed) for seed in range(12)]
    again = [preset.apply(image, seed) for seed in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(pictures, again, strict=True))
    assert len({p.tobytes() for p in pictures}) > 6


def test_threads_do_not_disturb_each_other(image):
    preset, seeds = Photometric("cityscapes"), list(range(40))
    alone = [preset.apply(image, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: preset.apply(image, seed), seeds))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_it_ignores_the_ambient_random_state(image):
    preset = Photometric("cityscapes")
    np.random.seed(0)  # noqa: NPY002
    first = preset.apply(image, 5)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, preset.apply(image, 5))


def test_one_picture_in_eight_stays_as_it_is_and_none_changes_shape(image):
    preset, before = Photometric("cityscapes"), image.copy()
    pictures = [preset.apply(image, seed) for seed in range(160)]
    assert all(p.shape == image.shape and p.dtype == np.uint8 for p in pictures)
    assert 8 <= sum(np.array_equal(p, image) for p in pictures) <= 40  # 20 expected, spread 4.2
    assert np.array_equal(before, image)


def test_a_seed_of_64_bits_is_taken(image):
    assert Photometric("cityscapes").apply(image, 2**64 - 1).shape == image.shape


def test_what_is_not_a_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8 RGB, got \(48, 64\) uint8"):
        Photometric("cityscapes").apply(image[..., 0], 0)
    with pytest.raises(ValueError, match="expected 'cityscapes' or null, got 'coco'"):
        Photometric("coco")
