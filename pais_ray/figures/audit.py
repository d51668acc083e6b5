"""The figure of an audit: calibration of scores, losses of the thresholds, and class counts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pais_ray.figures.charts import save_figure

MAX_POINTS = 5000  # of a scatter plot; with more, points cover each other


def draw_audit(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], path: Path) -> None:
    """Write the figure of the ``rows`` and the ``report`` of ``reports.audit`` as PNG.

    The panels correspond to Fig. 1a, 1b, 1c and 6 of the paper.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    score, quality, lost, classes = figure.subplots(2, 2).ravel()
    drawn = rows[:: max(1, len(rows) // MAX_POINTS)]
    for axes, name, title in (
        (score, "score", "class score and true mask IoU (Fig. 1a)"),
        (quality, "iou_predicted", "predicted and true mask IoU (Fig. 1b)"),
    ):
        for kept, color in ((False, "0.6"), (True, "tab:blue")):
            group = [row for row in drawn if row["kept"] is kept]
            axes.scatter([r[name] for r in group], [r["iou_true"] for r in group], s=6, alpha=0.5, c=color)
        axes.set(xlabel=name, ylabel="true mask IoU", title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    bins = report["mask_iou"]["bins"]
    quality.plot([b["predicted"] for b in bins], [b["true"] for b in bins], "o-", c="tab:red")
    quality.plot([0, 1], [0, 1], ":", c="0.3", linewidth=1)
    for tau_iou in dict.fromkeys(cell["tau_iou"] for cell in report["thresholds"]):
        line = [cell for cell in report["thresholds"] if cell["tau_iou"] == tau_iou]
        lost.plot(
            [c["tau_cls"] for c in line], [c["lost_good"] for c in line], "o-", markersize=3, label=f"tau_iou {tau_iou}"
        )
    lost.set(
        xlabel="tau_cls",
        ylabel="good masks (true IoU > .7) not kept",
        title="good masks lost by the thresholds (Fig. 1c)",
    )
    lost.legend(fontsize=8, frameon=False)
    names = [c["name"] for c in report["classes"]]
    for offset, key, label in ((-0.2, "truth", "ground truth"), (0.2, "kept", "kept")):
        classes.bar([i + offset for i in range(len(names))], [c[key] for c in report["classes"]], 0.4, label=label)
    classes.set_title("instances per class (Fig. 6)")
    classes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    classes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
