"""Many images through a pool of actors: COCO results in parts, finished ones kept over any kill.

Legend: a *part* is ``part_images`` images of the listing, its COCO results, and a manifest that is written last.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs
import ray
import torch

from pais_ray.augmentation.sample import Sample
from pais_ray.cluster.connect import connect
from pais_ray.data.annotations import folders
from pais_ray.data.images.images import decode
from pais_ray.data.validation import entries
from pais_ray.data.validation.rules import DataError
from pais_ray.files.atomic import create_text, replace_text
from pais_ray.files.console import echo
from pais_ray.inference.predictor import Predictor, ahead, choose_checkpoint, predict_sample

SAY_EVERY_S = 10.0  # between two lines of progress

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the content of every part; another plan needs another folder."""

    run: str
    role: str
    checkpoint: str
    weights_sha256: str
    root: str  # folder, or bucket prefix, that the names are relative to
    listing_sha256: str
    part_images: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    out: str
    parts: int
    images: int
    instances: int
    unreadable: list[Json]  # file_name and error
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
    """COCO results of all images of ``source`` (folder, bucket prefix, or COCO JSON with ``images``) in ``out``/parts.

    Paths are ones that every node sees. The same call goes on where a killed one ended. Raises ValueError where
    ``out`` holds the results of something else.
    """
    root, names = listing(source, images)
    folder = choose_checkpoint(run, role, checkpoint)
    digest = json.loads((folder / "manifest.json").read_text())["files"][f"{role}.safetensors"]["sha256"]
    plan = Plan(
        run=str(run.absolute()),
        role=role,
        checkpoint=str(folder.absolute()),
        weights_sha256=digest,
        root=root,
        listing_sha256=hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        part_images=part_images,
    )
    out = out.absolute()
    keep_plan(plan, out)
    parts = [names[i : i + part_images] for i in range(0, len(names), part_images)]
    done = {k: manifest for k in range(len(parts)) if (manifest := finished(out, k)) is not None}
    echo(f"{len(names)} images of {root} in {len(parts)} parts, {len(done)} of them finished: {out / 'parts'}")
    todo: list[Json] = [{"part": k, "images": part} for k, part in enumerate(parts) if k not in done]
    if todo:
        started_here = connect()
        try:
            left = sum(len(part) for k, part in enumerate(parts) if k not in done)
            progress(predicted(plan, out, todo, workers, use_gpu), left)
        finally:
            if started_here:
                ray.shutdown()
    return summary(
        out, len(parts), Predictor.open(run, role=role, checkpoint=str(folder)).categories if merge else None
    )


def listing(source: str, images: str | None) -> tuple[str, list[Json]]:
    """The root of ``source``, and id and name below the root of its images; without a JSON, ids by position."""
    if source.endswith(".json"):
        if images is None:
            raise ValueError(f"--images: expected the folder or bucket prefix of {source}'s images")
        return images if is_bucket(images) else os.path.abspath(images), of_json(source, images)
    if not is_bucket(source):
        root = os.path.abspath(source)
        names = [os.path.relpath(path, root) for path in folders.list_folder(root)]
        return root, [{"id": i, "name": name} for i, name in enumerate(names)]
    files, prefix = pyarrow.fs.FileSystem.from_uri(source)
    found = files.get_file_info(pyarrow.fs.FileSelector(prefix, recursive=True))
    names = sorted(os.path.relpath(info.path, prefix) for info in found if info.is_file)
    names = [n for n in names if n.lower().endswith(folders.SUFFIXES) and not any(p[0] == "." for p in n.split("/"))]
    if not names:
        raise DataError("image-missing", source, f"expected images ({' '.join(folders.SUFFIXES)}), got none")
    return source, [{"id": i, "name": name} for i, name in enumerate(names)]


def of_json(annotations: str, images: str) -> list[Json]:
    """Id and name of the images that a COCO file lists; of files in a folder, that they are there."""
    tree, _ = entries.read_tree(annotations)
    named: dict[int, str] = {}
    for entry in entries.check_list(tree, "images", annotations):
        image_id = entries.check_id(entry, "image", annotations, named)
        where = f"{annotations}: image {image_id}"
        name = entries.check_name(entries.check_text(entry, "file_name", where), where)
        if not is_bucket(images):
            entries.find_image(images, name, where)
        named[image_id] = name
    return [{"id": image_id, "name": name} for image_id, name in named.items()]


def is_bucket(place: str) -> bool:
    """Whether ``place`` is a URI. Raises ValueError where it holds a password: it would lie in plan.json."""
    if "://" in place and "@" in urlsplit(place).netloc:
        raise ValueError("a bucket's URI holds no credentials; the nodes have them from their environment")
    return "://" in place


def keep_plan(plan: Plan, out: Path) -> None:
    """Writes plan.json, or raises ValueError where ``out`` was begun with another one."""
    path = out / "plan.json"
    if path.exists():
        before, now = json.loads(path.read_text()), asdict(plan)
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(f"{path}: begun with another {', '.join(changed)}; choose another --out")
    (out / "parts").mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(plan), indent=1))


def finished(out: Path, part: int) -> Json | None:
    """The manifest of a part whose results are whole; None where they are to be made."""
    results, manifest = part_files(out, part)
    try:
        told: Json = json.loads(manifest.read_text())
        return told if told["sha256"] == hashlib.sha256(results.read_bytes()).hexdigest() else None
    except (OSError, ValueError, KeyError):
        return None


def predicted(plan: Plan, out: Path, todo: list[Json], workers: int | None, use_gpu: bool) -> Iterator[Json]:
    """Makes the parts ``todo`` on the cluster; what was made of each, as they come."""
    there = ray.cluster_resources()
    size = workers or max(1, int(there.get("GPU", 0) if use_gpu else there.get("CPU", 1) - 1))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    made = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        PartPredictor,
        fn_constructor_kwargs={"plan": plan, "out": out},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    yield from made.iter_rows()


class PartPredictor:
    """An actor of the pool: one model, part after part."""

    def __init__(self, plan: Plan, out: Path) -> None:
        torch.set_num_threads(1)  # an actor has one CPU
        self.plan, self.out = plan, out
        self.files, self.prefix = pyarrow.fs.LocalFileSystem(), plan.root
        if is_bucket(plan.root):
            self.files, self.prefix = pyarrow.fs.FileSystem.from_uri(plan.root)
        self.predictor = Predictor.open(Path(plan.run), role=plan.role, checkpoint=plan.checkpoint)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["part"], row["images"]) for row in batch.to_pylist()])

    def make(self, part: int, images: Sequence[Json]) -> Json:
        results: list[Json] = []
        seen, unreadable = [], []
        model = self.predictor
        ids = [c["id"] for c in model.categories]
        for image, sample in zip(images, ahead(self.read, images), strict=True):
            if isinstance(sample, str):
                unreadable.append({"file_name": image["name"], "error": sample})
                continue
            height, width = sample.image.shape[-2:]
            seen.append({"id": image["id"], "file_name": image["name"], "height": height, "width": width})
            results += predict_sample(model.segmentor, sample, model.config, ids, model.device)
        path, manifest = part_files(self.out, part)
        text = json.dumps(results)
        replace_text(path, text)
        told = {"instances": len(results), "images": seen, "unreadable": unreadable}
        replace_text(manifest, json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **told}))
        return {"part": part, "images": len(images), "instances": len(results), "unreadable": len(unreadable)}

    def read(self, image: Json) -> Sample | str:
        """The image, or why there is none."""
        try:
            with self.files.open_input_file(os.path.join(self.prefix, image["name"])) as file:
                picture = decode(file.read(), image["name"], self.predictor.config.data.max_pixels)
        except (OSError, DataError) as error:
            return str(error)
        return Sample(image=torch.from_numpy(picture).permute(2, 0, 1), image_id=image["id"], row=0, slot=0)


def progress(made: Iterator[Json], total: int) -> None:
    """Says how far it is, every few seconds."""
    started = said = time.monotonic()
    images = instances = 0
    for row in made:
        images, instances = images + row["images"], instances + row["instances"]
        now = time.monotonic()
        if now - said >= SAY_EVERY_S or images == total:
            said, rate = now, images / max(now - started, 1e-9)
            minutes = (total - images) / rate / 60
            echo(f"{images:>8}/{total} images | {instances} instances | {rate:.1f} img/s | ETA {minutes:.0f} min")


def summary(out: Path, parts: int, categories: list[Json] | None) -> Summary:
    """Adds up the parts, and merges them into results.json and images.json where ``categories`` are given."""
    told = [json.loads(part_files(out, k)[1].read_text()) for k in range(parts)]
    if categories is not None:
        with create_text(str(out / "results.json")) as file:
            separator = "["
            for text in (part_files(out, k)[0].read_text()[1:-1] for k in range(parts)):
                if text:
                    file.write(separator + text)
                    separator = ", "
            file.write("[]" if separator == "[" else "]")
        seen = [image for manifest in told for image in manifest["images"]]
        replace_text(out / "images.json", json.dumps({"images": seen, "categories": categories}))
    return Summary(
        out=str(out),
        parts=parts,
        images=sum(len(manifest["images"]) for manifest in told),
        instances=sum(manifest["instances"] for manifest in told),
        unreadable=[entry for manifest in told for entry in manifest["unreadable"]],
        results=None if categories is None else str(out / "results.json"),
    )


def part_files(out: Path, part: int) -> tuple[Path, Path]:
    """Where the results of a part and its manifest lie."""
    return out / "parts" / f"part-{part:06d}.json", out / "parts" / f"part-{part:06d}.manifest.json"
