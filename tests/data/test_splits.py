"""Laws of splits: disjoint, complete, reproducible, blind to order; the unlabeled have no labels."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.data.annotations.coco import read_coco
from pais_ray.data.annotations.records import LabeledRecord, Record, unlabel
from pais_ray.data.annotations.splits import SplitManifest, assemble, difference, draw, for_run, manifest, split

IDS = [3 * i for i in range(1000)]


@pytest.fixture
def dataset(tiny_coco):
    return read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


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
    with pytest.raises(ValueError, match="at least one image"):
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
    with pytest.raises(ValueError, match="expected a split manifest"):
        SplitManifest.from_json("[" * 100_000)


def test_no_annotation_is_reachable_from_an_unlabeled_record(tiny_coco):
    dataset = read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    for record in dataset.records:
        bare = unlabel(record)
        assert type(bare) is Record
        assert not isinstance(bare, LabeledRecord)
        fields = {f.name for f in dataclasses.fields(bare)}
        assert fields == {"image_id", "path", "height", "width"} == set(vars(bare))
        assert all(type(value) in (int, str) for value in vars(bare).values()), "and nothing refers back"


def test_a_covering_draw_shows_every_class_and_is_blind_to_order():
    classes = {i: {0} | ({1} if i % 100 == 0 else set()) | ({2} if i == 333 else set()) for i in range(1000)}
    plain = [set(split(range(1000), 0.01, fold).labeled_ids) for fold in range(5)]
    assert not any(333 in ids for ids in plain)
    for fold in range(5):
        parts = split(range(1000), 0.01, fold, classes)
        assert len(parts.labeled_ids) == 10
        assert sorted(parts.labeled_ids + parts.unlabeled_ids) == list(range(1000))
        assert set().union(*(classes[i] for i in parts.labeled_ids)) == {0, 1, 2}
        mixed = np.random.default_rng(0).permutation(1000).tolist()
        assert split(mixed, 0.01, fold, {i: classes[i] for i in mixed}) == parts
        assert set(split(range(1000), 0.002, fold, classes).labeled_ids) < set(parts.labeled_ids)
        assert len(set(parts.labeled_ids) & plain[fold]) >= 8, "beyond the two rare classes it is the plain draw"


def test_a_covering_draw_takes_the_rarest_class_first_where_there_are_too_few_images():
    classes = {i: {i % 7} for i in range(70)} | {70: {7}}
    parts = split(range(71), 2 / 71, 1, classes)
    assert 70 in parts.labeled_ids
    assert len(parts.labeled_ids) == 2


def test_protocols_of_the_paper(dataset):
    coco = draw(dataset, "coco", (), ())
    assert [(m.split.labeled, m.split.fold) for m in coco] == [
        (share, fold) for share in (0.01, 0.02, 0.05, 0.1) for fold in (1, 2, 3, 4, 5)
    ]
    assert [m.split.labeled for m in draw(dataset, "cityscapes", (), ())] == [0.05, 0.1, 0.2, 0.3]
    assert [(m.split.labeled, m.split.fold) for m in draw(dataset, None, (0.5,), (7,))] == [(0.5, 7)]
    ids = [r.image_id for r in dataset.records]
    assert draw(dataset, None, (0.5,), (7,))[0].split == split(ids, 0.5, 7), "what a run draws by itself"
    assert draw(dataset, None, (0.5,), (7,), cover=True)[0].sampling == "covering"


def others(number):
    return [Record(image_id=i, path=f"a/{i}.jpg", height=1, width=1) for i in range(number)]


def test_all_labeled_with_images_of_another_source(dataset):
    (full,) = draw(dataset, None, (), (), others(9))
    assert full.split.labeled_ids == tuple(sorted(r.image_id for r in dataset.records))
    assert full.split.unlabeled_ids == tuple(range(9)), "the same ids refer to other images"
    assert SplitManifest.from_json(full.to_json()) == full
    renamed = [*others(8), Record(image_id=8, path="a/nine.jpg", height=1, width=1)]
    assert draw(dataset, None, (), (), renamed)[0].split.sha256 != full.split.sha256
    assert draw(dataset, None, (), (), others(9)[::-1])[0].split.sha256 == full.split.sha256
    moved = [dataclasses.replace(r, path=f"/b/{r.image_id}.jpg") for r in others(9)]
    assert draw(dataset, None, (), (), moved)[0].split.sha256 == full.split.sha256, "the folder does not matter"


def test_a_run_uses_the_given_manifest(dataset, tmp_path):
    given = draw(dataset, None, (0.4,), (3,), cover=True)[0]
    (tmp_path / "s.json").write_text(given.to_json())
    assert for_run(dataset, 1.0, 1, str(tmp_path / "s.json"), None) == given
    (full,) = draw(dataset, None, (), (), others(9))
    (tmp_path / "full.json").write_text(full.to_json())
    assert for_run(dataset, 0.1, 1, str(tmp_path / "full.json"), others(9)) == full
    for path, unlabeled, said in (
        ("s.json", others(9), "unset data.unlabeled"),
        ("full.json", None, "set data.unlabeled to it"),
        ("full.json", others(8), "got others in"),
        ("none.json", None, "file-missing"),
    ):
        with pytest.raises(ValueError, match=said):
            for_run(dataset, 1.0, 1, str(tmp_path / path), unlabeled)
    other = dataclasses.replace(dataset, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"data\.split: .* got one of other annotations"):
        for_run(other, 1.0, 1, str(tmp_path / "s.json"), None)
    unknown = assemble([10**6], [0], 0.5, 1)
    (tmp_path / "u.json").write_text(manifest(unknown, dataset).to_json())
    with pytest.raises(ValueError, match="got 1000000 in"):
        for_run(dataset, 1.0, 1, str(tmp_path / "u.json"), None)


def test_a_run_without_a_manifest_writes_what_it_used(dataset):
    assert for_run(dataset, 0.5, 2, None, None) == draw(dataset, None, (0.5,), (2,))[0]
    assert for_run(dataset, 0.5, 2, None, others(3)).split.unlabeled_ids == (0, 1, 2)


def test_images_are_held_out_before_anything_is_drawn():
    """They are the same in every fold and fraction, in any order, and in neither part."""
    parts = [split(IDS, share, fold, None, 0.2) for share in (0.1, 1.0) for fold in (1, 2)]
    assert {part.held_out_ids for part in parts} == {parts[0].held_out_ids}
    held = set(parts[0].held_out_ids)
    assert len(held) == 200
    assert set(split(IDS, 0.1, 1, None, 0.1).held_out_ids) < held
    for part, expected in zip(parts, (80, 80, 800, 800), strict=True):
        assert len(part.labeled_ids) == expected
        assert sorted([*part.labeled_ids, *part.unlabeled_ids, *held]) == IDS
    mixed = np.random.default_rng(0).permutation(IDS).tolist()
    assert split(mixed, 0.1, 1, None, 0.2) == parts[0]
    assert len(split([4, 7], 1.0, 1, None, 0.01).held_out_ids) == 1, "at least one"
    for ids, share, said in ((IDS, 1.0, "between 0 and 1"), ([4], 0.5, "at least two images")):
        with pytest.raises(ValueError, match=rf"data\.holdout: expected .*{said}"):
            split(ids, 1.0, 1, None, share)


def test_held_out_images_are_in_manifest_and_hash(dataset):
    (without,) = draw(dataset, None, (0.5,), (1,))
    (held,) = draw(dataset, None, (0.5,), (1,), holdout=0.25)
    assert SplitManifest.from_json(held.to_json()) == held
    assert (held.split.holdout, len(held.split.held_out_ids)) == (0.25, 3)
    assert held.split.sha256 != without.split.sha256
    assert difference(held, without)["held_out_ids"]["only_a"] == list(held.split.held_out_ids)
    tree = json.loads(held.to_json())
    with pytest.raises(ValueError, match="hash"):
        SplitManifest.from_json(json.dumps(tree | {"held_out_ids": tree["held_out_ids"][1:]}))
    with pytest.raises(ValueError, match="held out and trained on"):
        SplitManifest.from_json(json.dumps(tree | {"held_out_ids": tree["labeled_ids"][:1]}))


def test_no_file_is_in_two_parts(dataset):
    """A folder of unlabeled images may also contain the labeled and the validation images."""
    paths = [r.path for r in dataset.records] + ["/elsewhere/a.png", "/elsewhere/b.png"]
    folder = [Record(image_id=100 + i, path=path, height=1, width=1) for i, path in enumerate(paths)]
    found = for_run(dataset, 0.5, 1, None, folder, 0.25, [folder[-1]]).split
    taken = {r.path for r in dataset.records if r.image_id in (*found.labeled_ids, *found.held_out_ids)}
    assert len(taken) == 3 + 4
    assert found.unlabeled_ids == tuple(r.image_id for r in folder[:-1] if r.path not in taken)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "said"),
    [([1], [1], "labeled and unlabeled"), ([1, 1], [2], "twice"), ([], [2], "at least one labeled image")],
)
def test_a_manifest_with_an_image_in_two_parts_is_refused(dataset, labeled, unlabeled, said):
    with pytest.raises(ValueError, match=said):
        assemble(labeled, unlabeled, 0.5, 1)
    tree = json.loads(draw(dataset, None, (0.5,), (1,))[0].to_json())
    tree["labeled_ids"], tree["unlabeled_ids"] = labeled, unlabeled
    with pytest.raises(ValueError, match=said):
        SplitManifest.from_json(json.dumps(tree))


def test_difference_counts_what_is_common(dataset):
    a, b = draw(dataset, None, (0.5,), (1, 2))
    found = difference(a, b)
    in_a, in_b = set(a.split.labeled_ids), set(b.split.labeled_ids)
    assert found["labeled_ids"] == {
        "both": len(in_a & in_b),
        "only_a": sorted(in_a - in_b),
        "only_b": sorted(in_b - in_a),
    }
    assert not found["same"]
    assert found["same_source"]
    assert difference(a, a)["same"]
    assert found["classes"][a.classes[0].name] == [a.classes[0].instances, b.classes[0].instances]


def test_one_command_makes_the_same_manifests_of_a_shuffled_file(tiny_coco, tmp_path):
    tree = json.loads((tiny_coco / "train.json").read_text())
    tree["images"] = tree["images"][::-1]
    tree["annotations"] = tree["annotations"][::-1]
    (tmp_path / "mixed.json").write_text(json.dumps(tree))
    found = []
    for source in (tiny_coco / "train.json", tiny_coco / "train.json", tmp_path / "mixed.json"):
        out = tmp_path / f"out{len(found)}"
        words = ["--annotations", str(source), "--protocol", "coco", "--cover", "--out", str(out)]
        done = call("split", *words, "--json", str(out / "made.json"))
        assert done.exit_code == 0, done.output
        found.append({p.name: p.read_text() for p in sorted(out.glob("coco_*.json"))})
        made = json.loads((out / "made.json").read_text())["manifests"]
        assert len(made) == len(found[0]) == 20
    assert found[0] == found[1]
    hashes = [{name: json.loads(text)["sha256"] for name, text in one.items()} for one in found]
    assert hashes[0] == hashes[2]
    assert "coco_1pct_fold5.json" in hashes[0]
    counts = [{name: json.loads(text)["classes"] for name, text in one.items()} for one in found]
    assert counts[0] == counts[2]


@pytest.mark.parametrize(("option", "name"), [("--out", "train.json/p"), ("--json", "train.json/x.json")])
def test_what_cannot_be_written_is_wrong_usage(tiny_coco, tmp_path, option, name):
    words = ["--annotations", str(tiny_coco / "train.json"), "--labeled", "0.5", "--out", str(tmp_path)]
    done = call("split", *words, option, str(tiny_coco / name))
    assert done.exit_code == 2
    assert f"Error: {option} {tiny_coco / 'train.json'}" in done.stderr
    assert "Traceback" not in done.output


def test_split_and_diff_from_the_command_line(tiny_coco, tmp_path):
    base = ["--annotations", str(tiny_coco / "train.json"), "--out", str(tmp_path)]
    assert call("split", *base, "--labeled", "0.25", "--fold", "1", "--fold", "2").exit_code == 0
    one, two = (str(tmp_path / f"labeled_25pct_fold{fold}.json") for fold in (1, 2))
    assert call("split", "diff", one, one).exit_code == 0
    done = call("split", "diff", one, two, "--json", str(tmp_path / "diff.json"))
    assert done.exit_code == 1
    assert "the splits differ" in done.output
    assert json.loads((tmp_path / "diff.json").read_text())["same_source"]
    assert call("split", *base, "--unlabeled", str(tiny_coco / "val.json")).exit_code == 0
    full = json.loads((tmp_path / "labeled_100pct_fold0.json").read_text())
    assert (full["num_labeled"], full["num_unlabeled"]) == (12, 4)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--annotations", "none.json", "--labeled", "0.1", "--out", "x"],
        ["--annotations", "{train}", "--out", "{out}"],
        ["--annotations", "{train}", "--labeled", "2", "--out", "{out}"],
        ["--annotations", "{train}", "--labeled", "0.5", "--fold", "-1", "--out", "{out}"],
        ["--annotations", "{train}", "--protocol", "voc", "--out", "{out}"],
        ["diff", "none.json", "none.json"],
        ["diff", "{train}", "{train}"],
        ["import", "{train}", "--annotations", "none.json", "--out", "{out}"],
    ],
)
def test_wrong_words_of_split_exit_with_2(tiny_coco, tmp_path, words):
    known = {"train": tiny_coco / "train.json", "out": tmp_path / "out"}
    done = call("split", *(word.format(**known) for word in words))
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output


def test_a_run_is_tagged_with_its_manifest(tiny_coco, tmp_path):
    """With prepare.prepare: the parts are those of the manifest, config and tags record it, and a change is refused."""
    from pais_ray.config.overlays import ConfigError
    from pais_ray.config.tree import compose
    from pais_ray.runs import describe, prepare

    paths = [f"data.train={tiny_coco}/train.json", f"data.val={tiny_coco}/val.json", f"data.images={tiny_coco}/images"]
    base = ["--annotations", str(tiny_coco / "train.json"), "--out", str(tmp_path)]
    assert call("split", *base, "--labeled", "0.25", "--fold", "4", "--cover").exit_code == 0
    path = tmp_path / "labeled_25pct_fold4.json"
    words = ["synthetic", "mask_rcnn", "pais", *paths, f"run.storage_path={tmp_path}"]
    config, data = prepare.prepare(compose([*words, f"data.split={path}"]))
    given = SplitManifest.from_json(path.read_text())
    assert data.manifest == given
    assert tuple(r.image_id for r in data.labeled) == given.split.labeled_ids
    assert tuple(r.image_id for r in data.unlabeled) == given.split.unlabeled_ids
    assert (config.data.labeled, config.data.fold) == (0.25, 4)
    tags = describe.tags(config, data.manifest.split, data.facts)
    assert tags["split_sha256"] == given.split.sha256
    assert (tags["labels_pct"], tags["fold"]) == ("25", "4")
    assert call("split", *base, "--labeled", "0.5", "--holdout", "0.25").exit_code == 0
    no_val = [word for word in words if not word.startswith("data.val=")]
    config, data = prepare.prepare(compose([*no_val, f"data.split={tmp_path}/labeled_50pct_fold1.json"]))
    assert (config.data.holdout, len(data.val), len(data.labeled), len(data.unlabeled)) == (0.25, 3, 4, 5)
    with pytest.raises(ConfigError, match=r"holds no images out .* `pais-ray split --holdout 0\.2`"):
        prepare.prepare(compose([*no_val, f"data.split={path}"]))
    assert call("split", *base, "--labeled", "1").exit_code == 0
    with pytest.raises(ConfigError, match="pais requires unlabeled images"):
        prepare.prepare(compose([*words, f"data.split={tmp_path}/labeled_100pct_fold1.json"]))
