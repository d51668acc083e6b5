"""Grids, captions and files of images."""

import numpy as np
import pytest
from PIL import Image

from pais_ray.figures import canvas
from pais_ray.files import atomic

GRAY = np.full((96, 128, 3), 128, dtype=np.uint8)


def test_a_grid_places_images_row_by_row():
    images = [np.full((10 + i, 20, 3), i, dtype=np.uint8) for i in range(5)]
    image = canvas.grid(images, columns=2, gap=3)
    assert image.shape == (11 + 13 + 14 + 6, 43, 3)
    for (y, x), value in {(0, 0): 0, (0, 23): 1, (14, 0): 2, (14, 23): 3, (30, 0): 4}.items():
        part = image[y : y + 10 + value, x : x + 20]
        assert (part == value).all(), (y, x)
    rest = np.ones(image.shape[:2], bool)
    for (y, x), value in {(0, 0): 0, (0, 23): 1, (14, 0): 2, (14, 23): 3, (30, 0): 4}.items():
        rest[y : y + 10 + value, x : x + 20] = False
    assert (image[rest] == 255).all()


def test_a_grid_without_images_is_white():
    assert (canvas.grid([], 2) == 255).all()


def test_a_caption_is_above_the_image():
    captioned = canvas.add_caption(GRAY, "weak view: 3 kept")
    assert captioned.shape == (96 + canvas.CAPTION_HEIGHT, 128, 3)
    assert (captioned[canvas.CAPTION_HEIGHT :] == GRAY).all()
    strip = captioned[: canvas.CAPTION_HEIGHT]
    assert (strip[0] == 255).all()
    assert (strip < 100).any(), "the text is black on white"


@pytest.mark.parametrize(("name", "kind", "tolerance"), [("a.png", "PNG", 0), ("a.jpg", "JPEG", 8)])
def test_the_suffix_gives_the_format(tmp_path, name, kind, tolerance):
    gradient = np.tile(np.arange(128, dtype=np.uint8)[:, None], (96, 1, 3))
    canvas.save(gradient, tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.format == kind
        assert np.abs(np.asarray(file).astype(int) - gradient).max() <= tolerance


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "figures" / "a.png"
    canvas.save(GRAY, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        canvas.save(np.zeros_like(GRAY), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
