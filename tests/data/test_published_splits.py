"""Published splits are read as their authors define them."""

import json

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.data.sources.published_splits import import_splits
from pais_ray.data.sources.readers import read_annotations
from pais_ray.data.validation.rules import DataError

NUMBER = 40


@pytest.fixture
def annotations(tmp_path):
    """40 images with ids 1000, 990, ...; every fifth without annotation, every fifth with only a crowd."""
    images = [{"id": 1000 - 10 * i, "file_name": f"{i}.jpg", "height": 10, "width": 10} for i in range(NUMBER)]
    entries = []
    for i, image in enumerate(images):
        if i % 5:
            crowd = int(i % 5 == 1)
            shape = {"size": [10, 10], "counts": [0, 100]} if crowd else [[0, 0, 5, 0, 5, 5]]
            entry = {"id": i, "image_id": image["id"], "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": crowd}
            entries.append({**entry, "segmentation": shape, "area": 12})
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": [{"id": 1, "name": "x"}]}))
    return str(path)


def usable() -> list[int]:
    return sorted(1000 - 10 * i for i in range(NUMBER) if i % 5 > 1)


def written(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_indices_count_images_with_instances_by_id(annotations, tmp_path):
    lists = {"12.5": {"0": [0, 23, 5], "1": [2, 3, 4]}, "50.0": {"7": list(range(12))}}
    made = import_splits(written(tmp_path / "COCO_supervision.txt", lists), read_annotations(annotations))
    assert [(m.split.labeled, m.split.fold, m.sampling) for m in made] == [
        (0.125, 0, "published"),
        (0.125, 1, "published"),
        (0.5, 7, "published"),
    ]
    ids = usable()
    assert len(ids) == 24
    assert made[0].split.labeled_ids == tuple(sorted([ids[0], ids[23], ids[5]]))
    assert sorted([*made[0].split.labeled_ids, *made[0].split.unlabeled_ids]) == ids
    assert made[2].split.labeled_ids == tuple(ids[:12])
    path, dataset = str(tmp_path / "COCO_supervision.txt"), read_annotations(annotations)
    assert import_splits(path, dataset, [0.125], [1]) == made[1:2]
    with pytest.raises(DataError, match="expected a split with the requested fractions and folds"):
        import_splits(path, dataset, [0.25])


def test_a_pair_of_files_gives_two_lists_of_ids(annotations, tmp_path):
    ids = [1000 - 10 * i for i in range(NUMBER)]
    parts = {"": ids[:4], "-unlabeled": ids[4:]}
    for name, part in parts.items():
        written(tmp_path / f"instances_train2017.3@10{name}.json", {"images": [{"id": i} for i in part]})
    path = str(tmp_path / "instances_train2017.3@10.json")
    (made,) = import_splits(path, read_annotations(annotations))
    assert (made.split.labeled, made.split.fold) == (0.1, 3)
    assert (made.split.labeled_ids, made.split.unlabeled_ids) == (tuple(sorted(ids[:4])), tuple(sorted(ids[4:])))


def test_the_command_writes_manifests(annotations, tmp_path):
    path = written(tmp_path / "COCO_supervision.txt", {"12.5": {"0": [0, 23, 5], "1": [2, 3, 4], "2": [1, 2, 3]}})
    words = ["split", "import", path, "--annotations", annotations, "--out", str(tmp_path / "out")]
    words += ["--labeled", "0.125", "--fold", "0", "--fold", "1"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["coco_supervision_12.5pct_fold0.json", "coco_supervision_12.5pct_fold1.json"]
    found = SplitManifest.from_json((tmp_path / "out" / names[0]).read_text())
    assert found.source_sha256 == read_annotations(annotations).sha256


@pytest.mark.parametrize(
    ("content", "rule", "said"),
    [
        ({"12.5": {"0": [0, 1]}}, "id-unknown", "expected 3 indices of the 24 images"),
        ({"12.5": {"0": [0, 1, 24]}}, "id-unknown", "got 3 indices up to 24"),
        ({"12.5": {"0": [0, 1, "2"]}}, "key-type", "a list of indices"),
        ({"12.5": {"one": [0, 1, 2]}}, "key-type", "an integer as seed"),
        ({"much": {"0": [0]}}, "key-type", "percent"),
        ({"12.5": [0, 1, 2]}, "key-type", "percent"),
        ([1, 2], "file-json", "expected a JSON object"),
        ({"12.5": {"0": [0, 1, 1]}}, "id-duplicate", "one that occurs twice"),
        ({"images": [{"name": 1}]}, "key-type", "integers as ids"),
        ({"images": [{"id": 1000}]}, "file-missing", "list-unlabeled.json"),
    ],
)
def test_invalid_lists_raise_their_rule(annotations, tmp_path, content, rule, said):
    path = written(tmp_path / "list.json", content)
    with pytest.raises(DataError) as caught:
        import_splits(path, read_annotations(annotations))
    assert caught.value.rule == rule
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "rule"),
    [([1000], [1000], "id-duplicate"), ([5], [1000], "id-unknown"), ([], [1000], "id-duplicate")],
)
def test_invalid_pairs_raise_their_rule(annotations, tmp_path, labeled, unlabeled, rule):
    written(tmp_path / "a.1@10-unlabeled.json", {"images": [{"id": i} for i in unlabeled]})
    path = written(tmp_path / "a.1@10.json", {"images": [{"id": i} for i in labeled]})
    with pytest.raises(DataError) as caught:
        import_splits(path, read_annotations(annotations))
    assert caught.value.rule == rule
