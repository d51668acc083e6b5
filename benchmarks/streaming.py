"""Throughput of the stream of step rows compared with a torch DataLoader over the same files, and its memory.

    python benchmarks/streaming.py

The images are JPEGs of 480 x 640 px, decoded by the same function to the same tensors, with four images per row or
batch and no network. The stream reads shards from an S3 server (moto, in a separate process on the same cores), shards
from disk, and plain files. For the DataLoader the best of 0, 1 and 2 worker processes counts. Rounds alternate, and
start-up is excluded for both. Then 20,000 images of 0.06 MB, four times the read-ahead, pass through one stream while
the object store is sampled; the peak of each quarter is printed.
"""

import argparse
import io
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from torch.utils.data import DataLoader, Dataset

from pais_ray.data.annotations.records import CocoDataset, LabeledRecord, Record
from pais_ray.data.images.images import decode
from pais_ray.data.shards import dataset
from pais_ray.data.shards.writer import Source, write_shards
from pais_ray.data.stream import batches, pipeline
from pais_ray.data.stream.plan import StepPlan, rank_rows

BATCH, WARM_UP = 4, 160  # images
SAMPLE_S = 0.02


class Files(Dataset):
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        picture = decode(Path(self.paths[i]).read_bytes(), self.paths[i])
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def pictures(folder: Path, count: int, height: int, width: int, distinct: int) -> list[Record]:
    """JPEGs of colored noise over a smooth background; beyond ``distinct`` files, links to earlier ones."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < distinct:
            ground = rng.uniform(0, 200, (6, 8, 3)).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC))
            noise = rng.integers(0, 56, (height, width, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(smooth + noise).save(data, "JPEG", quality=85)
            path.write_bytes(data.getvalue())
        else:
            os.link(folder / f"{i % distinct:06d}.jpg", path)
        records.append(Record(image_id=i, path=str(path), height=height, width=width))
    return records


def sharded(out: str, records: list[Record]) -> tuple[Record, ...]:
    """Write the records as shards; returns the records in the shards."""
    nothing = CocoDataset(path="", categories=(), records=(), sha256="0" * 64, truth={}, num_crowd=0, num_dropped=0)
    labeled = LabeledRecord(**vars(records[0]), boxes=np.zeros((0, 4)), labels=np.zeros(0, np.int64), rles=())
    write_shards(out, Source(train=nothing, parts={"train": [labeled], "unlabeled": records}, truth={}, split=None))
    return dataset.read_shards(out, "train").unlabeled or ()


def stream(records: tuple[Record, ...], images: int) -> Iterator[int]:
    """Yields the number of decoded images after each row."""
    records, groups = dataset.sort_by_group(records)
    plan = StepPlan(
        seed=0,
        num_labeled=0,
        num_unlabeled=len(records),
        labeled=0,
        unlabeled=BATCH,
        unlabeled_groups=groups,
    )
    feed = pipeline.make_feed(plan, (), records)
    for row in batches.stream_decoded(feed, rank_rows(0, images // BATCH, 1, 1, 0)):
        assert len(row.unlabeled) == BATCH
        yield (row.g + 1) * BATCH


def loader(paths: list[str], images: int, workers: int) -> Iterator[int]:
    order = torch.randperm(len(paths)).repeat(-(-images // len(paths)))[:images].tolist()
    batches = DataLoader(Files(paths), batch_size=BATCH, sampler=order, num_workers=workers, collate_fn=list)
    for done, batch in enumerate(batches, 1):
        assert len(batch) == BATCH
        yield done * BATCH


def rate(counts: Iterator[int]) -> float:
    """Images per second after the warm-up."""
    start, first, last = 0.0, 0, 0
    for last in counts:
        if last <= WARM_UP:
            start, first = time.perf_counter(), last
    return (last - first) / (time.perf_counter() - start)


def s3_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """A moto server in a separate process, and a URL on it."""
    import socket

    import boto3

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            boto3.client("s3").create_bucket(Bucket="bench")
            return process, "s3://bench/shards"
        except Exception:
            if process.poll() is not None:
                raise
            time.sleep(0.2)


def throughput(folder: Path, images: int, rounds: int) -> None:
    server, url = s3_server(folder)
    try:
        ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
        files = pictures(folder / "files", 512, 480, 640, 512)
        paths = [record.path for record in files]
        print(f"{len(files)} JPEGs of {sum(os.path.getsize(p) for p in paths) / len(paths) / 1e6:.3f} MB", flush=True)
        on_disk, on_s3 = sharded(str(folder / "shards"), files), sharded(url, files)
        runs: dict[str, Callable[[], Iterator[int]]] = {
            "shards on S3": lambda: stream(on_s3, images),
            "shards on disk": lambda: stream(on_disk, images),
            "plain files": lambda: stream(tuple(files), images),
            **{f"DataLoader, {n} workers": (lambda n=n: loader(paths, images, n)) for n in (0, 1, 2)},
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds):
            for name, run in runs.items():
                rates[name].append(rate(run()))
            print(f"round {i + 1}: " + ", ".join(f"{name} {r[-1]:.0f}" for name, r in rates.items()), flush=True)
        best = max((n for n in rates if n.startswith("DataLoader")), key=lambda n: statistics.median(rates[n]))
        for name, values in rates.items():
            ratios = [a / b for a, b in zip(values, rates[best], strict=True)]
            print(
                f"{name:>22}: {statistics.median(values):6.0f} images/s, "
                f"{statistics.median(ratios):.2f} of {best} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    finally:
        server.terminate()
        ray.shutdown()


def memory(folder: Path, images: int) -> None:
    """Print the peak size of the object store in each quarter of a stream over ``images`` images."""
    files = pictures(folder / "small", images, 240, 320, 500)
    records = sharded(str(folder / "small_shards"), files)
    size = sum(os.path.getsize(record.path) for record in files)
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    try:
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        peaks, done, ended = [0] * 4, 0, threading.Event()

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                used = get_memory_info_reply(state).store_stats.object_store_bytes_used
                quarter = min(3, 4 * done // images)
                peaks[quarter] = max(peaks[quarter], used)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for done in stream(records, images):  # noqa: B007
            pass
        ended.set()
        watcher.join()
        print(
            f"{images} images, {size / 2**20:.0f} MiB: peak of the object store by quarters "
            + ", ".join(f"{p / 2**20:.0f}" for p in peaks)
            + f" MiB (read-ahead {pipeline.READ_AHEAD_BYTES / 2**20:.0f} MiB)"
        )
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2400, help="images per measurement of throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=20_000, help="images in the measurement of memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.rounds:
            throughput(Path(folder), options.images, options.rounds)
        if options.stream:
            memory(Path(folder), options.stream)


if __name__ == "__main__":
    main()
