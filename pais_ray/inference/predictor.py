"""A checkpoint and images -> COCO results, in the images' own frame. No Ray: used by workers and by the CLI."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import click
import numpy as np
import torch
from PIL import Image

from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_views
from pais_ray.config.tree import Config, load
from pais_ray.data.annotations.folders import read_folder
from pais_ray.data.annotations.records import CocoDataset, Record
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.data.images.images import decode, upright_size
from pais_ray.data.images.reader import Reader, name_of
from pais_ray.data.sources.readers import is_folder, read_labeled
from pais_ray.data.validation.rules import MAX_PIXELS, DataError
from pais_ray.evaluation import coco
from pais_ray.figures.overlay import draw_instances
from pais_ray.files import storage
from pais_ray.modeling import registry
from pais_ray.modeling.precision import autocast
from pais_ray.modeling.protocols import Segmentor
from pais_ray.runs.checkpoints import CheckpointError, best_checkpoint, load_segmentor, newest_verified
from pais_ray.runs.prepare import held_out, prepare
from pais_ray.structures import geometry

AHEAD, THREADS = 4, 2  # images decoded ahead of the network, and the threads that do it

Item = TypeVar("Item")
Read = TypeVar("Read")


def predict_records(
    segmentor: Segmentor,
    records: Iterable[Record],
    config: Config,
    category_ids: list[int],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """COCO results of ``segmentor`` on images, in their own frame; decoding runs ahead in two threads."""
    reader = Reader()

    def read(record: Record) -> Sample:
        image = torch.from_numpy(read_picture(record, reader)).permute(2, 0, 1)
        return Sample(image=image, image_id=record.image_id, row=0, slot=0)

    for sample in ahead(read, records):
        yield from predict_sample(segmentor, sample, config, category_ids, device)


def ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Iterator[Read]:
    """``read`` of each item, in order, made in two threads while the caller works on the one before."""
    return storage.map_in_order(read, items, THREADS, AHEAD)


def predict_sample(
    segmentor: Segmentor, sample: Sample, config: Config, category_ids: list[int], device: torch.device
) -> list[dict[str, Any]]:
    """COCO results of one image in its own frame."""
    views = make_views([sample], config.scaled_views, config.train.seed, "test", device)
    with torch.no_grad(), autocast(device, config.train.precision):
        prediction = segmentor.predict(views)[0].to("cpu")
    height, width = sample.image.shape[-2:]
    there = prediction.warp(geometry.invert(views.matrix[0].cpu()), torch.tensor([height, width]))
    return coco.to_results(there, sample.image_id, (height, width), category_ids)


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """One role of one checkpoint, ready to look at images."""

    segmentor: Segmentor
    config: Config
    categories: list[dict[str, Any]]  # id and name as in the data set, by label
    device: torch.device
    manifest: SplitManifest | None = None  # of the run; None for an exported model

    @classmethod
    def open(cls, run: Path, *, role: str = "teacher", checkpoint: str = "best", device: str | None = None) -> Self:
        """The ``best`` or ``last`` checkpoint of a run directory, or the checkpoint directory named."""
        if not (run / "config.yaml").exists():
            raise ValueError(f"{run}: expected a run directory with config.yaml; `pais-ray train` makes them")
        config = load(run / "config.yaml")
        manifest = SplitManifest.from_json((run / "split.json").read_text())
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        segmentor = registry.segmentor(config.segmentor.name)(len(manifest.classes), config.segmentor, pretrained=False)
        load_segmentor(segmentor, choose_checkpoint(run, role, checkpoint), role)
        categories = [{"id": c.id, "name": c.name} for c in manifest.classes]
        segmentor.to(where).eval()
        return cls(segmentor=segmentor, config=config, categories=categories, device=where, manifest=manifest)

    def results(self, records: Sequence[Record], label: str) -> list[dict[str, Any]]:
        """COCO results of images, with a progress bar on a terminal."""
        ids = [c["id"] for c in self.categories]
        with click.progressbar(records, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            return list(predict_records(self.segmentor, bar, self.config, ids, self.device))

    def of_bytes(self, data: bytes, where: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The upright picture (H, W, 3) of an encoded image within the run's size cap, and its COCO results. Raises
        DataError naming ``where``."""
        picture = decode(data, where, self.config.data.max_pixels)
        sample = Sample(image=torch.from_numpy(picture).permute(2, 0, 1), image_id=0, row=0, slot=0)
        ids = [c["id"] for c in self.categories]
        return picture, predict_sample(self.segmentor, sample, self.config, ids, self.device)

    def evaluate(self, annotations: str | None = None, images: str | None = None) -> dict[str, Any]:
        """COCO AP on the run's validation images, or on other annotated ones; of Cityscapes also its own."""
        dataset = self.validation(annotations, images)
        return coco.score(dataset.truth, self.results(dataset.records, "evaluating"))

    def validation(self, annotations: str | None = None, images: str | None = None) -> CocoDataset:
        """The run's validation set, or other annotations with the same categories."""
        data = self.config.data
        if annotations is None and data.holds_out and self.manifest is not None:
            dataset = held_out(read_labeled(*data.part("train"), data.limits()), self.manifest)
        elif annotations is None:
            dataset = read_labeled(*data.part("val"), data.limits(), "val")
        elif images is None and not is_folder(annotations):
            raise ValueError(f"--images: expected the folder of {annotations}'s images")
        else:
            dataset = read_labeled(annotations, images, data.limits(), "val")
        if [c.id for c in dataset.categories] != [c["id"] for c in self.categories]:
            raise DataError(
                "categories",
                dataset.path,
                "has other categories than the run was trained on",
                "map them first",
            )
        return dataset

    def unlabeled(self) -> Sequence[Record]:
        """The run's unlabeled images, with the ids they have in it."""
        data = self.config.data.model_copy(update={"pseudo_labels": None})
        return prepare(self.config.model_copy(update={"data": data}))[1].unlabeled

    def predict(
        self, records: Sequence[Record], out: Path, draw_above: float, draw: int | None = None
    ) -> dict[str, Any]:
        """Writes results.json, images.json and overlays/ (of the first ``draw`` images) for ``records``."""
        results = self.results(records, "predicting")
        (out / "overlays").mkdir(parents=True, exist_ok=True)
        listing = [{"id": r.image_id, "file_name": r.path, "height": r.height, "width": r.width} for r in records]
        (out / "results.json").write_text(json.dumps(results))
        (out / "images.json").write_text(json.dumps({"images": listing, "categories": self.categories}, indent=1))
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            if result["score"] >= draw_above:
                of_image[result["image_id"]].append(result)
        names = {c["id"]: c["name"] for c in self.categories}
        reader = Reader()
        for record in records[:draw]:
            picture = draw_results(record, of_image[record.image_id], names, reader)
            stem = f"{record.image_id:06d}_{Path(name_of(record.path)).stem}"
            Image.fromarray(picture).save(out / "overlays" / f"{stem}.jpg", quality=90)
        drawn = sum(len(v) for v in of_image.values())
        return {
            "images": len(records),
            "instances": drawn,
            "results": str(out / "results.json"),
            "out": str(out),
        }


def read_picture(record: Record, reader: Reader | None = None) -> np.ndarray:
    """The upright picture (H, W, 3) uint8 of a record, whose size has passed the cap of its data. ``reader`` helps
    where many are read one after the other."""
    data = (reader or Reader()).read(record.path, record.image_id)["bytes"]
    return decode(data, record.path, max(MAX_PIXELS, record.height * record.width))


def image_records(sources: Sequence[Path]) -> Sequence[Record]:
    """Records of image files and of all images in folders, ids by position."""
    found: list[tuple[str, int, int]] = []
    for source in sources:
        if source.is_dir():
            found += [(r.path, r.height, r.width) for r in read_folder(str(source))]
        else:
            found.append((str(source), *upright_size(str(source))))
    return [Record(image_id=i, path=p, height=h, width=w) for i, (p, h, w) in enumerate(found)]


def draw_results(
    record: Record, results: Sequence[dict[str, Any]], names: dict[int, str], reader: Reader | None = None
) -> np.ndarray:
    """The image (H, W, 3) uint8 with COCO results drawn over it."""
    image = read_picture(record, reader)
    rles = [r["segmentation"]["counts"].encode() for r in results]
    boxes = np.array([r["bbox"] for r in results], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    ids = sorted(names)
    labels = np.array([ids.index(r["category_id"]) for r in results], dtype=np.int64)
    scores = np.array([r["score"] for r in results], dtype=np.float32)
    masks = decode_rle(rles, *image.shape[:2]).astype(bool)
    return draw_instances(image, boxes, labels, scores, masks, [names[i] for i in ids])


def choose_checkpoint(run: Path, role: str, which: str) -> Path:
    """The directory of the ``best`` checkpoint of ``role``, of the ``last`` good one, or the one named."""
    last, refused = newest_verified(run)
    if last is None:
        raise CheckpointError(f"{run}: no usable checkpoint ({'; '.join(refused) or 'none was written yet'})")
    if which == "last":
        return last
    if which != "best":
        return Path(which)
    return best_checkpoint(run, last, role) or last
