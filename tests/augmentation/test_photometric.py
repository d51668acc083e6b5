"""Photometric augmentation with albumentations: seeded, thread-safe, without changes of shape."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pais_ray.augmentation.photometric import Photometric


@pytest.fixture(scope="module")
def image():
    ys, xs = np.mgrid[0:48, 0:64]
    waves = [127 + 90 * np.sin(xs / 7 + c) * np.cos(ys / 5 - c) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def test_the_result_depends_on_the_seed_only(image):
    preset = Photometric("cityscapes")
    results = [preset.apply(image, seed) for seed in range(12)]
    again = [preset.apply(image, seed) for seed in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert len({p.tobytes() for p in results}) > 6


def test_results_are_the_same_in_several_threads(image):
    preset, seeds = Photometric("cityscapes"), list(range(40))
    alone = [preset.apply(image, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: preset.apply(image, seed), seeds))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_it_ignores_the_global_random_state(image):
    preset = Photometric("cityscapes")
    np.random.seed(0)  # noqa: NPY002
    first = preset.apply(image, 5)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, preset.apply(image, 5))


def test_one_image_in_eight_is_unchanged_and_none_changes_shape(image):
    preset, before = Photometric("cityscapes"), image.copy()
    results = [preset.apply(image, seed) for seed in range(160)]
    assert all(p.shape == image.shape and p.dtype == np.uint8 for p in results)
    assert 8 <= sum(np.array_equal(p, image) for p in results) <= 40  # expected 20, standard deviation 4.2
    assert np.array_equal(before, image)


def test_a_seed_of_64_bits_is_accepted(image):
    assert Photometric("cityscapes").apply(image, 2**64 - 1).shape == image.shape


def test_wrong_arrays_and_presets_are_refused(image):
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8 RGB, got \(48, 64\) uint8"):
        Photometric("cityscapes").apply(image[..., 0], 0)
    with pytest.raises(ValueError, match="expected 'cityscapes' or null, got 'coco'"):
        Photometric("coco")
