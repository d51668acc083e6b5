"""One run of the learning study, without Ray: `python benchmarks/study.py OUT.json WORDS...`, one process, one thread.

WORDS are those of `pais-ray train`; step, plan, views and evaluation are those of a run with one worker.
``--holdout N`` evaluates on N images of the training part instead of the validation images, for the choice of settings;
they are not trained on. The report has the AP of teacher and student over time and, because the annotations of the
unlabeled images are available, precision and recall of the pseudo-labels at every evaluation.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_batch, make_views
from pais_ray.config.identity import flatten
from pais_ray.config.tree import Config, compose, run_schedule
from pais_ray.data.annotations import coco, ground_truth, rle, splits
from pais_ray.data.annotations.records import LabeledRecord
from pais_ray.data.stream.plan import StepPlan
from pais_ray.data.stream.samples import read_image
from pais_ray.evaluation import pseudo_labels
from pais_ray.evaluation.scoring import score
from pais_ray.inference.predictor import predict_sample
from pais_ray.runs.prepare import with_generated_data
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks
from pais_ray.train.state import build_state
from pais_ray.train.step import StepSettings, train_step


def sample_of(record: LabeledRecord, labeled: bool) -> Sample:
    pixels = read_image(record)
    if not labeled:
        return Sample.of(pixels, image_id=record.image_id)
    masks = rle.decode_rle(record.rles, record.height, record.width)
    return Sample.of(pixels, image_id=record.image_id, boxes=record.boxes, labels=record.labels, masks=masks)


def at(sample: Sample, row: int, slot: int) -> Sample:
    return Sample(**{**vars(sample), "row": row, "slot": slot})


class Study:
    """One run with its data in memory."""

    def __init__(self, config: Config, holdout: int) -> None:
        self.config = config = with_generated_data(config) if config.data.train is None else config
        train = coco.read_coco(*config.data.part("train"))
        records = list(train.records)
        if holdout:
            # These training images replace the validation images.
            self.scored, records = records[-holdout:], records[:-holdout]
            self.truth = train.path
        else:
            val = coco.read_coco(*config.data.part("val"))
            self.scored, self.truth = list(val.records), val.path
        split = splits.split([r.image_id for r in records], config.data.labeled, config.data.fold)
        by_id = {r.image_id: r for r in records}
        self.labeled = [sample_of(by_id[i], True) for i in split.labeled_ids]
        self.hidden = [by_id[i] for i in split.unlabeled_ids]
        self.unlabeled = [sample_of(r, False) for r in self.hidden]
        self.categories = [c.id for c in train.categories]
        self.schedule = run_schedule(config)
        self.state = build_state(config, self.schedule, len(self.categories), torch.device("cpu"))
        self.plan = StepPlan(
            seed=config.train.seed,
            num_labeled=len(self.labeled),
            num_unlabeled=len(self.unlabeled),
            labeled=config.batch.labeled,
            unlabeled=config.batch.unlabeled,
        )

    def run(self, every: int, micro: int) -> dict[str, Any]:
        config, state = self.config, self.state
        settings = StepSettings(
            schedule=self.schedule,
            clip_norm=config.optim.clip_norm,
            seed=config.train.seed,
            max_pseudo_labels=config.train.max_pseudo_labels,
        )
        history: list[dict[str, Any]] = []
        started = time.perf_counter()
        while state.step < self.schedule.steps:
            batches = [self.batch(state.g_next + i) for i in range(micro)]
            result = train_step(state, state.student, batches, config.method, settings)
            state.g_next += micro
            if state.step % every == 0 or state.step == self.schedule.steps:
                row = {"step": state.step, "loss": float(result.metrics["loss"]), **self.measure()}
                row["minutes"] = (time.perf_counter() - started) / 60
                history.append(row)
                print(json.dumps(row), flush=True)
        return {"config": flatten(config), "skipped": state.skipped, "history": history}

    def batch(self, g: int) -> Any:
        labeled, unlabeled = self.plan.row(g)
        return make_batch(
            [at(self.labeled[i], g, slot) for slot, i in enumerate(labeled)],
            [at(self.unlabeled[i], g, len(labeled) + slot) for slot, i in enumerate(unlabeled)]
            if self.config.method.unlabeled_weight(self.state.step)
            else [],
            self.config.scaled_views,
            self.config.train.seed,
            torch.device("cpu"),
        )

    def measure(self) -> dict[str, float]:
        """AP of both roles on the evaluation images; precision and recall of pseudo-labels on 60 unlabeled images."""
        values: dict[str, float] = {}
        truth = ground_truth.load_ground_truth(self.truth, [r.image_id for r in self.scored])
        for role, module in (("teacher", self.state.teacher.segmentor), ("student", self.state.student)):
            module.eval()
            results = [
                entry
                for record in self.scored
                for entry in predict_sample(
                    module, sample_of(record, False), self.config, self.categories, torch.device("cpu")
                )
            ]
            scores = score(truth, results)
            values |= {f"{role}/segm_{k}": scores["segm"][k] for k in ("AP", "AP50", "AP75")}
            values[f"{role}/bbox_AP"] = scores["bbox"]["AP"]
        self.state.student.train()
        values |= self.mask_iou_branch()
        if self.config.method.uses_unlabeled:
            values |= self.pseudo_label_quality(60)
        return values

    def pseudo_label_quality(self, images: int) -> dict[str, Any]:
        """Precision and recall of the pseudo-labels that the method would keep in test views of unlabeled images."""
        results = [self.predict_with_truth(record) for record in self.hidden[:images]]
        kept = [predictions[self.config.method.keeps(predictions)] for predictions, _, _ in results]
        quality = pseudo_labels.precision_recall(
            kept, [truth for _, truth, _ in results], [size for _, _, size in results]
        )
        return {f"pseudo/{k}": v for k, v in quality.items()}

    def mask_iou_branch(self, above: float = 0.05) -> dict[str, Any]:
        """Pearson correlation, calibration error and bias of the teacher's predicted mask IoU with respect to the IoU
        with the best ground-truth instance, over predictions with a class score above ``above``."""
        rows = []
        for record in self.scored:
            predictions, truth, size = self.predict_with_truth(record)
            rows += pseudo_labels.pseudo_label_table(
                predictions[predictions.scores > above], truth, size, record.image_id
            )
        if not rows:
            return {"iou_branch/predictions": 0}
        found = pseudo_labels.calibration(
            pseudo_labels.column(rows, "iou_predicted"), pseudo_labels.column(rows, "iou_true")
        )
        return {"iou_branch/predictions": len(rows)} | {f"iou_branch/{k}": found[k] for k in ("pearson", "ece", "bias")}

    def predict_with_truth(self, record: LabeledRecord) -> tuple[Predictions, Targets, tuple[int, int]]:
        """The teacher's predictions, the ground truth and the size (H, W) px of a record's test view."""
        views = make_views([sample_of(record, False)], self.config.scaled_views, 0, "test", "cpu")
        masks = torch.from_numpy(rle.decode_rle(record.rles, record.height, record.width))
        whole = Targets.ground_truth(
            boxes=torch.from_numpy(record.boxes), labels=torch.from_numpy(record.labels), masks=Masks.full(masks)
        )
        height, width = views.sizes[0].tolist()
        return self.state.teacher.predict(views)[0], whole.warp(views.matrix[0], views.sizes[0]), (height, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--holdout", type=int, default=0, help="training images to evaluate on")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--micro", type=int, default=1, help="micro-batches per step, each a row of the plan")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Study(compose(arguments.words), arguments.holdout).run(arguments.every, arguments.micro)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
