"""Laws of splits: disjoint, complete, reproducible, blind to order; the unlabeled have no labels."""

import dataclasses
import json

import numpy as np
import pytest

from pais_ray.data.sources import LabeledRecord, Record, read_coco, unlabel
from pais_ray.data.splits import SplitManifest, manifest, split

IDS = [3 * i for i in range(1000)]


def test_the_parts_are_disjoint_complete_and_of_the_size_asked_for():
    for fraction, expected in ((0.001, 1), (0.01, 10), (0.1, 100), (0.5, 500), (0.00001, 1), (1.0, 1000)):
        parts = split(IDS, fraction, 1)
        assert len(parts.labeled_ids) == expected
        assert sorted(parts.labeled_ids + parts.unlabeled_ids) == IDS
    assert split(IDS, 1.0, 1).unlabeled_ids == ()


def test_the_order_given_does_not_matter():
    mixed = np.random.default_rng(0).permutation(IDS).tolist()
    assert split(mixed, 0.1, 2) == split(IDS, 0.1, 2)


def test_a_split_is_the_same_for_ever():
    """If this fails, published splits are no longer those that are drawn."""
    parts = split(range(20), 0.25, 1)
    assert parts.labeled_ids == (4, 7, 8, 11, 17)
    assert parts.sha256.startswith("9f5445120df3c35e")


def test_folds_and_fractions():
    folds = [set(split(IDS, 0.1, fold).labeled_ids) for fold in range(1, 6)]
    for i, one in enumerate(folds):
        for other in folds[:i]:
            assert len(one & other) < 30, "10 are expected by chance"
    assert set(split(IDS, 0.01, 1).labeled_ids) < folds[0], "smaller fractions are nested"


def test_the_draw_is_plain_random():
    """Every image is drawn about equally often: 200 folds of 10 % give 20 +- 4.2 each."""
    counts = np.zeros(100)
    for fold in range(200):
        counts[list(split(range(100), 0.1, fold).labeled_ids)] += 1
    assert counts.sum() == 2000
    assert 3.0 < counts.std() < 5.5
    assert abs(counts[:50].sum() - 1000) < 100


def test_the_hash_tells_splits_apart():
    hashes = {split(IDS, fraction, fold).sha256 for fraction in (0.1, 0.2) for fold in (1, 2)}
    hashes.add(split([*IDS, 1], 0.1, 1).sha256)
    assert len(hashes) == 5


@pytest.mark.parametrize("labeled", [0, -0.1, 1.01, float("nan")])
def test_a_wrong_fraction_is_named(labeled):
    with pytest.raises(ValueError, match=r"data\.labeled: expected a fraction in \(0, 1\]"):
        split(IDS, labeled, 1)


def test_other_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"data\.fold"):
        split(IDS, 0.1, -1)
    with pytest.raises(ValueError, match="no images"):
        split([], 0.1, 1)
    with pytest.raises(ValueError, match="twice"):
        split([1, 1], 0.1, 1)


def test_manifest_counts_covers_and_returns(tiny_coco):
    dataset = read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    parts = split([r.image_id for r in dataset.records], 0.1, 1)
    written = manifest(parts, dataset)
    assert SplitManifest.from_json(written.to_json()) == written
    entries = json.loads((tiny_coco / "train.json").read_text())["annotations"]
    for count in written.classes:
        assert count.instances == sum(
            e["category_id"] == count.id and not e["iscrowd"] and e["image_id"] in parts.labeled_ids for e in entries
        )
    assert written.absent, "one image does not show all six classes"
    tree = json.loads(written.to_json())
    assert (tree["num_labeled"], tree["num_unlabeled"], tree["fold"]) == (1, 11, 1)
    assert tree["absent"] == list(written.absent)
    assert tree["source_sha256"] == dataset.sha256


def test_a_changed_manifest_is_refused(tiny_coco):
    dataset = read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    text = manifest(split([r.image_id for r in dataset.records], 0.5, 1), dataset).to_json()
    tree = json.loads(text)
    tree["labeled_ids"], tree["unlabeled_ids"] = (
        tree["labeled_ids"][1:],
        tree["unlabeled_ids"] + tree["labeled_ids"][:1],
    )
    with pytest.raises(ValueError, match="hash"):
        SplitManifest.from_json(json.dumps(tree))
    with pytest.raises(ValueError, match="expected a split manifest"):
        SplitManifest.from_json("{}")


def test_no_annotation_is_reachable_from_an_unlabeled_record(tiny_coco):
    dataset = read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    for record in dataset.records:
        bare = unlabel(record)
        assert type(bare) is Record
        assert not isinstance(bare, LabeledRecord)
        fields = {f.name for f in dataclasses.fields(bare)}
        assert fields == {"image_id", "path", "height", "width"} == set(vars(bare))
        assert all(type(value) in (int, str) for value in vars(bare).values()), "and nothing refers back"
