"""TODO docstring."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from pais_ray.files.atomic import replace_bytes

MOST_MARKS = 5  # different values that are all written at an axis; of more, the ends and the middle


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One configuration of a search and what it came to."""

    params: Mapping[str, object]  # every one has the same settings
    ap: float  # teacher's segm AP, the mean over seeds
    spread: float | None  # its standard deviation
    finished: bool  # False: stopped early


def curves(metrics: Sequence[Mapping[str, object]], path: Path | str) -> None:
    """Losses, AP, pseudo-labels and the rest over steps, from the rows of metrics.jsonl, to a PNG.

    Metric names are paths: each first part gets its own axes, teacher and student share those of AP. Values
    that are missing or not finite are left out.
    """
    from matplotlib.figure import Figure

    groups = _grouped(metrics)
    columns = min(3, max(1, len(groups)))
    lines = max(1, math.ceil(len(groups) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    for i, (title, series) in enumerate(groups.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name, (steps, values) in series.items():
            axes.plot(
                steps,
                values,
                label=name,
                linewidth=1.3,
                marker="o" if len(steps) < 20 else None,
                markersize=3,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    if not groups:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center")
    _save_figure(figure, path)


def parallel_coordinates(tried: Sequence[TrialPoint], log: Collection[str], path: Path | str) -> None:
    """An axis a setting and one for the AP, a line a configuration, colored by its AP; the best one thick,
    those stopped early thin and dashed. Settings named in ``log`` have logarithmic axes."""
    from matplotlib.figure import Figure

    names = [*tried[0].params, "segm AP"]
    figure = Figure(figsize=(max(5.0, 1.7 * len(names)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    columns = [_axis([t.params[name] for t in tried], name in log) for name in names[:-1]]
    columns.append(_axis([t.ap for t in tried], False))
    best = max(tried, key=lambda t: (t.finished, t.ap))
    colors = _shades([t.ap for t in tried])
    for i, one in enumerate(tried):
        axes.plot(
            range(len(names)),
            [places[i] for places, _ in columns],
            color=colors[i],
            linewidth=3 if one is best else 1.2 if one.finished else 0.8,
            linestyle="-" if one.finished else "--",
            zorder=3 if one is best else 2,
        )
    for x, (_, marks) in enumerate(columns):
        axes.axvline(x, color="0.6", linewidth=0.8, zorder=1)
        for place, text in marks:
            plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
            axes.text(x, place, text, fontsize=8, va="center", ha="center", zorder=4, bbox=plate)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_yticks([])
    axes.set_frame_on(False)
    _save_figure(figure, path)


def parameter_scatter(tried: Sequence[TrialPoint], log: Collection[str], path: Path | str) -> None:
    """AP over each setting: finished configurations filled, with their spread over seeds; those stopped early,
    whose AP is of an earlier step, hollow."""
    from matplotlib.figure import Figure

    names = list(tried[0].params)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), layout="constrained")
    for k, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, k + 1)
        places, marks = _axis([t.params[name] for t in tried], name in log)
        for one, place in zip(tried, places, strict=True):
            face = "tab:blue" if one.finished else "none"
            spread = one.spread or 0.0
            axes.errorbar(place, one.ap, spread, fmt="o", markersize=5, color="tab:blue", mfc=face, elinewidth=0.8)
        axes.set_xticks([place for place, _ in marks], [text for _, text in marks], fontsize=8)
        axes.set_xlabel(name, fontsize=9)
        axes.set_ylabel("segm AP", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    _save_figure(figure, path)


def _grouped(
    metrics: Sequence[Mapping[str, object]],
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Axes title -> metric -> (steps, values); axes in reading order, AP of classes left to the tables."""
    groups: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
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


def _axis(values: Sequence[object], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Places of the values on an axis from 0 to 1, and its marks: (place, text). What is not all numbers gets a
    place a value."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        texts = sorted({str(v) for v in values})
        at = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        return [at[str(v)] for v in values], [(place, text) for text, place in at.items()]
    scaled = [math.log(v) for v in numbers] if log else numbers
    low, high = min(scaled), max(scaled)
    span = high - low or 1.0
    marked = sorted(set(scaled))
    if len(marked) > MOST_MARKS:
        marked = [low, low + span / 2, high]
    marks = [((v - low) / span, f"{math.exp(v) if log else v:.3g}") for v in marked]
    return [(v - low) / span for v in scaled], marks


def _shades(values: Sequence[float]) -> list[object]:
    """Colors from dark (the lowest) to bright."""
    from matplotlib import colormaps

    low, high = min(values), max(values)
    return [colormaps["viridis"](0.92 * (v - low) / (high - low or 1.0)) for v in values]


def _save_figure(figure: "Figure", path: Path | str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=110)
    replace_bytes(Path(path), buffer.getvalue())
