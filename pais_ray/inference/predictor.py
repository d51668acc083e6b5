"""Predict with a checkpoint: images to COCO results in the frame of the images. Does not need Ray; workers and the CLI
use it."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
from pais_ray.data.images.reader import Reader, image_name
from pais_ray.data.sources.readers import is_folder, read_labeled
from pais_ray.data.stream.samples import read_image, read_samples
from pais_ray.data.validation.rules import DataError
from pais_ray.evaluation.results import to_results
from pais_ray.evaluation.scoring import score
from pais_ray.figures.overlay import draw_instances
from pais_ray.modeling import registry
from pais_ray.modeling.precision import autocast
from pais_ray.modeling.protocols import Segmentor
from pais_ray.runs.checkpoints import CheckpointError, best_checkpoint, load_segmentor, newest_verified
from pais_ray.runs.prepare import held_out, prepare
from pais_ray.structures import geometry

TOP_DRAWN = 3  # instances drawn per image if no instance of any image reaches the drawing threshold

Json = dict[str, Any]


def predict_records(
    segmentor: Segmentor,
    records: Iterable[Record],
    config: Config,
    category_ids: list[int],
    device: torch.device,
) -> Iterator[Json]:
    """COCO results of ``segmentor`` on images, in their own frame. Images are read and decoded in advance."""
    for sample in read_samples(records):
        yield from predict_sample(segmentor, sample, config, category_ids, device)


def predict_sample(
    segmentor: Segmentor, sample: Sample, config: Config, category_ids: list[int], device: torch.device
) -> list[Json]:
    """COCO results of one image in its own frame."""
    views = make_views([sample], config.scaled_views, config.train.seed, "test", device)
    with torch.no_grad(), autocast(device, config.train.precision):
        prediction = segmentor.predict(views)[0].to("cpu")
    height, width = sample.image.shape[-2:]
    in_image = prediction.warp(geometry.invert(views.matrix[0].cpu()), torch.tensor([height, width]))
    return to_results(in_image, sample.image_id, (height, width), category_ids)


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """The model of one role of one checkpoint, ready to predict."""

    segmentor: Segmentor
    config: Config
    categories: list[Json]  # id and name as in the data set, in the order of labels
    device: torch.device
    manifest: SplitManifest | None = None  # split of the run; None for an exported model

    @classmethod
    def open(cls, run: Path, *, role: str = "teacher", checkpoint: str = "best", device: str | None = None) -> Self:
        """Load the ``best`` or ``last`` checkpoint of a run directory, or a given checkpoint directory.

        ``device`` defaults to CUDA if it is available. Raises ValueError if ``run`` is not a run directory.
        """
        if not (run / "config.yaml").exists():
            raise ValueError(f"{run}: expected a run directory with config.yaml, as `pais-ray train` creates it")
        config = load(run / "config.yaml")
        manifest = SplitManifest.from_json((run / "split.json").read_text())
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        segmentor = registry.segmentor(config.segmentor.name)(len(manifest.classes), config.segmentor, pretrained=False)
        load_segmentor(segmentor, choose_checkpoint(run, role, checkpoint), role)
        categories = [{"id": c.id, "name": c.name} for c in manifest.classes]
        segmentor.to(where).eval()
        return cls(segmentor=segmentor, config=config, categories=categories, device=where, manifest=manifest)

    def results(self, records: Sequence[Record], label: str) -> list[Json]:
        """COCO results of images, with a progress bar on a terminal."""
        ids = [c["id"] for c in self.categories]
        with click.progressbar(records, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            return list(predict_records(self.segmentor, bar, self.config, ids, self.device))

    def predict_bytes(self, data: bytes, place: str) -> tuple[np.ndarray, list[Json]]:
        """Decode one encoded image: the upright image (H, W, 3) uint8 and its COCO results.

        Raises DataError, which names ``place``, if the image does not decode or exceeds the run's size limit.
        """
        pixels = decode(data, place, self.config.data.max_pixels)
        ids = [c["id"] for c in self.categories]
        results = predict_sample(self.segmentor, Sample.of(pixels, image_id=0), self.config, ids, self.device)
        return pixels, results

    def evaluate(self, annotations: str | None = None, images: str | None = None) -> Json:
        """Scores on the run's validation images or on other annotated images, as ``scoring.score`` returns them."""
        dataset = self.validation(annotations, images)
        return score(dataset.truth, self.results(dataset.records, "evaluating"))

    def validation(self, annotations: str | None = None, images: str | None = None) -> CocoDataset:
        """The run's validation set, or other annotations with the same categories. Raises ValueError."""
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
                "its categories differ from those of the run",
                "map them to the categories of the run",
            )
        return dataset

    def unlabeled(self) -> Sequence[Record]:
        """The run's unlabeled images with the image ids of the run."""
        data = self.config.data.model_copy(update={"pseudo_labels": None})
        return prepare(self.config.model_copy(update={"data": data}))[1].unlabeled

    def predict(self, records: Sequence[Record], out: Path, draw_above: float, draw: int | None = None) -> Json:
        """Write results.json, images.json and overlays/ (of the first ``draw`` images) for ``records``.

        The overlays show instances with a score of at least ``draw_above``. If no instance of any image reaches it,
        they show the best few of each image. Returns the counts of images, of instances in results.json and of drawn
        instances.
        """
        results = self.results(records, "predicting")
        (out / "overlays").mkdir(parents=True, exist_ok=True)
        listing = [{"id": r.image_id, "file_name": r.path, "height": r.height, "width": r.width} for r in records]
        (out / "results.json").write_text(json.dumps(results))
        (out / "images.json").write_text(json.dumps({"images": listing, "categories": self.categories}, indent=1))
        to_draw = select_drawn(results, draw_above)
        names = {c["id"]: c["name"] for c in self.categories}
        reader = Reader()
        for record in records[:draw]:
            overlay = draw_results(record, to_draw.get(record.image_id, []), names, reader)
            stem = f"{record.image_id:06d}_{Path(image_name(record.path)).stem}"
            Image.fromarray(overlay).save(out / "overlays" / f"{stem}.jpg", quality=90)
        return {
            "images": len(records),
            "instances": len(results),
            "drawn": sum(len(to_draw.get(record.image_id, [])) for record in records[:draw]),
            "reach_threshold": sum(result["score"] >= draw_above for result in results),
            "results": str(out / "results.json"),
            "out": str(out),
        }


def select_drawn(results: Iterable[Json], draw_above: float) -> dict[int, list[Json]]:
    """Image id -> results to draw: those with a score of at least ``draw_above``, or the best ``TOP_DRAWN`` of each
    image if no result at all reaches it."""
    by_image: dict[int, list[Json]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    above = {image_id: [r for r in own if r["score"] >= draw_above] for image_id, own in by_image.items()}
    if any(above.values()):
        return above
    return {image_id: sorted(own, key=lambda r: -r["score"])[:TOP_DRAWN] for image_id, own in by_image.items()}


def image_records(sources: Sequence[Path]) -> Sequence[Record]:
    """Records of image files and of all images in folders. The image id is the position in the list."""
    found: list[tuple[str, int, int]] = []
    for source in sources:
        if source.is_dir():
            found += [(r.path, r.height, r.width) for r in read_folder(str(source))]
        else:
            found.append((str(source), *upright_size(str(source))))
    return [Record(image_id=i, path=p, height=h, width=w) for i, (p, h, w) in enumerate(found)]


def draw_results(
    record: Record, results: Sequence[Json], names: Mapping[int, str], reader: Reader | None = None
) -> np.ndarray:
    """The image (H, W, 3) uint8 with its COCO results drawn over it. ``names`` maps category ids to names."""
    image = read_image(record, reader)
    rles = [r["segmentation"]["counts"].encode() for r in results]
    boxes = np.array([r["bbox"] for r in results], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    ids = sorted(names)
    labels = np.array([ids.index(r["category_id"]) for r in results], dtype=np.int64)
    scores = np.array([r["score"] for r in results], dtype=np.float32)
    masks = decode_rle(rles, *image.shape[:2]).astype(bool)
    return draw_instances(image, boxes, labels, scores, masks, [names[i] for i in ids])


def choose_checkpoint(run: Path, role: str, which: str) -> Path:
    """The directory of the ``best`` checkpoint of ``role``, of the ``last`` valid one, or of a given path ``which``.

    Raises CheckpointError if the run has no usable checkpoint.
    """
    last, refused = newest_verified(run)
    if last is None:
        raise CheckpointError(f"{run}: no usable checkpoint ({'; '.join(refused) or 'none has been written'})")
    if which == "last":
        return last
    if which != "best":
        return Path(which)
    return best_checkpoint(run, last, role) or last
