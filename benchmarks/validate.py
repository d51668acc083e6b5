"""Measures time and memory of `pais-ray validate` on generated annotations of COCO's size, without image files.

118 k images and 860 k instances as in train2017, with 1.1 polygons of 20 points each, 1 % crowds as RLE, and instance
sizes distributed like COCO's. Reports seconds and the peak resident memory of the process tree (the sampled sum over
processes).
"""

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil


def generate(path: Path, images: int, instances: int) -> None:
    """Writes a valid COCO file."""
    rng = random.Random(0)
    sizes = [(640, 480), (480, 640), (640, 427), (500, 375)]
    crowd = crowd_rle()
    with path.open("w") as file:
        file.write('{"info": {}, "categories": [')
        file.write(", ".join(json.dumps({"id": i + 1, "name": f"class {i}"}) for i in range(80)))
        file.write('], "images": [')
        for i in range(images):
            width, height = sizes[i % len(sizes)]
            entry = {"id": i, "file_name": f"{i:012}.jpg", "width": width, "height": height, "license": 1}
            file.write((",\n" if i else "\n") + json.dumps(entry))
        file.write('], "annotations": [')
        for i in range(instances):
            image = rng.randrange(images)
            width, height = sizes[image % len(sizes)]
            common = {"id": i, "image_id": image, "category_id": rng.randrange(80) + 1}
            if i % 100 == 0 and width == 640 and height == 480:
                entry = common | {"iscrowd": 1} | crowd
            else:
                entry = common | {"iscrowd": 0} | outline(rng, width, height)
            file.write((",\n" if i else "\n") + json.dumps(entry))
        file.write("]}")


def outline(rng: random.Random, width: int, height: int) -> dict[str, object]:
    """Returns an annotation with a star-shaped polygon of 12 to 28 points, or two of them side by side."""
    radius = min(math.exp(rng.uniform(math.log(6), math.log(180))), min(width, height) / 2 - 1)
    two = radius < width / 4 - 1 and rng.random() < 0.15
    polygons, area = [], 0.0
    for part in range(1 + two):
        count = rng.randint(12, 28)
        left, right = (part * width / 2, (part + 1) * width / 2) if two else (0, width)
        x, y = rng.uniform(left + radius, right - radius), rng.uniform(radius, height - radius)
        turns = [2 * math.pi * k / count for k in range(count)]
        lengths = [radius * rng.uniform(0.7, 1) for _ in turns]
        points = [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(lengths, turns, strict=True)]
        polygons.append([round(value, 2) for point in points for value in point])
        neighbors = zip(lengths, lengths[1:] + lengths[:1], strict=True)
        area += 0.5 * math.sin(2 * math.pi / count) * sum(a * b for a, b in neighbors)
    xs = [v for p in polygons for v in p[0::2]]
    ys = [v for p in polygons for v in p[1::2]]
    box = [min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2)]
    return {"segmentation": polygons, "area": area, "bbox": box}


def crowd_rle() -> dict[str, object]:
    """Returns the mask, box and area of a crowd."""
    mask = np.zeros((1, 480, 640), dtype=bool)
    mask[0, 100:200, 50:400] = np.random.default_rng(0).random((100, 350)) < 0.5
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask[0].ravel(order="F"), [2]]))))
    return {
        "segmentation": {"size": [480, 640], "counts": runs.tolist()},
        "bbox": [50, 100, 350, 100],
        "area": int(mask.sum()),
    }


def measure(command: list[str]) -> tuple[float, float, int]:
    """Runs a command and returns (seconds, peak resident GiB of the process tree, exit code)."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not done.wait(0.1):
            try:
                peak = max(peak, sum(p.memory_info().rss for p in [tree, *tree.children(recursive=True)]))
            except psutil.NoSuchProcess:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    return seconds, peak / 1024**3, code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--instances", type=int, default=860_001)
    parser.add_argument(
        "--file", type=Path, help="annotation file to use, generated if it does not exist (default: a temporary file)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "instances.json"
        if not path.exists():
            generate(path, options.images, options.instances)
        arguments = ["--annotations", str(path), "--json", str(Path(folder) / "report.json")]
        seconds, peak, code = measure([sys.executable, "-m", "pais_ray.cli", "validate", *arguments])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((Path(folder) / "report.json").read_text())
        print(
            f"validate: {report['images']} images, {report['annotations']} annotations, "
            f"{os.path.getsize(path) / 2**20:.0f} MiB of JSON: {seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s "
            f"of CPU), peak {peak:.2f} GiB, exit code {code}"
        )


if __name__ == "__main__":
    main()
