"""Shards and plain images on an S3-compatible server: the same as on disk, also over a bad connection."""

import logging
from pathlib import Path

import boto3
import pytest

from pais_ray.cli.data.shard import source_of
from pais_ray.config.data_section import DataConfig
from pais_ray.data.annotations.coco import read_unlabeled
from pais_ray.data.images.reader import Reader, image_name
from pais_ray.data.shards import dataset, writer
from pais_ray.data.shards.writer import write_shards
from pais_ray.data.validation.rules import DataError
from pais_ray.files import storage
from pais_ray.runs.prepare import read_data
from tests.support.cutting_proxy import CuttingProxy

LAYOUT = {"rows_per_group": 4, "rows_per_file": 8}


@pytest.fixture
def source(tiny_coco):
    words = [f"data.{part}={tiny_coco}/{part}.json" for part in ("train", "val")] + [f"data.images={tiny_coco}/images"]
    return source_of((*words, "data.labeled=0.25"))


@pytest.fixture
def proxy(s3):
    with CuttingProxy(s3, after=8000) as proxy:  # within the second image of a row group
        yield proxy


def bytes_read(records, **options) -> dict[int, bytes]:
    """Image id -> bytes, every record read once."""
    reader = Reader(**options)
    rows = [(r.image_id, reader.read(r.path, r.image_id)["bytes"]) for r in records]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_objects_equal_the_files_on_disk(bucket, source, tmp_path):
    write_shards(f"s3://{bucket}/a b/shards", source, **LAYOUT)
    write_shards(str(tmp_path), source, **LAYOUT)
    client = boto3.client("s3")
    keys = (item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"])
    found = {key: key.split("/")[-1] for key in keys if not key.endswith("/")}  # some tools create objects for folders
    assert set(found.values()) == {p.name for p in tmp_path.iterdir()}
    for key, name in found.items():
        assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == (tmp_path / name).read_bytes()


def test_shards_read_from_s3_equal_those_on_disk(bucket, source, tmp_path):
    write_shards(f"s3://{bucket}/shards", source, **LAYOUT)
    write_shards(str(tmp_path), source, **LAYOUT)
    remote, local = (read_data(DataConfig(train=folder)) for folder in (f"s3://{bucket}/shards", str(tmp_path)))
    assert remote.manifest == local.manifest
    assert remote.facts["training"]["shards_sha256"] == local.facts["training"]["shards_sha256"]
    assert remote.unlabeled_groups == local.unlabeled_groups
    for part in ("labeled", "unlabeled", "val"):
        assert bytes_read(getattr(remote, part)) == bytes_read(getattr(local, part))


def test_writing_continues_after_an_interruption(bucket, source, monkeypatch):
    out = f"s3://{bucket}/shards"

    def stop_at_val(out, name, *more):
        if name.startswith("val"):
            raise KeyboardInterrupt
        return write_file(out, name, *more)

    write_file = writer._write_file
    monkeypatch.setattr(writer, "_write_file", stop_at_val)
    with pytest.raises(KeyboardInterrupt):
        write_shards(out, source, **LAYOUT)
    monkeypatch.undo()
    images = []
    made = write_shards(out, source, **LAYOUT, progress=lambda items, count: images.append(count) or items)
    assert images == [made.parts["val"]]
    assert set(storage.list_files(out)) == {dataset.MANIFEST, *(file.name for file in made.files)}


@pytest.mark.parametrize("cuts", [3, pytest.param(40, marks=pytest.mark.slow, id="40, too many for the S3 client")])
def test_no_image_is_lost_or_repeated_when_the_connection_is_cut_within_a_row_group(bucket, source, proxy, cuts):
    write_shards(f"s3://{bucket}/shards", source, **LAYOUT)
    records = read_data(DataConfig(train=proxy.url(bucket, "shards"))).unlabeled
    expected = {r.image_id: Path(r.path).read_bytes() for r in source.parts["unlabeled"]}
    proxy.cuts = cuts
    assert bytes_read(records) == expected
    assert proxy.cuts == 0, "the connection was cut as often as configured"


def test_failed_reads_are_retried_and_counted(bucket, source, proxy, monkeypatch, caplog):
    """The S3 client itself does not retry after status 403."""
    write_shards(f"s3://{bucket}/shards", source, **LAYOUT)
    records = read_data(DataConfig(train=proxy.url(bucket, "shards"))).unlabeled
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    proxy.refusals = 3
    with caplog.at_level(logging.WARNING):
        assert len(bytes_read(records)) == 9
    assert proxy.refusals == 0
    assert pauses == [0.5, 1.0, 2.0]
    assert [record.args[1:3] for record in caplog.records] == [(n, storage.ATTEMPTS) for n in (1, 2, 3)]


def test_the_final_read_error_names_the_url_and_no_key(bucket, source, proxy, monkeypatch):
    write_shards(f"s3://{bucket}/shards", source, **LAYOUT)
    records = read_data(DataConfig(train=proxy.url(bucket, "shards"))).unlabeled
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    proxy.refusals = 10**6
    with pytest.raises(storage.StorageError, match=rf"s3://{bucket}/shards/unlabeled-0000.*failed 6 times") as caught:
        bytes_read(records)
    assert len(pauses) == storage.ATTEMPTS - 1
    assert "testing" not in str(caught.value)
    with pytest.raises(DataError, match=r"manifest.json.*file-read"):
        dataset.read_shards(proxy.url(bucket, "shards"), "train")


def test_a_truncated_object_and_an_unfinished_folder_are_refused(bucket, source):
    write_shards(f"s3://{bucket}/shards", source, **LAYOUT)
    client = boto3.client("s3")
    key = "shards/unlabeled-00001.parquet"
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=body[:-100])
    with pytest.raises(DataError, match=rf"s3://{bucket}/{key}: expected {len(body)} bytes .*shard-truncated"):
        read_data(DataConfig(train=f"s3://{bucket}/shards"))
    client.delete_object(Bucket=bucket, Key="shards/manifest.json")
    with pytest.raises(DataError, match=r"shard-manifest"):
        read_data(DataConfig(train=f"s3://{bucket}/shards"))


def test_a_prefix_of_plain_images_is_an_unlabeled_part(bucket, tiny_coco):
    files = sorted((tiny_coco / "images").iterdir())[:4]
    names = ["b/2.png", "b/10 ä#?.PNG", "a.png", ".hidden/x.png"]
    client = boto3.client("s3")
    for name, file in zip([*names, "notes.txt"], [*files, files[0]], strict=True):
        client.put_object(Bucket=bucket, Key=f"photos/{name}", Body=file.read_bytes())
    records = read_unlabeled(f"s3://{bucket}/photos/", None)
    assert [(r.image_id, image_name(r.path)) for r in records] == [(0, "a.png"), (1, "10 ä#?.PNG"), (2, "2.png")]
    assert {(r.height, r.width) for r in records} == {(0, 0)}, "no header was read"
    assert bytes_read(records) == {i: files[n].read_bytes() for i, n in enumerate((2, 1, 0))}
    with pytest.raises(DataError, match="image-missing"):
        read_unlabeled(f"s3://{bucket}/nothing", None)


def test_sharding_a_prefix_reads_the_sizes_from_the_headers(bucket, tiny_coco, source, tmp_path):
    file = next((tiny_coco / "images").iterdir())
    boto3.client("s3").put_object(Bucket=bucket, Key="photos/a.png", Body=file.read_bytes())
    words = [f"data.{part}={tiny_coco}/{part}.json" for part in ("train", "val")] + [f"data.images={tiny_coco}/images"]
    write_shards(str(tmp_path), source_of((*words, f"data.unlabeled=s3://{bucket}/photos")), **LAYOUT)
    made = read_data(DataConfig(train=str(tmp_path)))
    assert [(r.height, r.width) for r in made.unlabeled] == [(96, 96)]
    assert len(made.labeled) == 12
