"""Audit of a run's pseudo-labels against ground truth that training did not use: the data of Fig. 1 and 6."""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pais_ray.augmentation.views import make_views
from pais_ray.config.tree import Config
from pais_ray.data.annotations import rle
from pais_ray.data.annotations.records import LabeledRecord, annotated
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.data.sources.readers import read_labeled
from pais_ray.data.stream.samples import read_sample
from pais_ray.evaluation import pseudo_labels
from pais_ray.figures.audit import draw_audit
from pais_ray.inference.predictor import Predictor
from pais_ray.modeling.protocols import Segmentor
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

MIN_SCORE = 0.05  # class score; lower detections are noise, up to a hundred per image
TAUS_CLS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the paper uses 0.35
TAUS_IOU = (0.0, 0.3, 0.5, 0.7)  # the paper uses 0.30

Json = dict[str, Any]


@dataclass(kw_only=True)
class Totals:
    """Rows and counts over the images so far; no masks."""

    rows: list[pseudo_labels.Row] = field(default_factory=list)  # one per prediction, with the column ``kept``
    kept: dict[str, int] = field(default_factory=lambda: {"kept": 0, "truth": 0, "correct": 0})
    true_per_class: torch.Tensor  # (C,) instances of the ground truth
    kept_per_class: torch.Tensor  # (C,) pseudo-labels


def audit(
    run: Path,
    out: Path,
    *,
    annotations: str | None = None,
    images: str | None = None,
    number: int = 200,
    role: str = "teacher",
    checkpoint: str = "best",
    device: str | None = None,
) -> Json:
    """Audit a role of a run on up to ``number`` images; write predictions.csv, audit.json and audit.png to ``out``.

    The images are the run's unlabeled ones, whose annotations training did not use, or those of the file
    ``annotations``. Returns the content of audit.json. Raises ValueError if there are no such images.
    """
    predictor = Predictor.open(run, role=role, checkpoint=checkpoint, device=device)
    if annotations is None:
        records = hidden_records(run, predictor.config)
    else:
        records = annotated(predictor.validation(annotations, images))
    chosen = random.Random(0).sample(records, min(number, len(records)))
    totals = audit_images(predictor, chosen)
    report = {"run": str(run), "role": role, "images": len(chosen), **build_report(totals, predictor)}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.csv").open("w", newline="") as file:
        names = ["image_id", "class", "score", "iou_predicted", "iou_true", "class_correct", "matched", "kept"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(totals.rows)
    (out / "audit.json").write_text(json.dumps(report, indent=1))
    draw_audit(totals.rows, report, out / "audit.png")
    return report


def hidden_records(run: Path, config: Config) -> Sequence[LabeledRecord]:
    """The run's unlabeled images with their annotations. Raises ValueError if there are none."""
    if config.data.unlabeled is not None:
        raise ValueError(
            f"{run}: expected unlabeled images with annotations, got those of {config.data.unlabeled} without; "
            "give --annotations and --images of annotated images"
        )
    ids = set(SplitManifest.from_json((run / "split.json").read_text()).split.unlabeled_ids)
    records = annotated(read_labeled(*config.data.part("train"), config.data.limits()))
    found = [record for record in records if record.image_id in ids]
    if not found:
        raise ValueError(
            f"{run}: expected unlabeled images outside shards, got none; "
            "give --annotations and --images of annotated images"
        )
    return found


def audit_images(predictor: Predictor, records: Sequence[LabeledRecord]) -> Totals:
    """Compare the predictions on the images with their ground truth, one image in memory at a time."""
    num_classes = len(predictor.categories)
    totals = Totals(
        true_per_class=torch.zeros(num_classes, dtype=torch.int64),
        kept_per_class=torch.zeros(num_classes, dtype=torch.int64),
    )
    method = predictor.config.method
    for record in records:
        predictions, truth, size = predict_with_truth(predictor.segmentor, record, predictor.config, predictor.device)
        keeps = method.keeps(predictions)
        order = predictions.scores.argsort(descending=True, stable=True)
        table = pseudo_labels.pseudo_label_table(predictions, truth, size, record.image_id)
        for row, kept in zip(table, keeps[order].tolist(), strict=True):
            if row["score"] > MIN_SCORE or kept:
                totals.rows.append({**row, "kept": kept})
        counts = pseudo_labels.precision_recall([predictions[keeps]], [truth], [size])
        for name in totals.kept:
            totals.kept[name] += int(counts[name] or 0)
        totals.true_per_class += pseudo_labels.class_counts([truth], num_classes)
        totals.kept_per_class += pseudo_labels.class_counts([predictions[keeps]], num_classes)
    return totals


def predict_with_truth(
    segmentor: Segmentor, record: LabeledRecord, config: Config, device: torch.device
) -> tuple[Predictions, Targets, tuple[int, int]]:
    """The predictions, the ground truth and the size (H, W) px of a record's test view, on the CPU."""
    views = make_views([read_sample(record)], config.scaled_views, 0, "test", device)
    masks = torch.from_numpy(rle.decode_rle(record.rles, record.height, record.width))
    whole = Targets.ground_truth(
        boxes=torch.from_numpy(record.boxes), labels=torch.from_numpy(record.labels), masks=Masks.full(masks)
    )
    with torch.no_grad():
        found = segmentor.predict(views)[0].to("cpu")
    height, width = views.sizes[0].tolist()
    return found, whole.warp(views.matrix[0].cpu(), views.sizes[0].cpu()), (height, width)


def build_report(totals: Totals, predictor: Predictor) -> Json:
    """The content of audit.json, without the run, role and number of images."""
    rows, counts = totals.rows, totals.kept
    columns = {name: pseudo_labels.column(rows, name) for name in ("score", "iou_predicted", "iou_true", "matched")}
    return {
        "kept": {
            **counts,
            "precision": counts["correct"] / counts["kept"] if counts["kept"] else None,
            "recall": counts["correct"] / counts["truth"] if counts["truth"] else None,
        },
        "mask_iou": pseudo_labels.calibration(columns["iou_predicted"], columns["iou_true"]),
        "score": pseudo_labels.calibration(columns["score"], columns["matched"]),
        "thresholds": pseudo_labels.threshold_grid(rows, TAUS_CLS, TAUS_IOU),
        "classes": [
            {"name": category["name"], "truth": int(true), "kept": int(kept)}
            for category, true, kept in zip(
                predictor.categories, totals.true_per_class, totals.kept_per_class, strict=True
            )
        ],
    }


def summary(report: Json) -> str:
    """The main figures of the report as text."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    kept, iou, score = report["kept"], report["mask_iou"], report["score"]
    return "\n".join(
        [
            f"{report['images']} images, {report['role']}: {kept['kept']} pseudo-labels of {kept['truth']} instances",
            f"precision {number(kept['precision'])}, recall {number(kept['recall'])} (correct class, mask IoU >= 0.5)",
            f"predicted mask IoU: Pearson {number(iou['pearson'])} with the true mask IoU, "
            f"calibration error {number(iou['ece'])}, bias {number(iou['bias'])}",
            f"class score: calibration error {number(score['ece'])}, bias {number(score['bias'])}",
        ]
    )
