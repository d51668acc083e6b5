"""Predictions of runs on the same validation images beside the ground truth, as in Fig. 5 of the paper. No Ray."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pais_ray.data.annotations.records import LabeledRecord, annotated
from pais_ray.data.annotations.rle import decode_rle
from pais_ray.data.stream.samples import read_image
from pais_ray.figures import canvas
from pais_ray.figures.overlay import draw_instances
from pais_ray.inference.predictor import Predictor, draw_results

DRAW_ABOVE = 0.5  # score, as in `pais-ray predict`


def of_run(root: Path, images: int) -> np.ndarray:
    """The gallery (H, W, 3) uint8 of a run's best teacher: ground truth and predictions, one row per image."""
    predictor = Predictor.open(root, device="cpu")  # visible GPUs may be in use by other runs
    return gallery({"best teacher": predictor}, choose_records(annotated(predictor.validation()), images))


def of_runs(roots: Sequence[Path], images: int, role: str, draw_above: float) -> np.ndarray:
    """The gallery of the best checkpoints of ``role`` of several runs, one column per run.

    Raises ValueError if their validation annotations differ.
    """
    names = [root.name for root in roots]
    titles = names if len(set(names)) == len(names) else [str(root) for root in roots]
    predictors = {title: Predictor.open(root, role=role) for title, root in zip(titles, roots, strict=True)}
    datasets = {name: predictor.validation() for name, predictor in predictors.items()}
    first, dataset = next(iter(datasets.items()))
    for name, other in datasets.items():
        if other.sha256 != dataset.sha256:
            raise ValueError(
                f"{name}: expected the same validation annotations as {first}, got different ones; omit --out"
            )
    return gallery(predictors, choose_records(annotated(dataset), images), draw_above)


def choose_records(records: Sequence[LabeledRecord], count: int) -> list[LabeledRecord]:
    """Up to ``count`` images with instances, evenly spread over all of them: the same for every run."""
    non_empty = [record for record in records if len(record.labels)] or list(records)
    positions = np.linspace(0, len(non_empty) - 1, min(count, len(non_empty))).round().astype(int)
    return [non_empty[i] for i in positions]


def gallery(
    predictors: Mapping[str, Predictor], records: Sequence[LabeledRecord], draw_above: float = DRAW_ABOVE
) -> np.ndarray:
    """An image (H, W, 3) uint8 with a column of ground truth and one titled column per predictor.

    All predictors have the same categories. Instances with a score below ``draw_above`` are not drawn.
    """
    names = {c["id"]: c["name"] for c in next(iter(predictors.values())).categories}
    columns = [[draw_truth(record, list(names.values())) for record in records]]
    for title, predictor in predictors.items():
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for result in predictor.results(records, title):
            if result["score"] >= draw_above:
                of_image[result["image_id"]].append(result)
        columns.append([draw_results(record, of_image[record.image_id], names) for record in records])
    titles = ["ground truth", *predictors]
    head = [canvas.add_caption(column[0], title) for column, title in zip(columns, titles, strict=True)]
    cells = head + [column[i] for i in range(1, len(records)) for column in columns]
    return canvas.grid(cells, columns=len(columns))


def draw_truth(record: LabeledRecord, names: Sequence[str]) -> np.ndarray:
    """The image (H, W, 3) uint8 with its ground truth drawn over it."""
    masks = decode_rle(record.rles, record.height, record.width).astype(bool)
    return draw_instances(read_image(record), record.boxes, record.labels, None, masks, names)
