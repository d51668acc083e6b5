"""Line charts of metrics, and charts of the trials of a search. matplotlib is imported late: it takes a second."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from pais_ray.files.atomic import replace_bytes

MAX_TICKS = 5  # an axis with more different values has ticks at the ends and the middle only


Series = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One configuration of a search with its result."""

    params: Mapping[str, object]  # the same settings in all points
    ap: float  # segm AP of the teacher, mean over seeds
    spread: float | None  # standard deviation of the AP
    finished: bool  # False: stopped early


def curves(metrics: Sequence[Mapping[str, object]], path: Path | str) -> None:
    """Write a PNG with losses, AP, pseudo-label counts and all other metrics of the rows of metrics.jsonl over steps.

    Metric names are paths: each first part has its own axes; teacher and student share the axes of AP. Values that
    are missing or not finite are left out.
    """
    from matplotlib.figure import Figure

    groups = _group_metrics(metrics)
    columns = min(3, max(1, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    for i, (title, series) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, (steps, values) in series.items():
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, label=name, linewidth=1.3, marker=marker, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    if not groups:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center")
    save_figure(figure, path)


def parallel_coordinates(points: Sequence[TrialPoint], log: Collection[str], path: Path | str) -> None:
    """Write a chart with one axis per setting and one for the AP, and one line per configuration, colored by its AP.

    The best configuration is thick, those stopped early are thin and dashed. Settings named in ``log`` have
    logarithmic axes.
    """
    from matplotlib.figure import Figure

    names = [*points[0].params, "segm AP"]
    figure = Figure(figsize=(max(5.0, 1.7 * len(names)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    columns = [_unit_scale([point.params[name] for point in points], name in log) for name in names[:-1]]
    columns.append(_unit_scale([point.ap for point in points], False))
    best = max(points, key=lambda point: (point.finished, point.ap))
    colors = _colors_by_value([point.ap for point in points])
    for i, point in enumerate(points):
        axes.plot(
            range(len(names)),
            [positions[i] for positions, _ in columns],
            color=colors[i],
            linewidth=3 if point is best else 1.2 if point.finished else 0.8,
            linestyle="-" if point.finished else "--",
            zorder=3 if point is best else 2,
        )
    for x, (_, ticks) in enumerate(columns):
        axes.axvline(x, color="0.6", linewidth=0.8, zorder=1)
        for position, text in ticks:
            plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
            axes.text(x, position, text, fontsize=8, va="center", ha="center", zorder=4, bbox=plate)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_yticks([])
    axes.set_frame_on(False)
    save_figure(figure, path)


def parameter_scatter(points: Sequence[TrialPoint], log: Collection[str], path: Path | str) -> None:
    """Write a chart of the AP over each setting.

    Finished configurations are filled, with their spread over seeds. Those stopped early, whose AP is of an earlier
    step, are hollow.
    """
    from matplotlib.figure import Figure

    names = list(points[0].params)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * rows), layout="constrained")
    for k, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, k + 1)
        positions, ticks = _unit_scale([point.params[name] for point in points], name in log)
        for point, x in zip(points, positions, strict=True):
            face = "tab:blue" if point.finished else "none"
            spread = point.spread or 0.0
            axes.errorbar(x, point.ap, spread, fmt="o", markersize=5, color="tab:blue", mfc=face, elinewidth=0.8)
        axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=8)
        axes.set_xlabel(name, fontsize=9)
        axes.set_ylabel("segm AP", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def _group_metrics(metrics: Sequence[Mapping[str, object]]) -> dict[str, dict[str, Series]]:
    """Axes title -> metric -> series; axes in reading order. The APs of single classes are left to the tables."""
    groups: dict[str, dict[str, Series]] = {}
    for row in metrics:
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in row.items():
            if name in ("step", "time") or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            head, _, tail = name.rpartition("/")
            if head in ("teacher", "student"):
                if tail not in ("segm_AP", "segm_AP50", "bbox_AP"):
                    continue
                head, tail = "AP", name
            elif name.startswith(("teacher/", "student/")):
                continue
            steps, values = groups.setdefault(head or "other", {}).setdefault(tail, ([], []))
            steps.append(step)
            values.append(float(value))
    order = ["labeled", "unlabeled", "AP", "pseudo"]
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0]) if item[0] in order else 9, item[0])))


def _unit_scale(values: Sequence[object], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Positions of the values on an axis from 0 to 1, and its ticks: (position, text). Values that are not all
    numbers are categories with equal distances."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        texts = sorted({str(v) for v in values})
        at = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        return [at[str(v)] for v in values], [(position, text) for text, position in at.items()]
    scaled = [math.log(v) for v in numbers] if log else numbers
    low, high = min(scaled), max(scaled)
    span = high - low or 1.0
    marked = sorted(set(scaled))
    if len(marked) > MAX_TICKS:
        marked = [low, low + span / 2, high]
    ticks = [((v - low) / span, f"{math.exp(v) if log else v:.3g}") for v in marked]
    return [(v - low) / span for v in scaled], ticks


def _colors_by_value(values: Sequence[float]) -> list[object]:
    """Colors from dark (lowest value) to bright."""
    from matplotlib import colormaps

    low, high = min(values), max(values)
    return [colormaps["viridis"](0.92 * (v - low) / (high - low or 1.0)) for v in values]


def save_figure(figure: "Figure", path: Path | str) -> None:
    """Write the figure atomically, in the format of the suffix of ``path``, by default PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=110)
    replace_bytes(Path(path), buffer.getvalue())
