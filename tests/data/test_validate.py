"""`pais-ray validate`: every malformed file gives its rule and exit code, in the report and when it is read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.rle import encode_masks
from pais_ray.data.validation.report import Part, examine
from pais_ray.data.validation.rules import RULES, WARNINGS, DataError, severity
from tests.support.malformed import (
    AREA,
    CORPUS,
    NAN,
    NO_RULE,
    SQUARE,
    H,
    W,
    annotation,
    call,
    rules,
    same_name,
    tree,
    written,
)

ROOT = Path(__file__).resolve().parents[2]
CORPUS_FILE = ROOT / "tests" / "support" / "malformed.py"


def test_the_corpus_is_large():
    assert sum(rule != NO_RULE for _, rule in CORPUS.values()) >= 100


@pytest.mark.parametrize("name", CORPUS)
def test_each_malformed_file_gives_its_rule_and_exit_code(folder, name):
    content, rule = CORPUS[name]
    path, out = written(folder, content), folder / "out.json"
    done = call("--annotations", path, "--json", out)
    assert done.exit_code == (1 if rule and severity(rule) == "error" else 0), done.output
    assert isinstance(done.exception, SystemExit | None)
    found = json.loads(out.read_text())
    assert rule in rules(out) if rule else rules(out) == []
    assert found["errors"] + found["warnings"] == len(found["findings"]) == sum(found["counts"].values())
    for finding in found["findings"]:
        assert set(finding) == {"rule", "severity", "where", "message", "remedy"}
        assert finding["severity"] == severity(finding["rule"])
        assert str(path) in finding["where"]
        assert all(finding.values())
        assert len(json.dumps(finding)) < 1500, "messages are short for any content"
    assert all(name in done.output for name in set(rules(out)))
    assert found["errors"] == done.output.count("error   ") or found["errors"] > 1


@pytest.mark.parametrize("name", CORPUS)
def test_reading_raises_exactly_for_errors_of_the_report(folder, name):
    path = written(folder, CORPUS[name][0])
    report = examine([Part(name="file", annotations=str(path), images=None)])
    errors = {finding.rule for finding in report.findings if severity(finding.rule) == "error"}
    if errors:
        with pytest.raises(DataError) as caught:
            read_coco(str(path), str(folder))
        assert caught.value.rule in errors
    else:
        read_coco(str(path), str(folder))


@pytest.mark.parametrize("name", CORPUS)
def test_the_repaired_copy_has_no_error_and_the_source_is_unchanged(folder, name):
    content, rule = CORPUS[name]
    path, copied, out = written(folder, content), folder / "copy.json", folder / "out.json"
    before = path.read_bytes()
    done = call("--annotations", path, "--json", out, "--fix", copied)
    assert isinstance(done.exception, SystemExit | None)
    assert path.read_bytes() == before
    changes = json.loads(out.read_text())["changes"]
    if not copied.exists():
        assert "not repaired" in done.output
        assert rule in ("file-json", "key-missing", "key-type", "id-type")
        return
    assert call("--annotations", copied).exit_code == 0
    if rule == NO_RULE:
        assert changes == []
        assert json.loads(copied.read_text()) == json.loads(
            json.dumps(content) if isinstance(content, dict) else content
        )
    if rule and severity(rule) == "error":
        assert changes
        assert all(set(change) == {"where", "rule", "change"} for change in changes)


def test_repaired_values(folder):
    """Each recomputed value, compared with manually computed numbers."""
    square = tree()["annotations"][0]
    broken = same_name(used=True)
    broken["annotations"] = [
        square | {"id": 5, "bbox": ["10", "10", "20", "15"], "area": 999, "category_id": 3},
        square | {"id": 5, "bbox": [-4, 8, 36, 17], "iscrowd": "0"},
        square | {"id": "x", "bbox": [200, 200, 1, 1], "segmentation": [SQUARE, [1, 2], [NAN, *SQUARE, 3]]},
        square | {"id": 7, "iscrowd": 1},
        square | {"id": 8, "bbox": [10, 10, 0, 4], "area": 4, "segmentation": [[10, 10, 11, 10, 11, 14, 10, 14]]},
        square | {"id": 9, "bbox": [0, 0, 5, 5], "area": None},
        square | {"id": 10, "segmentation": [[NAN] * 6]},
        square | {"id": 11, "segmentation": []},
        square | {"id": 12, "image_id": 5},
    ]
    copied, out = folder / "copy.json", folder / "out.json"
    assert call("--annotations", written(folder, broken), "--fix", copied, "--json", out).exit_code == 1
    repaired = json.loads(copied.read_text())
    assert repaired["info"] == {"year": 2024}
    assert repaired["categories"] == [{"id": 1, "name": "cat"}]
    assert [e["id"] for e in repaired["annotations"]] == [5, 12 + 1, 12 + 2, 7, 8, 9]
    assert {e["category_id"] for e in repaired["annotations"]} == {1}
    assert [e["bbox"] for e in repaired["annotations"]] == [
        [10, 10, 20, 15],
        [0, 8, 32, 17],
        [10, 10, 20, 15],
        [10, 10, 20, 15],
        [10, 10, 1, 4],
        [10, 10, 20, 15],
    ]
    assert [e["area"] for e in repaired["annotations"]] == [AREA, AREA, AREA, AREA, 4, None]
    assert [e["iscrowd"] for e in repaired["annotations"]] == [0, 0, 0, 1, 0, 0]
    assert repaired["annotations"][2]["segmentation"] == [SQUARE]
    mask = np.zeros((1, H, W), bool)
    mask[:, 10:25, 10:30] = True
    assert repaired["annotations"][3]["segmentation"] == {"size": [H, W], "counts": encode_masks(mask)[0].decode()}
    removed = [change["where"] for change in json.loads(out.read_text())["changes"] if change["change"] == "removed"]
    assert [re.search(r"annotation (\d+)", where)[1] for where in removed] == ["12", "10", "11"]


def test_all_faults_of_a_file_are_found(folder):
    broken = annotation(bbox=[1, 2, 3], iscrowd=7, segmentation=[[1, 2]], area="x", category_id=4)
    broken["images"][1]["height"] = "40"
    broken["annotations"][2]["bbox"] = [0, 0, 500, 500]
    path, out = written(folder, broken), folder / "out.json"
    assert call("--annotations", path, "--json", out).exit_code == 1
    expected = ["area-type", "box-type", "crowd-flag", "id-unknown", "image-size", "polygon-length"]
    assert sorted(rules(out)) == expected


def test_the_table_shows_the_first_examples_and_counts_the_rest(folder):
    broken = tree()
    broken["annotations"] = [broken["annotations"][0] | {"id": i, "bbox": "x"} for i in range(10)]
    done = call("--annotations", written(folder, broken))
    assert re.search(r"error +box-type +10 +write bbox as four numbers", done.output)
    assert [f"annotation {i} (image 0)" in done.output for i in range(5)] == [True] * 3 + [False] * 2
    assert "... and 7 more" in done.output
    assert "10 errors, 1 warning: 2 images (0 decoded), 10 annotations" in done.output


def test_names_cannot_print_escape_sequences(folder):
    done = call("--annotations", written(folder, tree() | {"categories": [{"id": 1, "name": "\x1b[31m\u202e\ud800"}]}))
    assert done.exit_code == 1
    assert "\x1b" not in done.output
    path = written(folder, annotation(bbox=None)).rename(folder / "\x1b[31m.json")
    shown = examine([Part(name="file", annotations=str(path), images=None)]).table()
    assert "?[31m.json: annotation 1" in shown, "click removes escape sequences only if the output is not a terminal"


def test_the_documented_rules_are_those_of_the_code():
    page = (ROOT / "docs" / "reference" / "data_rules.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(RULES)
    for rule, kind, meaning, remedy in rows:
        assert kind == severity(rule)
        assert len(meaning) > 10
        assert remedy == RULES[rule]
    assert set(RULES) >= WARNINGS


def test_every_rule_is_tested():
    """``elsewhere`` lists the rules that other test files cover."""
    here = ROOT / "tests"
    patterns = ("test_validate*.py", "test_*cityscapes.py", "test_discover.py", "test_shards.py")
    files = [*(path for pattern in patterns for path in here.rglob(pattern)), CORPUS_FILE]
    text = "".join(path.read_text() for path in files)
    elsewhere = {"file-missing", "categories", "box-size"}
    for rule in RULES:
        assert f'"{rule}"' in text or rule in elsewhere, rule
