"""The walk over COCO files: places of entries, and what each policy does with an invalid id."""

import pytest

from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.rules import DataError
from pais_ray.data.validation.walk import keep_annotation, walk

LISTED = [{"id": 4}, {"id": 4, "x": 1}, "text", {"x": 2}, {"id": "5"}, {"id": 6}]


def places(entries) -> list[str]:
    return [entry.place for entry in entries]


def test_reading_stops_at_the_first_invalid_id():
    entries = walk(LISTED, "annotation", "a.json")
    assert next(entries).id == 4
    with pytest.raises(DataError, match=r"a\.json: annotation 4: expected a unique id.*\[id-duplicate\]"):
        next(entries)


def test_validation_collects_the_errors_and_skips_or_keeps_the_entries():
    report = Report()
    assert places(walk(LISTED, "image", "a.json", report.add_and_skip)) == ["a.json: image 4", "a.json: image 6"]
    rules = ["id-duplicate", "key-type", "key-missing", "id-type"]
    assert [finding.rule for finding in report.findings] == rules
    kept = list(walk(LISTED, "annotation", "a.json", report.add_and_keep))
    assert [entry.value for entry in kept] == [value for value in LISTED if isinstance(value, dict)]
    assert [finding.rule for finding in report.findings] == 2 * rules


def test_scoring_accepts_any_id_of_an_annotation_and_names_its_position_if_it_has_none():
    entries = walk([{"id": 4}, {"x": 2}, {"id": "5"}], "annotation", "a.json", keep_annotation)
    assert places(entries) == [f"a.json: annotation {name}" for name in ("4", "1", "'5'")]
    with pytest.raises(DataError, match="expected an object"):
        list(walk(["text"], "annotation", "a.json", keep_annotation))


def test_a_policy_can_replace_an_entry_and_its_new_id_is_used_up():
    entries = list(walk([{}, {"id": 7}], "image", "a.json", lambda error, value: {"id": 7} if value == {} else None))
    assert places(entries) == ["a.json: image 7"]


def test_the_place_names_the_image_as_well():
    (entry,) = walk([{"id": 4}], "annotation", "a.json")
    assert entry.in_image(2).place == "a.json: annotation 4 (image 2)"
