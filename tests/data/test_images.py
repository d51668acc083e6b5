"""Decoding: the same upright 8-bit RGB image for every encoding; broken files are refused by name."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pais_ray.data.images.images import decode, upright_size
from pais_ray.data.validation import rules
from pais_ray.data.validation.rules import DataError

BASES = {"000000111076.jpg": "base_landscape.jpg", "000000168974.jpg": "base_portrait.jpg"}
# measured: at most 2.7 of 255 (JPEG, palette); mirrored or rotated images differ by 42 to 72
CLOSE = 4.0


def picture(height=20, width=30) -> np.ndarray:
    """An image without any symmetry."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([xs * 8, ys * 12, (xs + ys) * 4], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_encoding_decodes_to_its_base_image(image_sets):
    folder = image_sets / "encoding_variants"
    for entry in json.loads((folder / "annotations" / "instances_all.json").read_text())["images"]:
        name = entry["file_name"]
        data = (folder / "images" / name).read_bytes()
        got = decode(data, name)
        assert got.shape == (entry["height"], entry["width"], 3), name
        assert got.dtype == np.uint8
        assert got.flags.writeable
        assert upright_size(data) == upright_size(folder / "images" / name) == got.shape[:2], name
        base = decode((folder / "images" / BASES[entry["source_file"]]).read_bytes(), "base")
        if "gray" in name:
            base = np.asarray(Image.fromarray(base).convert("L"))[:, :, None]
        assert np.abs(got.astype(int) - base.astype(int)).mean() < CLOSE, name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("truncated.jpg", "image-decodes"),
        ("zero_bytes.jpg", "image-empty"),
        ("not_an_image.jpg", "image-format"),
    ],
)
def test_broken_files_are_refused_with_rule_and_remedy(image_sets, name, rule):
    data = (image_sets / "encoding_variants" / "broken" / name).read_bytes()
    with pytest.raises(ValueError, match=rf"batch 7, {name}: .*; .*remove it \[{rule}\]"):
        decode(data, f"batch 7, {name}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation):
    upright = picture()
    undo = {1: [], 2: [np.fliplr], 3: [np.rot90] * 2, 4: [np.flipud], 5: [np.rot90, np.flipud]}
    undo |= {6: [np.rot90] * 3, 7: [np.rot90, np.fliplr], 8: [np.rot90]}  # EXIF 2.3: operations that make it upright
    stored = upright
    for step in reversed(undo[orientation]):
        stored = np.rot90(stored, -1) if step is np.rot90 else step(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert upright_size(data) == upright.shape[:2]
    assert np.abs(decode(data, "x").astype(int) - upright).mean() < 3


def test_the_orientation_of_tiff_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.ascontiguousarray(np.rot90(picture()))), "TIFF", exif=exif)
    assert upright_size(data) == (20, 30)
    assert (decode(data, "x") == picture()).all()


def test_broken_exif_data_are_ignored():
    data = encoded(Image.fromarray(picture()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (decode(data, "x") == picture()).all()


def test_alpha_is_dropped_not_composited():
    alpha = np.zeros((20, 30, 1), np.uint8)
    assert (decode(encoded(Image.fromarray(np.concatenate([picture(), alpha], 2))), "x") == picture()).all()
    gray = picture()[:, :, :1]
    got = decode(encoded(Image.fromarray(np.concatenate([gray, alpha], 2), "LA")), "x")
    assert (got == gray).all()


def test_palette_with_transparency_keeps_its_colors():
    image = Image.fromarray(picture()).quantize(16)
    plain = np.asarray(image.convert("RGB"))
    for transparency in (3, bytes(range(0, 160, 10))):
        assert (decode(encoded(image, transparency=transparency), "x") == plain).all()


def test_16_bit_images_are_scaled_by_their_full_range():
    values = np.array([[0, 257, 32896, 65535], [128, 129, 300, 40000]], np.uint16)
    got = decode(encoded(Image.fromarray(values)), "x")
    assert (got == np.rint(values / 257).astype(np.uint8)[:, :, None]).all()
    assert (decode(encoded(Image.fromarray(values), "TIFF"), "x") == got).all()


def test_floating_point_images_are_refused():
    with pytest.raises(DataError, match="image-mode"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "x")


@pytest.mark.parametrize("side", [9500, 20000, 60000])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    """Pillow warns about the first and refuses the second; all break the same rule before a pixel is decoded."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert side * side > rules.MAX_PIXELS
    for call in (lambda: decode(data, "bomb"), lambda: upright_size(data, "bomb")):
        for mode in ("error", "ignore"):  # "ignore" is the behavior outside of tests
            with warnings.catch_warnings():
                warnings.simplefilter(mode)
                with pytest.raises(DataError, match=r"bomb: .*image-pixels"):
                    call()


def test_truncated_files_are_refused_by_name():
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(Image.fromarray(picture(200, 150)), kind)
        for part in (1, 10, 40, len(data) // 2):
            with pytest.raises(DataError, match="cut"):
                decode(data[:part], "cut")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: .*image-missing"):
        upright_size(tmp_path / "gone.jpg")


def test_formats_that_start_programs_are_refused():
    with pytest.raises(DataError, match="image-format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "x")
