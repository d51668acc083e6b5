"""Comparison of runs: settings that differ, metrics, and whether the metrics are comparable. No Ray.

Runs that differ only in seed and selection of labeled images are repetitions: they share a column with mean and
spread. Runs with another batch size, number of steps or learning rate are not repetitions even if their settings
agree, because these also follow from the number of workers.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pais_ray.config.identity import changed_identity, flatten
from pais_ray.config.tree import Config, load
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import describe
from pais_ray.runs.checkpoints import ROLES

REPEATS = ("train.seed", "data.fold", "data.split")  # settings that may differ between repetitions
IGNORED = ("run.", "tracking.")  # prefixes of settings that are not compared
METRICS = ("segm_AP", "segm_AP50", "segm_AP75", "bbox_AP", "cityscapes_AP")
BEST = "best teacher/segm_AP"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its directory describes it."""

    root: Path
    config: Config
    split: str  # SHA-256 of the set of labeled images
    validation: str  # SHA-256 of the validation annotations
    step: int  # of the last row of metrics.jsonl
    schedule: dict[str, Any]  # dotted name -> value, as describe.schedule returns
    metrics: dict[str, float]  # of the last evaluation, and the best AP of the teacher

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def steps(self) -> int:
        """Planned number of steps."""
        return int(self.schedule["schedule.steps"])

    def is_repetition_of(self, other: "Run") -> bool:
        """Whether the runs differ only in the settings of ``REPEATS``."""
        changed = set(changed_identity(other.config, self.config))
        return changed <= set(REPEATS) and self.schedule == other.schedule


@dataclass(frozen=True)
class ColumnMetric:
    """A metric of one column, over ``len(values)`` runs, with its difference from the first column."""

    values: tuple[float, ...]
    delta: tuple[float, ...] = ()  # of each pair of repetitions, else of the means; empty: first column

    def __str__(self) -> str:
        return f"{_format_spread(self.values, '.3f')}{'  ' + _format_spread(self.delta, '+.3f') if self.delta else ''}"

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values, **_mean_and_std("", self.values), **_mean_and_std("delta_", self.delta)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Columns of runs; the first column is the baseline of the others."""

    columns: tuple[tuple[Run, ...], ...]
    settings: dict[str, list[Any]]  # dotted name -> value of each column's first run, if these differ
    metrics: dict[str, list[ColumnMetric | None]]
    warnings: list[str]

    @property
    def titles(self) -> list[str]:
        return [c[0].name if len(c) == 1 else f"{c[0].name} ({len(c)} runs)" for c in self.columns]

    def to_json(self) -> dict[str, Any]:
        return {
            "columns": [
                [{"run": str(r.root), "seed": r.config.train.seed, "step": r.step} for r in c] for c in self.columns
            ],
            "settings": self.settings,
            "metrics": {name: [f and f.to_json() for f in row] for name, row in self.metrics.items()},
            "warnings": self.warnings,
        }

    def table(self) -> str:
        """The comparison as text: settings, metrics (mean ± spread, then the difference from the first), warnings."""
        blocks = []
        if self.settings:
            rows = {name: [_format_value(v) for v in values] for name, values in self.settings.items()}
            blocks.append(_format_table("settings that differ", self.titles, rows))
        else:
            blocks.append("no settings differ")
        rows = {name: ["-" if f is None else str(f) for f in row] for name, row in self.metrics.items()}
        blocks.append(_format_table("metrics", self.titles, rows))
        blocks += [f"warning: {text}" for text in self.warnings]
        return "\n\n".join(blocks)


def compare(roots: Sequence[Path]) -> Comparison:
    """Compare the runs at ``roots``, in the given order. Raises ValueError if one is not a run directory."""
    columns: list[list[Run]] = []
    for run in map(read_run, roots):
        for column in columns:
            if run.is_repetition_of(column[0]):
                column.append(run)
                break
        else:
            columns.append([run])
    flat = [{**flatten(column[0].config), **column[0].schedule} for column in columns]
    names = [n for n in dict.fromkeys(k for f in flat for k in f) if not n.startswith(IGNORED) and n not in REPEATS]
    known = list(dict.fromkeys(k for c in columns for r in c for k in r.metrics))
    return Comparison(
        columns=tuple(tuple(c) for c in columns),
        settings={n: [f.get(n) for f in flat] for n in names if len({_format_value(f.get(n)) for f in flat}) > 1},
        metrics={n: [column_metric(n, column, columns[0]) for column in columns] for n in known},
        warnings=find_warnings(columns),
    )


def read_run(root: Path) -> Run:
    """Raises ValueError if ``root`` is not a run directory."""
    for name in ("config.yaml", "split.json", "data.json", "schedule.json", "metrics.jsonl"):
        if not (root / name).exists():
            raise ValueError(f"{root}: expected a run directory with {name}; `pais-ray train` creates run directories")
    rows = metric_rows(root)
    metrics: dict[str, float] = {}
    best = [r["teacher/segm_AP"] for r in rows if r.get("teacher/segm_AP") is not None]
    if best:
        metrics[BEST] = max(best)
    names = [f"{role}/{name}" for role in ROLES for name in METRICS]
    for row in rows:
        metrics |= {n: row[n] for n in names if row.get(n) is not None}
    return Run(
        root=root,
        config=load(root / "config.yaml"),
        split=json.loads((root / "split.json").read_text())["sha256"],
        validation=json.loads((root / "data.json").read_text())["validation"]["sha256"],
        step=max((row["step"] for row in rows), default=0),
        schedule=describe.schedule(root),
        metrics=metrics,
    )


def column_metric(name: str, column: Sequence[Run], first: Sequence[Run]) -> ColumnMetric | None:
    """One metric of one column; None if no run has it."""
    runs = [r for r in column if name in r.metrics]
    if not runs:
        return None
    values = tuple(r.metrics[name] for r in runs)
    others = [r for r in first if name in r.metrics]
    if column is first or not others:
        return ColumnMetric(values)
    ours, theirs = ({(r.config.train.seed, r.split): r.metrics[name] for r in part} for part in (runs, others))
    if ours.keys() == theirs.keys() and len(ours) == len(runs) == len(others):  # paired differences are more precise
        return ColumnMetric(values, tuple(ours[key] - theirs[key] for key in ours))
    return ColumnMetric(values, (statistics.fmean(values) - statistics.fmean(theirs.values()),))


def find_warnings(columns: Sequence[Sequence[Run]]) -> list[str]:
    """Reasons why the metrics of the columns may not be comparable."""
    found = []
    first = columns[0]
    for column in columns:
        name = column[0].name
        if {r.validation for r in column} != {first[0].validation}:
            found.append(f"{name} was evaluated on other validation annotations than {first[0].name}: not comparable")
        if {r.split for r in column} != {r.split for r in first}:
            found.append(f"{name} was trained on other labeled images than {first[0].name} (data.labeled, data.fold)")
        found += [f"{r.name} is at step {r.step} of {r.steps}" for r in column if r.step < r.steps]
    return found


def _format_spread(values: Sequence[float], form: str) -> str:
    text = f"{statistics.fmean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"


def _mean_and_std(prefix: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {f"{prefix}mean": statistics.fmean(values), f"{prefix}std": std}


def _format_value(value: Any) -> str:
    return "-" if value is None else str(value)


def _format_table(head: str, titles: Sequence[str], rows: dict[str, list[str]]) -> str:
    table = [[head, *titles], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
