"""Predict many images with a pool of actors: COCO results in parts, which survive a kill of the command.

Legend: a *part* is ``part_images`` images of the list, their COCO results, and a manifest that is written last.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from pais_ray.augmentation.sample import Sample
from pais_ray.cluster.connect import connect
from pais_ray.data.annotations import folders
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.reader import Reader
from pais_ray.data.stream.samples import read_ahead, read_sample
from pais_ray.data.validation import entries
from pais_ray.data.validation.rules import DataError
from pais_ray.files import storage
from pais_ray.files.atomic import create_text, replace_text
from pais_ray.files.console import echo
from pais_ray.inference.predictor import Predictor, choose_checkpoint, predict_sample

REPORT_EVERY_S = 10.0  # between two lines of progress

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Everything that determines the content of the parts. A different plan needs a different output folder."""

    run: str
    role: str
    checkpoint: str
    weights_sha256: str
    root: str  # folder or URL that the names of images are relative to
    listing_sha256: str
    part_images: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The counts of all finished parts."""

    out: str
    parts: int
    images: int
    instances: int
    unreadable: list[Json]  # file_name and error of images that are missing or damaged
    failed: list[Json]  # part and error of parts that could not be finished; the same command retries them
    results: str | None  # the merged file


def batch_predict(
    run: Path,
    source: str,
    out: Path,
    *,
    images: str | None = None,
    role: str = "teacher",
    checkpoint: str = "best",
    part_images: int = 100,
    workers: int | None = None,
    use_gpu: bool = False,
    merge: bool = False,
) -> Summary:
    """COCO results of all images of ``source`` (folder, URL, or COCO JSON with ``images``) in ``out``/parts.

    Every node must be able to access the paths. Repeating the call after a kill continues with the missing parts. A
    part that cannot be read is not written, and the others are finished. Raises ValueError if ``out`` contains results
    of another plan.
    """
    root, listed = list_images(source, images)
    folder = choose_checkpoint(run, role, checkpoint)
    digest = json.loads((folder / "manifest.json").read_text())["files"][f"{role}.safetensors"]["sha256"]
    plan = BatchPlan(
        run=str(run.absolute()),
        role=role,
        checkpoint=str(folder.absolute()),
        weights_sha256=digest,
        root=root,
        listing_sha256=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        part_images=part_images,
    )
    out = out.absolute()
    check_plan(plan, out)
    write_plan(plan, out)
    parts = [listed[i : i + part_images] for i in range(0, len(listed), part_images)]
    finished = {k for k in range(len(parts)) if is_finished(out, k)}
    echo(f"{len(listed)} images of {root} in {len(parts)} parts, {len(finished)} of them finished: {out / 'parts'}")
    todo: list[Json] = [{"part": k, "images": part} for k, part in enumerate(parts) if k not in finished]
    failed: list[Json] = []
    if todo:
        started_here = connect()
        try:
            left = sum(len(item["images"]) for item in todo)
            failed = report_progress(predict_parts(plan, out, todo, workers, use_gpu), left)
        finally:
            if started_here:
                ray.shutdown()
    results = None
    if merge and not failed:
        results = merge_parts(out, len(parts), Predictor.open(run, role=role, checkpoint=str(folder)).categories)
    return summarize(out, len(parts), failed, results)


def list_images(source: str, images: str | None) -> tuple[str, list[Json]]:
    """The root of ``source``, and the id and the name below the root of each of its images.

    Without a COCO JSON the id is the position in the list. Raises DataError or ValueError.
    """
    if source.endswith(".json"):
        if images is None:
            raise ValueError(f"--images: expected the folder or URL of the images of {source}")
        return storage.absolute(storage.check_url(images)), list_coco_images(source, images)
    root = storage.absolute(storage.check_url(source))
    if storage.is_url(source):
        names = folders.list_prefix_names(source)
    else:
        names = [os.path.relpath(path, root) for path in folders.list_folder(root)]
    return root, [{"id": i, "name": name} for i, name in enumerate(names)]


def list_coco_images(annotations: str, images: str) -> list[Json]:
    """Id and name of the images in a COCO file. Raises DataError if a name leads out of the folder ``images``, or if a
    local folder does not have the file."""
    tree, _ = entries.read_tree(annotations)
    names: dict[int, str] = {}
    for entry in entries.check_list(tree, "images", annotations):
        image_id = entries.check_id(entry, "image", annotations, names)
        place = f"{annotations}: image {image_id}"
        name = entries.check_name(entries.check_text(entry, "file_name", place), place)
        if not storage.is_url(images):
            entries.find_image(images, name, place)
        names[image_id] = name
    return [{"id": image_id, "name": name} for image_id, name in names.items()]


def check_plan(plan: BatchPlan, out: Path) -> None:
    """Raises ValueError if ``out`` contains results of another plan."""
    path = out / "plan.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), asdict(plan)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{path}: was created with a different {', '.join(changed)}; choose another --out")


def write_plan(plan: BatchPlan, out: Path) -> None:
    """Create the output folder with plan.json."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    replace_text(out / "plan.json", json.dumps(asdict(plan), indent=1))


def is_finished(out: Path, part: int) -> bool:
    """Whether a part has a manifest and its results are complete."""
    results, manifest = part_files(out, part)
    try:
        digest = json.loads(manifest.read_text())["sha256"]
        return bool(digest == hashlib.sha256(results.read_bytes()).hexdigest())
    except (OSError, ValueError, KeyError):
        return False


def predict_parts(
    plan: BatchPlan, out: Path, todo: Sequence[Json], workers: int | None, use_gpu: bool
) -> Iterator[Json]:
    """Predict the parts ``todo`` on the cluster; yields the outcome of each as it is done."""
    resources = ray.cluster_resources()
    size = workers or max(1, int(resources.get("GPU", 0) if use_gpu else resources.get("CPU", 1) - 1))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    outcomes = ray.data.from_items(list(todo), override_num_blocks=len(todo)).map_batches(
        PartPredictor,
        fn_constructor_kwargs={"plan": plan, "out": out},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    yield from outcomes.iter_rows()


class PartPredictor:
    """An actor of the pool: it has one model and predicts one part after the other."""

    def __init__(self, plan: BatchPlan, out: Path) -> None:
        torch.set_num_threads(1)  # an actor has one CPU
        self.root, self.out = plan.root, out
        self.reader = Reader()
        self.predictor = Predictor.open(Path(plan.run), role=plan.role, checkpoint=plan.checkpoint)

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes = []
        for row in batch.to_pylist():
            outcome: Json = {"part": row["part"], "images": len(row["images"]), "instances": 0, "error": None}
            try:
                outcome["instances"] = self.predict_part(row["part"], row["images"])
            except OSError as error:
                outcome["error"] = str(error)
            outcomes.append(outcome)
        return pa.Table.from_pylist(outcomes)

    def predict_part(self, part: int, images: Sequence[Json]) -> int:
        """Write the results and the manifest of a part; returns the number of instances. Raises OSError."""
        results: list[Json] = []
        read, unreadable = [], []
        model = self.predictor
        ids = [c["id"] for c in model.categories]
        for image, sample in zip(images, read_ahead(self.read, images), strict=True):
            if isinstance(sample, DataError):
                unreadable.append({"file_name": image["name"], "error": str(sample)})
                continue
            height, width = sample.image.shape[-2:]
            read.append({"id": image["id"], "file_name": image["name"], "height": height, "width": width})
            results += predict_sample(model.segmentor, sample, model.config, ids, model.device)
        path, manifest = part_files(self.out, part)
        text = json.dumps(results)
        replace_text(path, text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts = {"sha256": digest, "instances": len(results), "images": read, "unreadable": unreadable}
        replace_text(manifest, json.dumps(facts))
        return len(results)

    def read(self, image: Json) -> Sample | DataError:
        """The image, or the error if it is missing or damaged. Raises OSError if it cannot be read."""
        record = Record(image_id=image["id"], path=storage.join(self.root, image["name"]), height=0, width=0)
        try:
            return read_sample(record, self.reader, self.predictor.config.data.max_pixels)
        except DataError as error:
            return error


def report_progress(outcomes: Iterable[Json], total: int) -> list[Json]:
    """Print a line of progress every few seconds; returns part and error of the failed parts."""
    started = reported = time.monotonic()
    images = instances = 0
    failed: list[Json] = []
    for outcome in outcomes:
        if outcome["error"] is not None:
            failed.append({"part": outcome["part"], "error": outcome["error"]})
        images, instances = images + outcome["images"], instances + outcome["instances"]
        now = time.monotonic()
        if now - reported >= REPORT_EVERY_S or images == total:
            reported, rate = now, images / max(now - started, 1e-9)
            minutes = (total - images) / rate / 60
            echo(f"{images:>8}/{total} images | {instances} instances | {rate:.1f} img/s | ETA {minutes:.0f} min")
    return failed


def merge_parts(out: Path, parts: int, categories: list[Json]) -> str:
    """Write results.json and images.json of all parts; returns the path of results.json."""
    with create_text(str(out / "results.json")) as file:
        separator = "["
        for text in (part_files(out, k)[0].read_text()[1:-1] for k in range(parts)):
            if text:
                file.write(separator + text)
                separator = ", "
        file.write("[]" if separator == "[" else "]")
    images = [image for k in range(parts) for image in read_part_manifest(out, k)["images"]]
    replace_text(out / "images.json", json.dumps({"images": images, "categories": categories}))
    return str(out / "results.json")


def summarize(out: Path, parts: int, failed: list[Json], results: str | None) -> Summary:
    """Add up the manifests of all parts that did not fail."""
    unfinished = {entry["part"] for entry in failed}
    manifests = [read_part_manifest(out, k) for k in range(parts) if k not in unfinished]
    return Summary(
        out=str(out),
        parts=parts,
        images=sum(len(manifest["images"]) for manifest in manifests),
        instances=sum(manifest["instances"] for manifest in manifests),
        unreadable=[entry for manifest in manifests for entry in manifest["unreadable"]],
        failed=failed,
        results=results,
    )


def read_part_manifest(out: Path, part: int) -> Json:
    manifest: Json = json.loads(part_files(out, part)[1].read_text())
    return manifest


def part_files(out: Path, part: int) -> tuple[Path, Path]:
    """The paths of the results and of the manifest of a part."""
    return out / "parts" / f"part-{part:06d}.json", out / "parts" / f"part-{part:06d}.manifest.json"
