"""`pais-ray validate`: usage, limits, and the resources that malformed files can take."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.validation.entries import parsed_bytes
from pais_ray.data.validation.rules import DataError, Limits
from tests.support.malformed import (
    CORPUS,
    H,
    W,
    annotation,
    call,
    tree,
    written,
)

ROOT = Path(__file__).resolve().parents[2]


def test_wrong_usage_is_exit_code_2(folder):
    path = written(folder, tree())
    for arguments in (
        [],
        ["--annotations", folder / "none.json"],
        ["--annotations", folder],
        ["--annotations", path, "--images", folder / "none"],
        ["--annotations", path, "--images", path],
        ["--annotations", path, "coco"],
        ["--annotations", path, "--frobnicate"],
        ["--annotations", path, "--max-pixels", 0],
        ["--annotations", path, "--max-pixels", 10**10],
        ["--annotations", path, "--fix", path],
        ["--images", folder],
        ["quickstart"],
        ["data.train=nowhere.json", "data.val=nowhere.json", "data.images=."],
        ["data.max_pixels=many"],
        ["coco", "--fix", folder / "copy.json"],
    ):
        done = call(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert "Traceback" not in done.output
    (folder / "link.json").symlink_to(path)
    assert call("--annotations", path, "--fix", folder / "link.json").exit_code == 2
    assert call("--annotations", path, "--json", folder / "link.json").exit_code == 2
    assert call("--annotations", path, "--json", path / "out.json").exit_code == 2
    assert call("--annotations", path, "--json", folder / "a.json", "--fix", folder / "a.json").exit_code == 2
    assert json.loads(path.read_text()) == tree()


@pytest.mark.parametrize("option", ["--json", "--fix"])
@pytest.mark.parametrize("name", ["x" * 300, "set.json/x.json"])
def test_an_output_that_cannot_be_written_is_wrong_usage(folder, option, name):
    path = written(folder, tree()).rename(folder / "set.json")
    done = call("--annotations", path, option, folder / name)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize("option", ["--json", "--fix"])
def test_no_output_name_overwrites_the_source(folder, option):
    """A source named OUT.part, like a temporary file, is unchanged after OUT was written."""
    path, out = written(folder, tree()).rename(folder / "out.json.part"), folder / "out.json"
    before = path.read_bytes()
    out.write_text("older")
    (folder / "link.json").symlink_to(out)
    assert call("--annotations", path, option, folder / "link.json").exit_code == 0
    assert path.read_bytes() == before
    assert (folder / "link.json").is_symlink()
    assert out.read_text() != "older"
    assert out.stat().st_mode == path.stat().st_mode, "as the umask has it"
    assert not [file.name for file in folder.iterdir() if file.name.endswith(".partial")]


def test_a_pipe_is_written_to(folder):
    (folder / "null.json").symlink_to("/dev/null")
    assert call("--annotations", written(folder, tree()), "--json", folder / "null.json").exit_code == 0
    assert (folder / "null.json").is_char_device()


@pytest.mark.parametrize(
    ("flag", "setting", "value", "rule"),
    [
        ("--max-pixels", "max_pixels", H * W - 1, "image-pixels"),
        ("--max-instances", "max_instances", 1, "image-instances"),
        ("--max-json-gib", "max_json_gib", 1e-6, "file-size"),
    ],
)
def test_messages_name_the_setting_of_a_limit(folder, flag, setting, value, rule):
    path, out = written(folder, tree()), folder / "out.json"
    assert call("--annotations", path, flag, value, "--json", out).exit_code == 1
    found = json.loads(out.read_text())["findings"]
    assert {finding["rule"] for finding in found} >= {rule}
    finding = next(f for f in found if f["rule"] == rule)
    assert f"{setting} = " in finding["message"]
    assert flag in finding["remedy"]
    assert f"data.{setting}" in finding["remedy"]
    with pytest.raises(DataError, match=rule):
        read_coco(str(path), str(folder), Limits(**{setting: value}))
    words = [f"data.train={path}", f"data.val={path}", f"data.images={folder}", f"data.{setting}={value:.7f}"]
    if setting != "max_json_gib":
        words[-1] = f"data.{setting}={value}"
    done = CliRunner().invoke(main, ["train", "quickstart", *words, f"run.storage_path={folder / 'runs'}"])
    assert done.exit_code == 2
    assert f"[{rule}]" in done.output


def limited(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `validate` in a process limited to 2 GiB of address space and half a minute."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
    code += "from pais_ray.cli import main; main(['validate', *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "--annotations", str(path), *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize(
    "name",
    [
        "valid",
        "polygon far out",
        "polygon with NaN",
        "polygon that zigzags",
        "RLE bomb",
        "RLE too long",
        "nested deeply",
    ],
)
def test_decompression_bombs_stay_within_two_gib(folder, name):
    content, rule = CORPUS[name]
    done = limited(written(folder, content), "--json", folder / "out.json", "--fix", folder / "copy.json")
    assert done.returncode == (1 if rule else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert rule in done.stdout


def test_a_large_file_is_refused_by_size_and_a_memory_error_names_the_file(folder):
    path = folder / "huge.json"
    with path.open("wb") as file:
        file.truncate(9 << 30)  # a sparse file
    done = limited(path)
    assert (done.returncode, "file-size" in done.stdout) == (1, True), done.stderr
    path.write_bytes(b'{"images":[' + b'{"":0},' * 12_000_000 + b"{}]}")  # 84 MB that become 3 GiB
    done = limited(path)
    assert (done.returncode, "file-size" in done.stdout) == (1, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "unit",
    [
        b"{}",
        b'{"":0}',
        b'{"a":{"b":1}}',
        b"[]",
        b"[[]]",
        b"1.5",
        b"300",
        b'"ab"',
        b'"\xf0\x9f\x90\xb1"',
        b"[1.5,2.5,3.5]",
        None,
    ],
)
def test_the_memory_estimate_is_an_upper_bound(unit):
    count = 50_000
    data = b"[" + b",".join([unit] * count) + b"]" if unit else json.dumps({str(i): i for i in range(count)}).encode()
    tracemalloc.start()
    parsed = json.loads(data)
    taken = tracemalloc.get_traced_memory()[1] + len(data)
    tracemalloc.stop()
    assert len(parsed) == count
    assert taken <= parsed_bytes(data) <= 8 * taken


def test_long_thin_images_do_not_avoid_the_limit_of_an_outline(folder):
    """In an image of one row, coordinates can be hundreds of millions of pixels."""
    wide = 50_000_000
    content = annotation(segmentation=[[0, 0, 9 * wide, 0, 9 * wide, 1, 0, 1]])
    content["images"][0] |= {"height": 1, "width": wide}
    done = limited(written(folder, content))
    assert done.returncode == 1
    assert "polygon-outline" in done.stdout


def test_a_file_without_read_permission_is_a_data_error(folder):
    pipe = folder / "pipe.json"
    os.mkfifo(pipe)
    done = call("--annotations", pipe)
    assert done.exit_code == 1
    assert "file-read" in done.output
