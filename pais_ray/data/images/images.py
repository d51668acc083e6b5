"""Encoded bytes -> upright 8-bit RGB pictures, whatever the encoding. Torch-free."""

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

# Pillow knows many more, among them some that start other programs (EPS); pictures of data sets are these.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# EXIF orientation -> what makes the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # width and height change places
_ORIENTATION = 0x0112


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Picture (H, W, 3) uint8 RGB, upright, of an encoded image.

    Alpha is dropped, not composited: the colors under it are the photograph. 16-bit gray is scaled by its
    full range (65535 -> 255), not stretched to its content. Of several frames the first is taken.
    Raises DataError (a ValueError) that names ``where``, the rule and the remedy.
    """
    with _opened(io.BytesIO(data), where, max_pixels) as image:
        orientation = _orientation(image)  # before load(): upright_size knows the header only
        image.load()
        image.info.pop("transparency", None)  # else Pillow mixes or warns on the way to RGB
        if image.mode.startswith("I"):
            # PNG and TIFF 16-bit gray come as "I;16" and kin, from older encoders as "I" (32 bits, 16 used)
            gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise DataError("image-mode", where, "expected 8 or 16 bits a channel, got floating point")
        image = image.convert("RGB")
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return np.array(image)


def decode_values(data: bytes, where: str) -> np.ndarray:
    """Values (H, W) of an encoded picture with one channel, as they are stored: uint8 of 8 bits, wider of 16.

    For label images, where a value is a name and not a brightness. Raises DataError.
    """
    with _opened(io.BytesIO(data), where, MAX_PIXELS) as image:
        image.load()
        if image.mode in ("1", "L", "P"):
            return np.array(image, dtype=np.uint8)
        if image.mode.startswith("I"):
            return np.array(image)
        remedy = "give an image of labels, not of colors"
        raise DataError("image-mode", where, f"expected one channel of 8 or 16 bits, got mode {image.mode}", remedy)


def upright_size(
    source: bytes | IO[bytes] | str | os.PathLike[str], where: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header only; ``source`` is bytes, an open file or a path."""
    if not isinstance(source, str | os.PathLike):
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with _opened(opened, where or "image", max_pixels) as image:
            return _size(image)
    name = where or os.fspath(source)
    try:
        file = open(source, "rb")  # noqa: SIM115  closed below; here only its absence is of interest
    except OSError as error:
        raise DataError("image-missing", name, f"expected an image file, got {error.strerror}") from error
    with file, _opened(file, name, max_pixels) as image:
        return _size(image)


def _size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in _TURNED else (height, width)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 as the header has it. TIFF keeps its own elsewhere and Pillow applies that; PNG's
    ``getexif`` would decode the whole picture to look for one."""
    if not image.info.get("exif"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # broken metadata of a sound picture: Pillow raises what its parser meets
        return 1


@contextmanager
def _opened(file: IO[bytes], where: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size checked; whatever goes wrong inside ends in a DataError."""
    if not file.read(1):
        raise DataError("image-empty", where, "expected an image, got 0 bytes")
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(image.height, image.width, where, Limits(max_pixels=max_pixels))
            yield image
    except (DataError, StorageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image-pixels", where, str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise DataError("image-format", where, f"expected one of {', '.join(FORMATS)}, got none of them") from error
    except Exception as error:  # on broken files Pillow raises whatever its parsers meet
        message = f"the image does not decode ({type(error).__name__}: {error})"
        raise DataError("image-decodes", where, message) from error
