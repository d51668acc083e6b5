"""Fuzzing of validation: hundreds of mutated files in the tests, and for MINUTES in `make fuzz`.

Each example is a valid COCO file, generated or a piece of a real one, with changed values, keys, entries or bytes.
Requirements: exit code 0 or 1, a report and no exception; reading raises exactly for the errors of the report; the
repaired copy has no error. `make fuzz` limits the process to 4 GiB of address space and an example to 60 seconds.
"""

import copy
import faulthandler
import json
import os
import resource
import time
from pathlib import Path

import hypothesis.strategies as st
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from pais_ray.cli import main
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.inspect import inspect_coco
from pais_ray.data.validation.report import Part, examine
from pais_ray.data.validation.rules import LIMITS, RULES, DataError, severity
from tests.conftest import IMAGE_SETS, SHARED
from tests.support.malformed import tree

MINUTES = float(os.environ.get("MINUTES", "0"))
COMMITTED = {"coco": "instances_val", "nuclei": "instances_val", "encoding_variants": "instances_all"}
LARGER = {
    "coco_quick": "instances_all",
    "coco2017_mini": "instances_val",
    "nuts3_quick": "instances_val",
    "dsb2018_nuclei": "instances_val",
    "microcontrollers5": "instances_val",
}


def piece(path: Path) -> dict:
    """The smallest images of a real file with their annotations, images with crowds first."""
    content = json.loads(path.read_text())
    crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    images = sorted(content["images"], key=lambda image: (image["id"] not in crowds, image["height"] * image["width"]))
    content["images"] = images[:3]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids][:12]
    used = {a["category_id"] for a in content["annotations"]}
    content["categories"] = [c for c in content["categories"] if c["id"] in used]
    return content


def seeds() -> list[dict]:
    """A generated file, pieces of the committed data sets, and of the larger ones if they exist."""
    paths = [IMAGE_SETS / name / "annotations" / f"{part}.json" for name, part in COMMITTED.items()]
    larger = [SHARED / name / "annotations" / f"{part}.json" for name, part in LARGER.items()]
    return [tree(), *(piece(path) for path in [*paths, *(path for path in larger if path.is_file())])]


numbers = st.one_of(
    st.integers(-3, 700),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 10**9, 10**400, 1e9, 1e15, 1e308, -1e308, 0.5, -0.0]),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), True, False]),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.one_of(
    st.text(max_size=8), st.text("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmno", max_size=30)
)
junk = st.recursive(
    st.one_of(st.none(), numbers, texts, st.sampled_from(["../x", "/etc/passwd", "http://x/y", "\ud800", "0.png\0"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=8),
        st.dictionaries(st.one_of(texts, st.sampled_from(["size", "counts", "id", "bbox"])), inner, max_size=4),
        st.fixed_dictionaries({"size": st.lists(numbers, min_size=2, max_size=2), "counts": inner}),
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The bytes of a file with up to four changes."""
    content = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        mutate(draw, content)
    data = json.dumps(content).encode()
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "byte", "insert"]))
    if kind == "whole":
        return data
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:place]
    middle = draw(st.binary(min_size=1, max_size=6))
    return data[:place] + middle + data[place + (kind == "byte") :]


def mutate(draw: st.DrawFn, content: dict) -> None:
    """Changes one value in the tree: replaces, removes, duplicates or swaps it."""
    parent: dict | list = content
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return
        if parent is content:  # mostly the lists of COCO
            keys = [
                key for key in ("annotations", "annotations", "annotations", "images", "categories") if key in parent
            ] or keys
        key = draw(st.sampled_from(keys))
        child = parent[key]
        if not isinstance(child, dict | list) or not draw(st.integers(0, 5)):
            break
        parent = child
    action = draw(st.sampled_from(["junk", "junk", "near", "remove", "double", "swap"]))
    if action == "near" and isinstance(child, int | float) and -1e300 < child < 1e300:
        parent[key] = child + draw(st.sampled_from([-1, 1, 0.5, 1e-9, 1000, -1000]))
    elif action == "near" and isinstance(child, str) and child:
        place = draw(st.integers(0, len(child) - 1))
        parent[key] = child[:place] + draw(st.text(max_size=2)) + child[place + 1 :]
    elif action == "remove":
        del parent[key]
    elif action == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(child))
    elif action == "swap":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else list(range(len(parent)))))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = draw(junk)


SEEDS = seeds()


def check_requirements(folder: Path, data: bytes) -> None:
    path, out, copied = folder / "set.json", folder / "out.json", folder / "copy.json"
    path.write_bytes(data)
    copied.unlink(missing_ok=True)
    done = CliRunner().invoke(main, ["validate", "--annotations", str(path), "--json", str(out), "--fix", str(copied)])
    assert isinstance(done.exception, SystemExit | None), done.exception
    found = json.loads(out.read_text())
    assert done.exit_code == (1 if found["errors"] else 0)
    errors = {finding["rule"] for finding in found["findings"] if finding["severity"] == "error"}
    assert errors <= set(RULES)
    assert all(finding["severity"] == severity(finding["rule"]) for finding in found["findings"])
    whole = Report()  # the first report does not check image files
    inspect_coco(str(path), str(folder), LIMITS, whole)
    errors = {finding.rule for finding in whole.findings if severity(finding.rule) == "error"}
    refused = None
    try:
        read_coco(str(path), str(folder))
    except DataError as error:
        refused = error.rule
    assert refused in errors if errors else refused is None
    if copied.exists():
        again = examine([Part(name="file", annotations=str(copied), images=None)])
        assert again.number("error") == 0, again.table()
    else:
        assert "not repaired" in done.output
    assert path.read_bytes() == data


def test_mutated_files_give_findings(tmp_path):
    path_names = {image["file_name"] for seed in SEEDS for image in seed["images"]}
    for name in path_names:  # reading requires the files and does not open them
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def example(data: bytes) -> None:
        if MINUTES:
            faulthandler.dump_traceback_later(60, exit=True)
        check_requirements(tmp_path, data)

    limits = settings(
        max_examples=1000 if MINUTES else 300, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    examples, start = 0, time.monotonic()
    if MINUTES:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        limits(given(mutated())(example))()
        examples += limits.max_examples
        if time.monotonic() - start >= 60 * MINUTES:
            break
    faulthandler.cancel_dump_traceback_later()
    print(f"{examples} mutated files in {time.monotonic() - start:.0f} s, all handled")


def test_the_pieces_of_real_files_are_valid(tmp_path):
    assert len(SEEDS) > len(COMMITTED)
    for seed in SEEDS:
        (tmp_path / "set.json").write_text(json.dumps(seed))
        report = examine([Part(name="file", annotations=str(tmp_path / "set.json"), images=None)])
        assert report.number("error") == 0, report.table()
        assert report.annotations >= 3
