"""The result of a run: read from its directory, printed as a summary, completed in MLflow."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pais_ray.config.tree import Config
from pais_ray.figures import canvas, charts
from pais_ray.files.console import echo
from pais_ray.files.json_lines import metric_rows
from pais_ray.modeling.optim import Schedule
from pais_ray.reports import gallery
from pais_ray.runs.checkpoints import ROLES, best_checkpoint, newest_verified
from pais_ray.tracking import record, settings
from pais_ray.tracking.logger import build_logger

SUMMARY = ("segm AP", "segm AP50", "segm AP75", "bbox AP", "bbox AP50")
GALLERY_IMAGES = 4  # validation images in figures/predictions.png


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run; the content of ``--json``."""

    run_id: str | None
    run_dir: str
    step: int
    steps: int
    stopped: bool
    best_checkpoint: str | None
    last_checkpoint: str | None
    scores: dict[str, float]  # of the last evaluation, ``teacher/segm_AP`` ...

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary; the segm AP of both roles is null without an evaluation."""
        head = {k: v for k, v in vars(self).items() if k != "scores"}
        return {**head, "teacher/segm_AP": None, "student/segm_AP": None, **self.scores}


def read_result(root: Path, schedule: Schedule, *, stopped: bool) -> TrainResult:
    """The result of the run in directory ``root``."""
    last, _ = newest_verified(root)
    state = {} if last is None else json.loads((last / "state.json").read_text())
    scores: dict[str, float] = {}
    for row in metric_rows(root):
        scores |= {k: v for k, v in row.items() if k.startswith(("teacher/", "student/")) and "_class/" not in k}
    best = None if last is None else best_checkpoint(root, last, "teacher")
    return TrainResult(
        run_id=record.read_run_id(root),
        run_dir=str(root),
        step=state.get("step", 0),
        steps=schedule.steps,
        stopped=stopped,
        best_checkpoint=None if best is None else str(best),
        last_checkpoint=None if last is None else str(last),
        scores=scores,
    )


def summary(result: TrainResult, config: Config) -> str:
    """The lines printed at the end: a table of AP, the run directory, the command that opens MLflow."""
    lines = []
    if "teacher/segm_AP" in result.scores:
        lines.append(f"{'':8}" + "".join(f"{name:>12}" for name in SUMMARY))
        for role in ROLES:
            figures = [result.scores.get(f"{role}/{name.replace(' ', '_')}") for name in SUMMARY]
            lines.append(f"{role:8}" + "".join(f"{'-' if v is None else f'{v:.3f}':>12}" for v in figures))
    lines.append(f"run directory: {result.run_dir}")
    lines.append(f"MLflow UI:     {settings.ui_command(config.tracking, Path(result.run_dir).parent)}")
    return "\n".join(lines)


def finish_tracking(root: Path, config: Config, status: record.Status) -> None:
    """Draws the final figures and ends the run in MLflow with ``status``."""
    try:
        rows = metric_rows(root)
        if rows:
            charts.curves(rows, root / "figures" / "curves.png")
        if newest_verified(root)[0] is not None:
            canvas.save(gallery.of_run(root, GALLERY_IMAGES), root / "figures" / "predictions.png")
    except Exception as error:  # figure errors, such as a full disk, do not change the outcome of the run
        echo(f"some figures were not drawn: {error}")
    build_logger(config.tracking, root).close(status)
