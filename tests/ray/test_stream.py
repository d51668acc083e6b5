"""The stream of step rows on a real cluster: the rows of the plan, in order, for every world size."""

import dataclasses
from pathlib import Path

import pytest
import ray
import torch

from pais_ray.augmentation.presets import AugmentConfig
from pais_ray.data.annotations import coco, records, splits
from pais_ray.data.images.images import decode
from pais_ray.data.stream import batches, pipeline
from pais_ray.data.stream.plan import StepPlan, rank_rows
from pais_ray.data.stream.rows import build_tables

VIEWS = AugmentConfig().at_size(64)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def parts(tiny_coco):
    dataset = coco.read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    split = splits.split([r.image_id for r in dataset.records], 0.25, 1)
    by_id = {r.image_id: r for r in dataset.records}
    return [by_id[i] for i in split.labeled_ids], [records.unlabel(by_id[i]) for i in split.unlabeled_ids]


@pytest.fixture(scope="module")
def plan(parts):
    labeled, unlabeled = parts
    return StepPlan(seed=7, num_labeled=len(labeled), num_unlabeled=len(unlabeled), labeled=1, unlabeled=2)


@pytest.fixture(scope="module")
def feed(cluster, plan, parts):
    return pipeline.make_feed(plan, *parts)


@pytest.mark.parametrize(("tasks", "threads"), [(1, 1), (pipeline.TASKS_PER_DATASET, 4)])
def test_rows_follow_the_plan_over_a_change_of_world_size(feed, parts, tasks, threads, monkeypatch):
    """For any number of reading tasks and decoding threads."""
    monkeypatch.setattr(pipeline, "TASKS_PER_DATASET", tasks)
    labeled, unlabeled = parts
    seen = []
    for start, steps, world in ((0, 10, 2), (40, 5, 3), (60, 2, 1)):  # 4 rows per step
        for rank in range(world):
            mine = rank_rows(start, steps, 4, world, rank)
            rows = list(batches.stream_decoded(feed, mine, prefetch=threads))
            assert [r.g for r in rows] == list(mine)
            for row in rows:
                of_labeled, of_unlabeled = feed.plan.row(row.g)
                assert [s.image_id for s in row.labeled] == [labeled[i].image_id for i in of_labeled]
                assert [s.image_id for s in row.unlabeled] == [unlabeled[i].image_id for i in of_unlabeled]
                assert [s.slot for s in row.labeled + row.unlabeled] == [0, 1, 2]
            seen += [r.g for r in rows]
    assert sorted(seen) == list(range(68))


@pytest.mark.parametrize("rank", [0, 1])
def test_no_unlabeled_image_is_read_during_the_burn_in(cluster, plan, parts, rank):
    """The unlabeled files do not exist: the stream fails at the first row that needs one, and not before."""
    labeled, unlabeled = parts
    missing = [dataclasses.replace(record, path=f"{record.path}.missing") for record in unlabeled]
    feed = pipeline.make_feed(plan, labeled, missing)
    rows = rank_rows(40, 30, 3, 2, rank, labeled_only_steps=20)  # more rows than one block holds
    stream = batches.stream_decoded(feed, rows)
    seen = [next(stream) for _ in range(rows.num_labeled_only)]
    assert [row.g for row in seen] == [rows[i] for i in range(rows.num_labeled_only)]
    assert all(len(row.labeled) == 1 and row.unlabeled == [] for row in seen)
    with pytest.raises(Exception, match="image-missing"):
        next(stream)


@pytest.mark.parametrize("labeled_only", [0, 2, 5])
def test_the_burn_in_changes_nothing_but_the_unlabeled_part(feed, plan, parts, labeled_only):
    """Images, seeds and global rows are those of a stream without burn-in, and of ``local_batches``."""
    whole, rows = rank_rows(6, 5, 3, 2, 0), rank_rows(6, 5, 3, 2, 0, labeled_only_steps=labeled_only)
    expected = list(batches.stream_batches(feed, whole, VIEWS, "cpu"))
    streamed = list(batches.stream_batches(feed, rows, VIEWS, "cpu"))
    local = list(batches.load_batches(plan, build_tables(*parts), rows, VIEWS))
    assert len(expected) == len(streamed) == len(local) == 5
    for step in range(5):
        for one, burned_in, alike in zip(expected[step], streamed[step], local[step], strict=True):
            assert (one is None) == (burned_in is None) == (alike is None)
            if one is None:
                continue
            for batch in (burned_in, alike):
                assert torch.equal(batch.labeled.images, one.labeled.images)
                assert batch.labeled.rows.tolist() == one.labeled.rows.tolist()
                assert torch.equal(batch.targets[0].boxes, one.targets[0].boxes)
                assert torch.equal(batch.targets[0].masks.grids, one.targets[0].masks.grids)
                if step < labeled_only:
                    assert batch.weak is None
                    assert batch.strong is None
                else:
                    assert torch.equal(batch.weak.images, one.weak.images)
                    assert torch.equal(batch.strong.images, one.strong.images)
                    assert batch.weak.image_ids.tolist() == one.weak.image_ids.tolist()


def test_ranks_without_a_row_in_the_first_round_start_with_none(feed):
    steps = list(batches.stream_batches(feed, rank_rows(0, 2, 3, 2, 0), VIEWS, "cpu"))
    assert [[batch is None for batch in step] for step in steps] == [[True, False]] * 2
    assert [step[1].labeled.rows.tolist() for step in steps] == [[1], [4]]


@ray.remote(num_cpus=2)
class CpuHolder:
    """Reserves every CPU of the cluster while it exists."""

    def is_ready(self) -> bool:
        return True


def test_a_stream_does_not_need_a_free_cpu(feed):
    """Otherwise workers that wait for each other in a collective would also wait for each other's images."""
    holder = CpuHolder.remote()
    try:
        assert ray.get(holder.is_ready.remote())
        rows = list(batches.stream_decoded(feed, rank_rows(0, 3, 2, 2, 0)))
    finally:
        ray.kill(holder)
    assert [row.g for row in rows] == [0, 2, 4]


def test_the_unlabeled_part_has_no_labels(feed):
    table = ray.get(feed.tables).unlabeled
    assert table.column_names == ["image_id", "path", "height", "width"]
    row = next(batches.stream_decoded(feed, rank_rows(0, 1, 1, 1, 0)))
    assert all(s.boxes is None and s.labels is None and s.masks is None for s in row.unlabeled)
    assert all(s.boxes is not None for s in row.labeled)


def test_pixels_equal_those_of_the_files(feed, parts):
    paths = {r.image_id: r.path for part in parts for r in part}
    row = next(batches.stream_decoded(feed, rank_rows(3, 1, 1, 1, 0)))
    for sample in row.labeled + row.unlabeled:
        path = paths[sample.image_id]
        expected = torch.from_numpy(decode(Path(path).read_bytes(), path)).permute(2, 0, 1)
        assert torch.equal(sample.image, expected)
