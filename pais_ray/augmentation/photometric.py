"""Photometric augmentation of labeled images after decoding, with albumentations.

The geometry of the image does not change, so boxes and masks stay valid.
"""

import os
from dataclasses import dataclass
from typing import Literal

# On import, albumentations checks the network for a newer version; a training run must not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np

Preset = Literal["cityscapes"]


@dataclass(frozen=True)
class Photometric:
    """A preset of photometric operations, applied with a seed. Raises ValueError if there is no such preset.

    Safe to share between threads: transforms of albumentations have a random state, so each call builds new ones.
    """

    preset: Preset

    def __post_init__(self) -> None:
        if self.preset != "cityscapes":
            raise ValueError(f"views.photometric: expected 'cityscapes' or null, got {self.preset!r}")

    def apply(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Augment an image (H, W, 3) uint8 RGB. The same ``seed`` (>= 0) gives the same result. Raises ValueError."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Photometric.apply: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        # albumentations accepts seeds below 2**32
        pipeline = A.Compose([_cityscapes()], seed=seed % 2**32)
        return pipeline(image=image)["image"]


def _cityscapes() -> A.OneOf:
    """Method 3, "labeled, Cityscapes": one of seven operations with probability 7/8, weighted by their ``p``.

    Parameters are translated to the current albumentations: in the version of the released code, a Gaussian kernel of
    3..7 px had a sigma of .8 to 1.4 (OpenCV's rule), and the noise had a variance of 0..12.75 levels^2, which is now a
    standard deviation in [0, 1].
    """
    return A.OneOf(
        [
            A.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4), p=0.5),
            A.Blur(blur_limit=(3, 7), p=0.5),  # released code: 2..7; kernel sizes are odd, so the smallest was 3
            A.Sharpen(alpha=(0.2, 0.5), lightness=(0.5, 1.0), p=0.5),
            A.GaussNoise(std_range=(0.0, 12.75**0.5 / 255), p=0.5),
            A.InvertImg(p=0.05),
            A.MultiplicativeNoise(multiplier=(0.5, 1.5), p=0.5),
            A.RandomBrightnessContrast(brightness_limit=(0.1, 0.3), contrast_limit=(0.1, 0.3), p=0.5),
        ],
        p=7 / 8,
    )
