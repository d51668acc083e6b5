"""The cost of the strong view, compared with Kornia's AugmentationSequential for the same kind of augmentation.

    OMP_NUM_THREADS=1 python benchmarks/augment.py

Both convert uint8 images of 480 x 640 px to strong views (scale jitter around 1, flip, one of nine color operations,
one of four geometric operations, erasing) on one thread. Kornia has the same probabilities, such as 1/9 for each color
operation, but computes every operation for every image. Prints ms per image (median of alternating rounds) and the
ratio, which should be at most 0.25.
"""

import statistics
import time
import warnings

import kornia.augmentation as K
import numpy as np
import torch

from pais_ray.augmentation.presets import AugmentConfig, ViewConfig
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_views

BATCH, ROUNDS, SIZE = 4, 15, (480, 640)


def kornia_pipeline() -> torch.nn.Module:
    color = [
        K.RandomAutoContrast(p=1 / 9),
        K.RandomEqualize(p=1 / 9),
        K.RandomSolarize((0.1, 0.9), (0.0, 0.0), p=1 / 9),
        K.RandomSaturation((0.28, 1.72), p=1 / 9),
        K.RandomContrast((0.28, 1.72), p=1 / 9),
        K.RandomBrightness((0.28, 1.72), p=1 / 9),
        K.RandomSharpness((0.0, 1.72), p=1 / 9),
        K.RandomPosterize((1, 4), p=1 / 9),
    ]
    geometric = [
        K.RandomAffine(0.0, translate=(0.1, 0.0), p=1 / 4),
        K.RandomAffine(0.0, translate=(0.0, 0.1), p=1 / 4),
        K.RandomAffine(30.0, p=1 / 4),
        K.RandomAffine(0.0, shear=(-25.0, 25.0, -25.0, 25.0), p=1 / 4),
    ]
    erase = [K.RandomErasing((0.0025, 0.04), (1.0, 1.0), p=0.5) for _ in range(4)]
    resized = K.RandomAffine(0.0, scale=(0.75, 1.25), p=1.0)
    return K.AugmentationSequential(
        resized, K.RandomHorizontalFlip(p=0.5), *color, *geometric, *erase, data_keys=["input"]
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (BATCH, 3, 30, 40)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).byte()
    strong = ViewConfig(short_side=(360, 600), color=True, geometric=True, erase=True)
    config = AugmentConfig(strong=strong).at_size(None)
    theirs = kornia_pipeline()

    def ours_once(i: int) -> None:
        samples = [Sample(image=x, image_id=n, row=i, slot=n) for n, x in enumerate(smooth)]
        make_views(samples, config, 0, "strong", "cpu")

    def theirs_once(i: int) -> None:
        torch.manual_seed(i)
        theirs(smooth.float() / 255)

    times: dict[str, list[float]] = {"pais_ray": [], "kornia": []}
    for i in range(-2, ROUNDS):
        for name, run in (("pais_ray", ours_once), ("kornia", theirs_once)):
            start = time.perf_counter()
            run(i)
            if i >= 0:  # the first two rounds are a warm-up
                times[name].append(1e3 * (time.perf_counter() - start) / BATCH)
    for name, values in times.items():
        spread = f"min {min(values):.1f}, max {max(values):.1f}"
        print(f"{name:>9}: {statistics.median(values):6.1f} ms per image ({spread})")
    ratio = statistics.median(times["pais_ray"]) / statistics.median(times["kornia"])
    print(f"    ratio: {ratio:.2f} (of mean: {sum(times['pais_ray']) / sum(times['kornia']):.2f})")


if __name__ == "__main__":
    main()
