"""Photometric presets of the labeled stream at decode time: the one place that speaks to albumentations.

The pictures keep their geometry, so masks and boxes are not concerned.
"""

import os
from dataclasses import dataclass
from typing import Literal

# albumentations asks the network for a newer version of itself on import; no training run should.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np

Preset = Literal["cityscapes"]


@dataclass(frozen=True)
class Photometric:
    """A named list of photometric operations, applied with a seed.

    Threads may share it: albumentations keeps random state in its transforms, so each call builds its own.
    """

    preset: Preset

    def __post_init__(self) -> None:
        if self.preset != "cityscapes":
            raise ValueError(f"views.photometric: no preset named {self.preset!r}; expected 'cityscapes' or nothing")

    def apply(self, image: np.ndarray, seed: int) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB with what ``seed`` (an integer >= 0) draws: same seed, same."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Photometric.apply: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        # albumentations takes seeds below 2**32.
        pipeline = A.Compose([_cityscapes()], seed=seed % 2**32)
        return pipeline(image=image)["image"]


def _cityscapes() -> A.OneOf:
    """Method 3, "labeled, Cityscapes": one of seven with probability 7/8, weighted by their own ``p``.

    Written for today's albumentations: a Gaussian kernel of 3..7 px had sigma .8 to 1.4 (OpenCV's rule) when
    the paper's code was made; the noise's variance of 0..12.75 levels^2 is now a deviation in [0, 1].
    """
    return A.OneOf(
        [
            A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4), p=0.5),
            A.Blur(blur_limit=(3, 7), p=0.5),  # "2..7": kernels are odd, 3 was the least
            A.Sharpen(alpha=(0.2, 0.5), lightness=(0.5, 1.0), p=0.5),
            A.GaussNoise(std_range=(0.0, 12.75**0.5 / 255), p=0.5),
            A.InvertImg(p=0.05),
            A.MultiplicativeNoise(multiplier=(0.5, 1.5), p=0.5),
            A.RandomBrightnessContrast(brightness_limit=(0.1, 0.3), contrast_limit=(0.1, 0.3), p=0.5),
        ],
        p=7 / 8,
    )
