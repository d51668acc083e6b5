"""Decode images of any encoding to upright 8-bit RGB. Torch-free."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image

from pais_ray.data.validation.rules import MAX_PIXELS, DataError, Limits
from pais_ray.data.validation.values import check_size
from pais_ray.files.storage import StorageError

__all__ = ["MAX_PIXELS", "decode", "decode_values", "upright_size"]

# Pillow supports more formats; some of them start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# EXIF orientation -> operation that makes the stored image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)  # orientations with width and height exchanged
_ORIENTATION = 0x0112


def decode(data: bytes, place: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, upright.

    The alpha channel is dropped and not composited: the colors below it belong to the photograph. 16-bit gray is scaled
    by its full range (65535 -> 255), not by its content. The first of several frames is used. Raises DataError (a
    ValueError) that names ``place``, the rule and the remedy.
    """
    with _opened(io.BytesIO(data), place, max_pixels) as image:
        orientation = _orientation(image)  # before load(), as in upright_size, which reads the header only
        image.load()
        image.info.pop("transparency", None)  # otherwise Pillow blends or warns when it converts to RGB
        if image.mode.startswith("I"):
            # 16-bit gray of PNG and TIFF has mode "I;16" or similar; from older encoders "I" (16 of 32 bits used)
            gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise DataError("image-mode", place, "expected 8 or 16 bits per channel, got floating point")
        image = image.convert("RGB")
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return np.array(image)


def decode_values(data: bytes, place: str) -> np.ndarray:
    """The stored values (H, W) of an image with one channel: uint8 for 8 bits, a wider type for 16 bits.

    For label images, whose values are ids and not brightness. Raises DataError.
    """
    with _opened(io.BytesIO(data), place, MAX_PIXELS) as image:
        image.load()
        if image.mode in ("1", "L", "P"):
            return np.array(image, dtype=np.uint8)
        if image.mode.startswith("I"):
            return np.array(image)
        remedy = "use a label image, not a color image"
        raise DataError("image-mode", place, f"expected one channel of 8 or 16 bits, got mode {image.mode}", remedy)


def upright_size(
    source: bytes | IO[bytes] | str | os.PathLike[str], place: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(height, width) of the upright image, from its header only. ``source`` is bytes, an open file or a path.

    Raises DataError.
    """
    if not isinstance(source, str | os.PathLike):
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with _opened(opened, place or "image", max_pixels) as image:
            return _size(image)
    name = place or os.fspath(source)
    try:
        file = open(source, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError("image-missing", name, f"expected an image file, got {error.strerror}") from error
    with file, _opened(file, name, max_pixels) as image:
        return _size(image)


def _size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in _TRANSPOSED else (height, width)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 from the header. Pillow applies the orientation of TIFF itself. ``getexif`` is not used
    because it decodes the whole image if it is a PNG."""
    if not image.info.get("exif"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # broken metadata of a valid image: Pillow raises various exceptions
        return 1


@contextmanager
def _opened(file: IO[bytes], place: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and check its size. Any error in the block is raised as DataError."""
    if not file.read(1):
        raise DataError("image-empty", place, "expected an image, got 0 bytes")
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(image.height, image.width, place, Limits(max_pixels=max_pixels))
            yield image
    except (DataError, StorageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image-pixels", place, str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise DataError("image-format", place, f"expected one of {', '.join(FORMATS)}, got none of them") from error
    except Exception as error:  # for broken files, Pillow raises various exceptions
        message = f"the image does not decode ({type(error).__name__}: {error})"
        raise DataError("image-decodes", place, message) from error
