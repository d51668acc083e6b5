"""Score COCO results with the evaluators of ``evaluators/``. Torch-free: training scores in separate processes.

An evaluator computes a family of metrics, which it yields as (name, value) pairs. A module of ``evaluators/`` lists its
evaluators in ``EVALUATORS``; the folder is the registry, so a new metric is a new file or a new pair.
"""

import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pais_ray.data.annotations.ground_truth import load_ground_truth
from pais_ray.data.annotations.rle import Json
from pais_ray.evaluation import evaluators as folder
from pais_ray.evaluation.results import check_results, has_boxes_only, read_results

CLASS = "AP_class/"  # prefix of the AP of one class, before the name of the class
LOGGED_CLASSES = "segm"  # the evaluator whose AP per class training logs


class Evaluator(Protocol):
    """A family of metrics of detections against ground truth."""

    @property
    def name(self) -> str:
        """Prefix of the metric names: "segm" for segm_AP."""

    @property
    def needs_masks(self) -> bool:
        """Whether every result must have a mask."""

    def supports(self, truth: Json) -> bool:
        """Whether the metrics are defined for this ground truth."""

    def evaluate(self, truth: Json, results: Sequence[Json]) -> Iterator[tuple[str, float | None]]:
        """Yields (metric, value): ("AP", 0.3), ("AP_class/cat", None). None means that there is no object to find.

        ``truth`` comes from ``load_ground_truth``, and the results have been checked. Raises DataError if the ground
        truth lacks something that the metrics need.
        """


@lru_cache
def list_evaluators() -> tuple[Evaluator, ...]:
    """The evaluators of all modules in ``evaluators/``, those of COCO first."""
    names = sorted((module.name for module in pkgutil.iter_modules(folder.__path__)), key=lambda n: (n != "coco", n))
    modules = [importlib.import_module(f"{folder.__name__}.{name}") for name in names]
    return tuple(evaluator for module in modules for evaluator in module.EVALUATORS)


def score(
    ground_truth: Json | str | Path,
    results: list[Json] | str | Path,
    evaluators: Sequence[str] | None = None,
) -> dict[str, Json]:
    """Metrics, unrounded: {"segm": {"AP": ..., "AP50": ..., "per_class": {name: AP}}, "bbox": {...}}.

    Both arguments are files or their content. None is the value of a metric without an object to find (pycocotools
    returns -1). ``evaluators`` names the families of metrics; by default they are all that support the ground truth, or
    those that need no masks if the results have none. For ground truth from Cityscapes, {"cityscapes": {"AP", "AP50",
    "per_class"}} is the instance AP of that benchmark. Missing boxes are computed from the masks. Raises DataError (a
    ValueError) that names file, entry, rule and remedy.
    """
    known = {evaluator.name: evaluator for evaluator in list_evaluators()}
    if unknown := [name for name in evaluators or () if name not in known]:
        raise ValueError(f"evaluators: expected some of {', '.join(known)}, got {unknown[0]!r}")
    truth = load_ground_truth(ground_truth)
    entries, place = read_results(results)
    if evaluators is None:
        boxes_only = has_boxes_only(entries)
        chosen = [e for e in known.values() if e.supports(truth) and not (boxes_only and e.needs_masks)]
    else:
        chosen = [known[name] for name in evaluators]
    check_results(entries, place, truth, needs_masks=any(evaluator.needs_masks for evaluator in chosen))
    return {evaluator.name: _nest(evaluator.evaluate(truth, entries)) for evaluator in chosen}


def score_metrics(ground_truth: Json | str | Path, results: list[Json] | str | Path) -> dict[str, float]:
    """The metrics that training logs, by name: segm_AP, bbox_AP, segm_AP_class/NAME and so on.

    Metrics without an object to find are left out; for a class, the value is NaN.
    """
    scores = score(ground_truth, results)
    values = {
        f"{name}_{metric}": value
        for name, metrics in scores.items()
        for metric, value in metrics.items()
        if isinstance(value, float | int)
    }
    classes = scores[LOGGED_CLASSES]["per_class"] if LOGGED_CLASSES in scores else {}
    for class_name, ap in classes.items():
        values[f"{LOGGED_CLASSES}_{CLASS}{class_name}"] = math.nan if ap is None else ap
    return values


def format_table(scores: Mapping[str, Json]) -> str:
    """Scores as text: one line per evaluator, then the AP of each class; "-" if there is no value."""

    def cell(value: float | None, width: int = 7) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{width}}"

    metrics = list(dict.fromkeys(m for values in scores.values() for m in values if m != "per_class"))
    head = max(map(len, [*scores, "segm "])) + 1
    lines = [" " * head + "".join(f"{metric:>7}" for metric in metrics)]
    lines += [f"{name:<{head}}" + "".join(cell(values.get(m)) for m in metrics) for name, values in scores.items()]
    per_class = {name: values.get("per_class", {}) for name, values in scores.items()}
    classes = list(dict.fromkeys(class_name for values in per_class.values() for class_name in values))
    widest = max(map(len, [*classes, "class"]))
    widths = {name: max(10, len(name) + 5) for name in scores}
    lines += ["", f"{'class':<{widest}}" + "".join(f"{f'{name} AP':>{width}}" for name, width in widths.items())]
    for class_name in classes:
        values = (cell(per_class[name].get(class_name), width) for name, width in widths.items())
        lines.append(f"{class_name:<{widest}}" + "".join(values))
    return "\n".join(lines)


def _nest(pairs: Iterator[tuple[str, float | None]]) -> Json:
    """Pairs as a mapping with the AP of classes under "per_class"."""
    metrics: Json = {}
    per_class: dict[str, float | None] = {}
    for name, value in pairs:
        if name.startswith(CLASS):
            per_class[name.removeprefix(CLASS)] = value
        else:
            metrics[name] = value
    return {**metrics, "per_class": per_class}
