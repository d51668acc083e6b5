"""Shards on a real cluster: streamed from an S3 server, killed and resumed within a pass, and used for training."""

import io
import json
from collections import Counter

import boto3
import numpy as np
import pytest
import ray
import torch
from click.testing import CliRunner
from PIL import Image

from pais_ray.cli import main
from pais_ray.cli.data.shard import source_of
from pais_ray.config.data_section import DataConfig
from pais_ray.config.tree import compose
from pais_ray.data.annotations import coco, rle
from pais_ray.data.annotations.records import CocoDataset, LabeledRecord, Record
from pais_ray.data.images.images import decode
from pais_ray.data.shards import dataset
from pais_ray.data.shards.writer import Source, write_shards
from pais_ray.data.stream import batches, pipeline
from pais_ray.data.stream.plan import StepPlan, rank_rows
from pais_ray.runs.prepare import read_data
from pais_ray.train.driver import launch
from tests.faults.harness import assert_same_end
from tests.ray.test_main_job import STEPS, words
from tests.support.cutting_proxy import CuttingProxy

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]
IMAGES = 1500  # of 8 x 8 px


@pytest.fixture(scope="module")
def bucket(s3) -> str:
    boto3.client("s3").create_bucket(Bucket="ray")
    return "ray"


@pytest.fixture(scope="module")
def many(bucket, tmp_path_factory) -> str:
    """The URL of shards of many small unlabeled images."""
    folder = tmp_path_factory.mktemp("many")
    records = []
    for i in range(IMAGES):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(folder / f"{i}.png")
        records.append(Record(image_id=i, path=str(folder / f"{i}.png"), height=8, width=8))
    nothing = CocoDataset(path="", categories=(), records=(), sha256="", truth={}, num_crowd=0, num_dropped=0)
    labeled = LabeledRecord(**vars(records[0]), boxes=np.zeros((0, 4)), labels=np.zeros(0, np.int64), rles=())
    source = Source(train=nothing, parts={"train": [labeled], "unlabeled": records}, truth={}, split=None)
    write_shards(f"s3://{bucket}/many", source, rows_per_group=16, rows_per_file=256)
    return f"s3://{bucket}/many"


def feed_of(url: str, lanes: int) -> pipeline.Feed:
    unlabeled = dataset.read_shards(url, "train").unlabeled
    assert unlabeled is not None
    records, groups = dataset.sort_by_group(unlabeled)
    plan = StepPlan(
        seed=3,
        num_labeled=0,
        num_unlabeled=len(records),
        labeled=0,
        unlabeled=4,
        unlabeled_groups=groups,
        lanes=lanes,
    )
    return pipeline.make_feed(plan, (), records)


def ids(rows) -> list[int]:
    return [sample.image_id for row in rows for sample in row.unlabeled]


@ray.remote(num_cpus=0.1)
class Consumer:
    """A process that consumes rows until it is killed."""

    def __init__(self, feed: pipeline.Feed, steps: int) -> None:
        self.rows = batches.stream_decoded(feed, rank_rows(0, steps, 2, 1, 0))

    def take(self, count: int) -> tuple[int, list[int]]:
        """(the row to continue with, image ids of the next ``count`` rows)."""
        rows = [next(self.rows) for _ in range(count)]
        return rows[-1].g + 1, ids(rows)


def test_after_a_kill_during_a_pass_the_next_1000_images_are_those_of_an_uninterrupted_stream(cluster, many):
    feed = feed_of(many, lanes=2)
    uninterrupted = ids(batches.stream_decoded(feed, rank_rows(0, 250, 2, 1, 0)))
    assert sorted(uninterrupted[:IMAGES]) == list(range(IMAGES)), "a pass has each image once"
    consumer = Consumer.remote(feed, 250)
    g_next, seen = ray.get(consumer.take.remote(150))
    ray.kill(consumer)
    assert seen == uninterrupted[: 4 * g_next]
    again = [batches.stream_decoded(feed, rank_rows(g_next, 125, 2, 2, rank)) for rank in range(2)]
    rows = [row for pair in zip(*again, strict=True) for row in pair]
    assert ids(rows) == uninterrupted[4 * g_next : 4 * g_next + 1000]


def test_no_image_is_lost_or_repeated_when_the_connection_of_a_stream_is_cut(cluster, s3, many, bucket):
    with CuttingProxy(s3, after=2000) as proxy:
        feed = feed_of(proxy.url(bucket, "many"), lanes=1)
        proxy.cuts = 4
        seen = ids(batches.stream_decoded(feed, rank_rows(0, IMAGES // 4, 1, 1, 0)))
        assert proxy.cuts == 0
    assert Counter(seen) == Counter(range(IMAGES))


def test_labels_of_shards_are_read_from_the_shards_and_equal_the_source(cluster, bucket, tiny_coco):
    plain = [f"data.{part}={tiny_coco}/{part}.json" for part in ("train", "val")] + [f"data.images={tiny_coco}/images"]
    source = source_of(tuple(plain))
    write_shards(f"s3://{bucket}/unsplit", source, rows_per_group=4)
    data = read_data(DataConfig(train=f"s3://{bucket}/unsplit", labeled=0.25))
    plan = StepPlan(
        seed=0,
        num_labeled=len(data.labeled),
        num_unlabeled=len(data.unlabeled),
        labeled=1,
        unlabeled=2,
        labeled_groups=data.labeled_groups,
        unlabeled_groups=data.unlabeled_groups,
    )
    feed = pipeline.make_feed(plan, data.labeled, data.unlabeled)
    tables = ray.get(feed.tables)
    for table in (tables.labeled, tables.unlabeled):
        assert table.column_names == ["image_id", "path", "height", "width"]
    truth = {r.image_id: r for r in source.train.records}
    rows = list(batches.stream_decoded(feed, rank_rows(0, 6, 1, 1, 0)))
    for row in rows:
        for sample in row.labeled:
            record = truth[sample.image_id]
            assert torch.equal(sample.boxes, torch.from_numpy(record.boxes))
            assert sample.labels.tolist() == record.labels.tolist()
            masks = rle.decode_rle(record.rles, record.height, record.width)
            assert torch.equal(sample.masks, torch.from_numpy(masks))
        for sample in row.labeled + row.unlabeled:
            path = truth[sample.image_id].path
            with open(path, "rb") as file:
                assert torch.equal(sample.image, torch.from_numpy(decode(file.read(), path)).permute(2, 0, 1))
        assert all(s.boxes is None and s.masks is None for s in row.unlabeled)


def test_images_below_a_url_are_streamed_within_the_pixel_limit(cluster, bucket):
    client = boto3.client("s3")
    for i in range(3):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(data, "PNG")
        client.put_object(Bucket=bucket, Key=f"plain/{i}.png", Body=data.getvalue())
    records = coco.read_unlabeled(f"s3://{bucket}/plain", None)
    plan = StepPlan(seed=0, num_labeled=0, num_unlabeled=3, labeled=0, unlabeled=3)
    (row,) = batches.stream_decoded(pipeline.make_feed(plan, (), records), rank_rows(0, 1, 1, 1, 0))
    assert {(s.image_id, int(s.image[0, 0, 0])) for s in row.unlabeled} == {(0, 0), (1, 1), (2, 2)}
    with pytest.raises(Exception, match="image-pixels"):
        list(batches.stream_decoded(pipeline.make_feed(plan, (), records, max_pixels=63), rank_rows(0, 1, 1, 1, 0)))


@pytest.mark.slow
def test_a_resumed_run_from_s3_equals_an_uninterrupted_run_from_disk(cluster, bucket, tiny_coco, tmp_path):
    plain = [f"data.{part}={tiny_coco}/{part}.json" for part in ("train", "val")] + [f"data.images={tiny_coco}/images"]
    source = source_of((*plain, "data.labeled=0.25"))
    for out in (f"s3://{bucket}/set", str(tmp_path / "set")):
        write_shards(out, source, rows_per_group=2)

    def run(name: str, url: str, *more: str):
        files = ("data.train=", "data.val=", "data.images=")
        given = [word for word in words(tiny_coco, tmp_path, name) if not word.startswith(files)]
        return launch.train(compose([*given, f"data.train={url}", *more]))

    run("disk", str(tmp_path / "set"))
    half = run("s3", f"s3://{bucket}/set", "train.stop_at=4")
    assert half.step == 4
    whole = run("s3", f"s3://{bucket}/set")
    assert whole.step == STEPS
    assert_same_end(tmp_path / "s3", tmp_path / "disk", STEPS)
    for name in ("config.yaml", "data.json", "split.json", "metrics.jsonl"):
        assert "testing" not in (tmp_path / "s3" / name).read_text(), "no key is in the files of the run"
    out = tmp_path / "evaluated.json"
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "s3"), "--checkpoint", "last", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["segm"]["AP"] == pytest.approx(whole.scores["teacher/segm_AP"], abs=1e-9)
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "s3"), "--out", str(tmp_path / "predicted")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "predicted" / "overlays").iterdir())) == 4
