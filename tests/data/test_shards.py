"""Shards on disk: they equal their source, writing continues after a kill, and broken files are refused by name."""

import copy
import json
import multiprocessing
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.cli.data.shard import source_of
from pais_ray.config.data_section import DataConfig
from pais_ray.config.overlays import ConfigError
from pais_ray.data.images.reader import Reader, ShardLocation, image_name, parse_shard_location
from pais_ray.data.shards import dataset, writer
from pais_ray.data.shards.writer import write_shards
from pais_ray.data.stream.plan import StepPlan
from pais_ray.data.validation.rules import DataError
from pais_ray.evaluation.scoring import score
from pais_ray.runs.prepare import read_data
from tests.support.cityscapes_files import scene, write_scene
from tests.support.killed_writer import write_and_die
from tests.support.malformed import tree

LAYOUT = {"rows_per_group": 2, "rows_per_file": 4}


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def coco(folder) -> list[str]:
    """Config words of a data set with crowds, polygons and RLE; validation has one more image."""
    (folder / "train.json").write_text(json.dumps(tree()))
    more = tree()
    more["images"].append(more["images"][0] | {"id": 7})
    (folder / "val.json").write_text(json.dumps(more))
    return [f"data.train={folder}/train.json", f"data.val={folder}/val.json", f"data.images={folder}"]


@pytest.fixture
def tiny(tiny_coco) -> list[str]:
    return [f"data.{part}={tiny_coco}/{part}.json" for part in ("train", "val")] + [f"data.images={tiny_coco}/images"]


@pytest.fixture
def cityscapes(tmp_path) -> list[str]:
    """Config words of a data set with a group of cars, which is a crowd."""
    root = tmp_path / "cityscapes"
    write_scene(root, "train", "aachen", 0, scene((26001, 10, 10, 30, 40), (24, 40, 10, 50, 60)))
    write_scene(root, "val", "ulm", 1, scene((26001, 10, 10, 30, 40), (26, 35, 0, 50, 60), (24002, 5, 50, 40, 60)))
    return [f"data.train={root}/gtFine/train", f"data.val={root}/gtFine/val"]


def settings(words: list[str]) -> DataConfig:
    return DataConfig(**dict(word.removeprefix("data.").split("=") for word in words))


def written(words: list[str], out: Path, **layout) -> DataConfig:
    """Writes shards of ``words``; returns the section `data:` that reads them."""
    write_shards(str(out), source_of(tuple(words)), **(layout or LAYOUT))
    return DataConfig(train=str(out))


def read_all(records, *, labels: bool) -> list[dict]:
    reader = Reader(labels=labels)
    return [reader.read(r.path, r.image_id) for r in records]


def assert_same_images(records, sources) -> None:
    """Ids, sizes, names and bytes are equal; the order differs."""
    by_id = {r.image_id: r for r in sources}
    assert sorted(by_id) == sorted(r.image_id for r in records)
    for record, row in zip(records, read_all(records, labels=False), strict=True):
        source = by_id[record.image_id]
        assert (record.height, record.width) == (source.height, source.width)
        assert image_name(record.path) == Path(source.path).name
        assert row == {"bytes": Path(source.path).read_bytes()}


@pytest.mark.parametrize("kind", ["coco", "tiny", "cityscapes"])
def test_shards_have_the_records_and_bytes_of_the_source(kind, request, tmp_path):
    words = request.getfixturevalue(kind)
    source, made = read_data(settings(words)), read_data(written(words, tmp_path / "out"))
    assert_same_images(made.labeled, source.labeled)
    assert_same_images(made.val, source.val)
    assert [r.image_id for r in made.val] == [r.image_id for r in source.val], "validation keeps its order"
    assert made.unlabeled == ()
    assert made.manifest == source.manifest
    assert made.train.categories == source.train.categories
    assert made.train.sha256 == source.train.sha256
    by_id = {r.image_id: r for r in source.labeled}
    for record, row in zip(made.labeled, read_all(made.labeled, labels=True), strict=True):
        expected = by_id[record.image_id]
        assert record.labels.tolist() == row["labels"] == expected.labels.tolist()
        assert np.array_equal(np.array(row["boxes"], np.float32).reshape(-1, 4), expected.boxes)
        assert tuple(row["rles"]) == expected.rles


def test_scored_masks_for_the_images_of_shards_are_validated(tiny, tmp_path):
    made = read_data(written([*tiny, "data.labeled=0.5"], tmp_path / "out"))
    image, path = made.unlabeled[0], tmp_path / "masks.json"
    size = [image.height, image.width]
    mask = {"size": size, "counts": [0, size[0] * size[1]]}
    entry = {"image_id": image.image_id, "category_id": made.train.categories[0].id, "segmentation": mask}
    for changes, rule in (
        ({}, ""),
        ({"score": 2}, "score-range"),
        ({"category_id": -1}, "id-unknown"),
        ({"image_id": made.labeled[0].image_id}, "id-unknown"),
    ):
        path.write_text(json.dumps([entry | {"score": 0.5} | changes]))
        done = call("validate", f"data={tmp_path / 'out'}", f"data.pseudo_labels={path}")
        assert done.exit_code == bool(rule), done.output
        assert rule in done.output


@pytest.mark.parametrize("kind", ["coco", "cityscapes"])
def test_evaluation_on_shards_equals_evaluation_on_the_source(kind, request, tmp_path):
    words = request.getfixturevalue(kind)
    source, made = read_data(settings(words)), read_data(written(words, tmp_path / "out"))
    truth = source.truth if isinstance(source.truth, dict) else json.loads(Path(source.truth).read_text())
    assert made.truth == truth
    crowds = [a for a in made.truth["annotations"] if a["iscrowd"]]
    assert crowds
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.5, "bbox": a["bbox"]}
        | {"segmentation": crowds[0]["segmentation"]}
        for a in made.truth["annotations"]
    ]
    scores = [score(copy.deepcopy(truth), results) for truth in (made.truth, source.truth)]
    assert scores[0] == scores[1]
    assert dataset.read_truth(str(tmp_path / "out")) == truth


def test_shards_have_their_split_and_no_label_columns_in_the_unlabeled_part(tiny, tmp_path):
    words = [*tiny, "data.labeled=0.25", "data.fold=3"]
    source = read_data(settings(words))
    config = written(words, tmp_path / "out")
    made = read_data(config)
    assert_same_images(made.labeled, source.labeled)
    assert_same_images(made.unlabeled, source.unlabeled)
    assert made.manifest == source.manifest, "the hash of the split is that of the source"
    (file,) = {parse_shard_location(r.path).file for r in made.labeled}
    assert {"boxes", "labels", "rles"} < set(pq.read_schema(file).names)
    files = {parse_shard_location(r.path).file for r in made.unlabeled}
    for file in files:
        assert set(pq.read_schema(file).names) == {"image_id", "file_name", "height", "width", "bytes"}
    assert read_data(config.model_copy(update={"labeled": 0.25, "fold": 3})).manifest == source.manifest
    for other in ({"labeled": 0.25}, {"labeled": 0.5, "fold": 3}):
        with pytest.raises(ConfigError, match=r"written with labeled=0.25, fold=3"):
            read_data(config.model_copy(update=other))


def test_a_split_can_be_drawn_from_shards_without_one(tiny, tmp_path):
    config = written(tiny, tmp_path / "out").model_copy(update={"labeled": 0.25})
    made, source = read_data(config), read_data(settings([*tiny, "data.labeled=0.25"]))
    assert made.manifest == source.manifest
    assert_same_images(made.labeled, source.labeled)
    assert_same_images(made.unlabeled, source.unlabeled)
    assert sum(made.labeled_groups) == 3
    assert sum(made.unlabeled_groups) == 9


def test_unlabeled_images_of_another_source_are_included(coco, folder, tmp_path):
    from PIL import Image

    others = tmp_path / "others" / "deep"
    others.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (30 + i, 20), (50 * i, 0, 0)).save(others / f"{i} ä.png")
    words = [*coco, f"data.unlabeled={tmp_path}/others"]
    source, made = read_data(settings(words)), read_data(written(words, tmp_path / "out"))
    assert_same_images(made.unlabeled, source.unlabeled)
    assert made.manifest == source.manifest
    assert made.manifest.split.unlabeled_sha256 is not None


def test_the_plan_reads_one_row_group_after_the_other(tiny, tmp_path):
    """Images that the plan draws consecutively are in the same row group."""
    made = read_data(written(tiny, tmp_path / "out", rows_per_group=3, rows_per_file=6))
    assert made.labeled_groups == (3, 3, 3, 3)
    plan = StepPlan(seed=0, num_labeled=12, num_unlabeled=0, labeled=3, unlabeled=0, labeled_groups=made.labeled_groups)
    for g in range(4):
        places = [parse_shard_location(made.labeled[i].path) for i in plan.row(g)[0]]
        assert len({place[:2] for place in places}) == 1
        assert sorted(place.row for place in places) == [0, 1, 2]


def test_rows_are_shuffled_and_equal_input_gives_equal_files(tiny, tmp_path):
    first = read_data(written(tiny, tmp_path / "a")).labeled
    written(tiny, tmp_path / "b")
    assert [r.image_id for r in first] != sorted(r.image_id for r in first)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_row_group_is_fetched_once_and_few_are_kept(tiny, tmp_path, monkeypatch):
    records = read_data(written(tiny, tmp_path / "out")).labeled
    fetched = Counter()
    fetch = Reader._fetch
    monkeypatch.setattr(Reader, "_fetch", lambda self, p: fetched.update([p[:2]]) or fetch(self, p))
    reader = Reader(keep=2)
    for one, other in zip(records[:6], records[6:], strict=True):  # as with two lanes
        reader.read(one.path, one.image_id)
        reader.read(other.path, other.image_id)
        assert len(reader._groups) <= 2
    assert set(fetched.values()) == {1}
    assert len(fetched) == 6


def test_large_images_make_smaller_groups(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "GROUP_BYTES", 20_000)  # of about 6 kB each
    write_shards(str(tmp_path / "out"), source_of(tuple(tiny)))
    made = dataset.read_manifest(str(tmp_path / "out"))
    assert 2 <= made.rows_per_group <= 4


def test_the_same_command_after_a_kill_writes_only_what_is_missing(tiny, tmp_path):
    written(tiny, tmp_path / "whole")
    out, source = tmp_path / "out", source_of(tuple(tiny))
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(str(out), source, 2, LAYOUT))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match="shard-manifest"):
        dataset.read_manifest(str(out))
    assert dataset.is_shard_folder(str(out)), "it is still recognized as shards"
    done = sorted(out.glob("*.note"))
    stamps = {path.with_suffix("").name: path.with_suffix("").stat().st_mtime_ns for path in done}
    assert len(stamps) == 2
    images = []
    write_shards(str(out), source, **LAYOUT, progress=lambda items, count: images.append(count) or items)
    assert images == [12 + 4 - 2 * 4], "only images of the other files"
    for name, stamp in stamps.items():
        assert (out / name).stat().st_mtime_ns == stamp
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    write_shards(str(out), source, **LAYOUT, progress=lambda items, count: pytest.fail("nothing is missing"))


def test_a_truncated_file_with_a_note_is_written_again(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(writer, "_write", _no_manifest(writer._write))
    with pytest.raises(KeyboardInterrupt):
        written(tiny, out)
    monkeypatch.undo()
    victim = out / "train-00001.parquet"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    written(tiny, out)
    assert victim.read_bytes() == whole


def _no_manifest(write):
    def stop_at_manifest(out, name, *more):
        if name == dataset.MANIFEST:
            raise KeyboardInterrupt
        return write(out, name, *more)

    return stop_at_manifest


@pytest.mark.parametrize("unfinished", [False, True])
def test_the_folder_of_another_data_set_is_refused(tiny, coco, tmp_path, monkeypatch, unfinished):
    out = tmp_path / "out"
    if unfinished:
        monkeypatch.setattr(writer, "_write", _no_manifest(writer._write))
        with pytest.raises(KeyboardInterrupt):
            written(tiny, out)
        monkeypatch.undo()
    else:
        written(tiny, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for words, options in (
        (coco, LAYOUT),
        (tiny, LAYOUT | {"rows_per_group": 1}),
        ([*tiny, "data.labeled=0.5"], LAYOUT),
    ):
        with pytest.raises(DataError, match=r"other data.*shard-manifest"):
            write_shards(str(out), source_of(tuple(words)), **options)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_folder_with_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"expected an empty folder, got thesis.tex"):
        written(tiny, tmp_path)


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_truncated_and_missing_files_are_refused_by_name_before_training(tiny, tmp_path):
    out = tmp_path / "out"
    words = ["synthetic", "mask_rcnn", "supervised", f"data.train={written(tiny, out).train}", "data.labeled=1"]
    victim = out / "train-00001.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    done = call("train", *words, f"run.storage_path={tmp_path}/runs")
    assert done.exit_code == 2
    assert f"{victim}: " in done.stderr
    assert "[shard-truncated]" in done.stderr
    assert not (tmp_path / "runs").exists()
    victim.unlink()
    with pytest.raises(DataError, match=r"no such file") as caught:
        dataset.read_shards(str(out), "train")
    assert caught.value.rule == "shard-truncated"


def test_a_flipped_bit_in_a_page_is_reported_with_file_and_row_group(tiny, tmp_path):
    records = read_data(written(tiny, tmp_path / "out")).labeled
    place = parse_shard_location(records[-1].path)
    group = pq.ParquetFile(place.file).metadata.row_group(place.group)
    (column,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "bytes")
    damage(Path(place.file), column.data_page_offset + column.total_compressed_size // 2)
    read_all(records[:-2], labels=True)  # the other row groups
    with pytest.raises(DataError, match=r"\[shard-damaged\]") as caught:
        read_all(records[-1:], labels=True)
    assert caught.value.where == f"{place.file}: row group {place.group}"
    assert call("validate", f"data.train={tmp_path}/out").exit_code == 1


def test_a_flipped_bit_in_the_footer_or_an_index_is_detected(tiny, tmp_path):
    out = tmp_path / "out"
    records = read_data(written(tiny, out)).labeled
    damage(out / "train-00000.parquet", -10)
    with pytest.raises(DataError, match="shard-damaged"):
        read_all(records, labels=False)
    damage(out / "train-index.parquet", 40)
    with pytest.raises(DataError, match=r"train-index.*shard-damaged"):
        dataset.read_shards(str(out), "train")


def test_shards_that_were_rewritten_during_a_run_are_detected(tiny, coco, tmp_path):
    records = read_data(written(tiny, tmp_path / "out")).labeled
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    written([*tiny, "data.labeled=0.75"], tmp_path / "out")
    (tmp_path / "out" / "labeled-00000.parquet").rename(tmp_path / "out" / "train-00000.parquet")
    with pytest.raises(DataError, match=r"expected image .* at row"):
        read_all(records[:4], labels=False)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "pais-ray shards", "version": 1}'])
def test_an_invalid_manifest_is_refused(tiny, tmp_path, content):
    written(tiny, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="shard-manifest"):
        dataset.read_shards(str(tmp_path / "out"), "train")


def test_another_version_of_the_format_is_refused(tiny, tmp_path):
    written(tiny, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match=r"expected version 1 of the format, got version 2;.*shard-manifest"):
        dataset.read_shards(str(tmp_path / "out"), "val")
    path.unlink()
    with pytest.raises(DataError, match=r"manifest.json: expected a file, got no such file.*shard-manifest"):
        dataset.read_shards(str(tmp_path / "out"), "val")


def test_validate_accepts_complete_shards(tiny, tmp_path):
    written(tiny, tmp_path / "out")
    done = call("validate", f"data.train={tmp_path}/out", "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 16


def test_the_command_writes_shards_and_reports_them(tiny, tmp_path):
    done = call("shard", *tiny, "data.labeled=0.5", "--out", tmp_path / "out", "--json", tmp_path / "made.json")
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["parts"] == {"labeled": 6, "unlabeled": 6, "val": 4}
    assert made["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != dataset.MANIFEST)
    for words in (["synthetic"], [f"data.train={tmp_path}/out"]):
        assert call("shard", *words, "--out", tmp_path / "again").exit_code == 2


@pytest.mark.parametrize(
    "url",
    [
        *("s3://ME:hunter2@bucket/x", "s3://ME:hun/ter2/hunter2@bucket/x", "s3://hunter2@bucket/x"),
        *("s3://b/x?secret_key=hunter2", "gs://a:hunter2@b/x"),
    ],
)
def test_keys_in_a_url_are_refused_and_not_repeated(url, tiny):
    done = call("shard", *tiny, "--out", url)
    assert done.exit_code == 2
    words = ("synthetic", "mask_rcnn", "pais")
    others = [call(verb, *words, f"{key}={url}") for verb in ("train", "validate") for key in ("data", "data.train")]
    assert {other.exit_code for other in others} == {2}
    for output in (done.output, *(other.output for other in others)):
        assert "AWS_SECRET_ACCESS_KEY" in output
        assert "hunter2" not in output


def test_shard_locations_survive_a_round_trip_through_their_path():
    for file in (
        "/data/a #1/x.parquet",
        "s3://b/x%20y/t.parquet",
        "s3://b/t.parquet?endpoint_override=h:1&scheme=http",
    ):
        place = ShardLocation(file, 3, 17, "a#b 0/1.jpg")
        assert parse_shard_location(str(place)) == place
        assert image_name(str(place)) == "a#b 0/1.jpg"
    for plain, name in (("/a/b.jpg", "b.jpg"), ("s3://b/c/d%20e.jpg?region=x", "d e.jpg"), ("x#1/2/c.jpg", "c.jpg")):
        assert parse_shard_location(plain) is None
        assert image_name(plain) == name


def test_only_shards_do_not_need_a_validation_set(tiny, tmp_path):
    with pytest.raises(ValueError, match="val: expected a COCO JSON"):
        DataConfig(train="somewhere.json")
    assert written(tiny, tmp_path / "out").part("val") == (str(tmp_path / "out"), None)
    assert DataConfig(train="s3://bucket/x").part("val") == ("s3://bucket/x", None)


def test_a_run_is_not_resumed_with_other_shards(tiny, tmp_path):
    from pais_ray.config.tree import compose, run_schedule
    from pais_ray.runs import directory
    from pais_ray.runs.prepare import prepare

    def prepared(out: Path):
        return prepare(compose(["synthetic", "mask_rcnn", "supervised", f"data.train={out}", "data.labeled=1"]))

    written(tiny, tmp_path / "out")
    config, data = prepared(tmp_path / "out")
    directory.write_run_directory(tmp_path / "run", config, data, run_schedule(config))
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir()
    directory.check_data(tmp_path / "run", data, force=False)
    written(tiny, tmp_path / "other", rows_per_group=3)
    other = prepared(tmp_path / "other")[1]
    assert other.manifest == data.manifest, "the images are the same, their order is not"
    with pytest.raises(ConfigError, match="changed since the start of the run"):
        directory.check_data(tmp_path / "run", other, force=False)


def test_held_out_images_are_the_validation_part_of_shards(coco, folder, tmp_path):
    words = [word for word in coco if "val" not in word] + ["data.holdout=0.5"]
    source, config = read_data(settings(words)), written(words, tmp_path / "out")
    made = read_data(config)
    assert made.manifest == source.manifest
    assert_same_images(made.val, source.val)
    assert made.truth == source.truth
    with pytest.raises(ConfigError, match=r"data.holdout: .* already has validation images"):
        read_data(config.model_copy(update={"holdout": 0.5}))
