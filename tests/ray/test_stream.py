"""The stream of step rows on a real cluster: what the plan says, in order, whatever the world size."""

import pyarrow as pa
import pytest
import ray

from pais_ray.data.annotations import coco, records, splits
from pais_ray.data.stream import pipeline
from pais_ray.data.stream.plan import StepPlan, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def parts(tiny_coco):
    dataset = coco.read_coco(str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    split = splits.split([r.image_id for r in dataset.records], 0.25, 1)
    by_id = {r.image_id: r for r in dataset.records}
    return [by_id[i] for i in split.labeled_ids], [records.unlabel(by_id[i]) for i in split.unlabeled_ids]


@pytest.fixture(scope="module")
def feed(cluster, parts):
    labeled, unlabeled = parts
    plan = StepPlan(seed=7, num_labeled=len(labeled), num_unlabeled=len(unlabeled), labeled=1, unlabeled=2)
    return pipeline.make_feed(plan, labeled, unlabeled)


@pytest.mark.parametrize(("tasks", "threads"), [(1, 1), (pipeline.TASKS_PER_DATASET, 4)])
def test_rows_are_the_plans_in_order_over_a_change_of_world_size(feed, parts, tasks, threads, monkeypatch):
    """However many tasks read and threads decode."""
    monkeypatch.setattr(pipeline, "TASKS_PER_DATASET", tasks)
    labeled, unlabeled = parts
    seen = []
    for start, steps, world in ((0, 10, 2), (40, 5, 3), (60, 2, 1)):  # 4 rows a step
        for rank in range(world):
            mine = rows_of(start, steps, 4, world, rank)
            rows = list(pipeline.step_rows(feed, mine, prefetch=threads))
            assert [r.g for r in rows] == list(mine)
            for row in rows:
                of_labeled, of_unlabeled = feed.plan.row(row.g)
                assert [s.image_id for s in row.labeled] == [labeled[i].image_id for i in of_labeled]
                assert [s.image_id for s in row.unlabeled] == [unlabeled[i].image_id for i in of_unlabeled]
                assert [s.slot for s in row.labeled + row.unlabeled] == [0, 1, 2]
            seen += [r.g for r in rows]
    assert sorted(seen) == list(range(68))


@ray.remote(num_cpus=2)
class Holder:
    """Has every CPU of the cluster, as long as it lives."""

    def there(self) -> bool:
        return True


def test_a_stream_flows_where_every_cpu_is_taken(feed):
    """Else workers that wait for each other in a collective also wait for each other's images."""
    holder = Holder.remote()
    try:
        assert ray.get(holder.there.remote())
        rows = list(pipeline.step_rows(feed, rows_of(0, 3, 2, 2, 0)))
    finally:
        ray.kill(holder)
    assert [row.g for row in rows] == [0, 2, 4]


def test_labels_of_the_unlabeled_part_are_nowhere(feed, parts):
    table = ray.get(feed.unlabeled)
    assert isinstance(table, pa.Table)
    assert table.column_names == ["image_id", "path", "height", "width"]
    row = next(pipeline.step_rows(feed, rows_of(0, 1, 1, 1, 0)))
    assert all(s.boxes is None and s.labels is None and s.masks is None for s in row.unlabeled)
    assert all(s.boxes is not None for s in row.labeled)


def test_pixels_are_those_of_the_files(feed, parts):
    from pathlib import Path

    import torch

    from pais_ray.data.images.images import decode

    paths = {r.image_id: r.path for part in parts for r in part}
    row = next(pipeline.step_rows(feed, rows_of(3, 1, 1, 1, 0)))
    for sample in row.labeled + row.unlabeled:
        path = paths[sample.image_id]
        expected = torch.from_numpy(decode(Path(path).read_bytes(), path)).permute(2, 0, 1)
        assert torch.equal(sample.image, expected)
