"""Memory that Ray keeps for finished data sets: the stream of a long run creates one after the other.

    python benchmarks/renewal.py        (500 data sets of 16 rows, three minutes)

Prints the private resident memory in MiB of Ray's processes and of the reader after every hundredth data set.
"""

import argparse
import contextlib
import json
import tempfile

import psutil
import ray

from pais_ray.cluster import connect
from pais_ray.data.annotations import coco
from pais_ray.data.annotations.records import unlabel
from pais_ray.data.stream import batches, pipeline
from pais_ray.data.stream.plan import StepPlan, rank_rows
from pais_ray.data.synthetic import generator

MARKS = ("gcs_server", "raylet/raylet", "_StatsActor", "_AutoscalingCoordinatorActor", "IDLE", "dashboard/dashboard")


def resident() -> dict[str, float]:
    """Memory in MiB by kind of process. This process is the reader."""
    found: dict[str, float] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            info, line = process.memory_info(), " ".join(process.cmdline())
            mark = next((m for m in MARKS if m in line), "reader" if process == psutil.Process() else None)
            if mark is not None:
                found[mark] = round(found.get(mark, 0.0) + (info.rss - info.shared) / 2**20, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500)
    args = parser.parse_args()
    pipeline.TASKS_PER_DATASET = 1  # each data set ends after its first task
    with tempfile.TemporaryDirectory() as folder:
        generator.generate(folder, train=12, val=4, size=96, seed=3)
        records = list(coco.read_coco(f"{folder}/train.json", f"{folder}/images").records)
        connect.connect()
        labeled, unlabeled = records[:4], [unlabel(record) for record in records[4:]]
        plan = StepPlan(seed=0, num_labeled=len(labeled), num_unlabeled=len(unlabeled), labeled=1, unlabeled=1)
        feed, size = pipeline.make_feed(plan, labeled, unlabeled), pipeline.rows_per_task(plan)
        for made in range(args.number):
            rows = list(batches.stream_decoded(feed, rank_rows(made * size, size, 1, 1, 0)))
            assert len(rows) == size
            if (made + 1) % 100 == 0 or made == 0:
                print(json.dumps({"data_sets": made + 1, **resident()}), flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
