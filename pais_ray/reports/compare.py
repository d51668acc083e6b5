"""Runs side by side: which settings differ, what came out, and whether the figures may be compared. No Ray.

Runs that differ by nothing but the seed and the draw of labeled images are repetitions: one column, mean and spread.
Those of other batch, length or rate are none, though their settings agree: these follow from the number of workers.
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

REPEATS = ("train.seed", "data.fold", "data.split")  # what may differ between repetitions
NOT_SETTINGS = ("run.", "tracking.")
FIGURES = ("segm_AP", "segm_AP50", "segm_AP75", "bbox_AP", "cityscapes_AP")
BEST = "best teacher/segm_AP"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the directory of a run says of it."""

    root: Path
    config: Config
    split: str  # SHA-256 of which images are labeled
    validation: str  # SHA-256 of the annotations it is scored on
    step: int  # of the last line of metrics.jsonl
    schedule: dict[str, Any]  # dotted name -> value, of describe.schedule
    figures: dict[str, float]  # of the last evaluation, and the best teacher's

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def steps(self) -> int:
        """Planned."""
        return int(self.schedule["schedule.steps"])

    def repeats(self, other: "Run") -> bool:
        changed = set(changed_identity(other.config, self.config))
        return changed <= set(REPEATS) and self.schedule == other.schedule


@dataclass(frozen=True)
class Figure:
    """A metric of one column: over ``len(values)`` runs, and against the first column where there is one."""

    values: tuple[float, ...]
    delta: tuple[float, ...] = ()  # of each pair of repetitions, or of the means where they do not pair

    def __str__(self) -> str:
        return f"{_spread(self.values, '.3f')}{'  ' + _spread(self.delta, '+.3f') if self.delta else ''}"

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values, **_summary("", self.values), **_summary("delta_", self.delta)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Columns of runs, the first one being what the others are held against."""

    columns: tuple[tuple[Run, ...], ...]
    settings: dict[str, list[Any]]  # dotted name -> value of each column's first run, where they differ
    figures: dict[str, list[Figure | None]]
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
            "metrics": {name: [f and f.to_json() for f in row] for name, row in self.figures.items()},
            "warnings": self.warnings,
        }

    def table(self) -> str:
        """The comparison as text: settings, figures (mean ± spread, then the difference from the first), warnings."""
        blocks = []
        if self.settings:
            rows = {name: [_text(v) for v in values] for name, values in self.settings.items()}
            blocks.append(_lines("settings that differ", self.titles, rows))
        else:
            blocks.append("no setting differs")
        rows = {name: ["-" if f is None else str(f) for f in row] for name, row in self.figures.items()}
        blocks.append(_lines("figures", self.titles, rows))
        blocks += [f"warning: {text}" for text in self.warnings]
        return "\n\n".join(blocks)


def compare(roots: Sequence[Path]) -> Comparison:
    """The runs at ``roots``, repetitions together, in the order given. Raises ValueError where one is no run."""
    columns: list[list[Run]] = []
    for run in map(read, roots):
        for column in columns:
            if run.repeats(column[0]):
                column.append(run)
                break
        else:
            columns.append([run])
    flat = [{**flatten(column[0].config), **column[0].schedule} for column in columns]
    names = [
        n for n in dict.fromkeys(k for f in flat for k in f) if not n.startswith(NOT_SETTINGS) and n not in REPEATS
    ]
    known = list(dict.fromkeys(k for c in columns for r in c for k in r.figures))
    return Comparison(
        columns=tuple(tuple(c) for c in columns),
        settings={n: [f.get(n) for f in flat] for n in names if len({_text(f.get(n)) for f in flat}) > 1},
        figures={n: [figure(n, column, columns[0]) for column in columns] for n in known},
        warnings=warnings(columns),
    )


def read(root: Path) -> Run:
    """Raises ValueError where ``root`` is no run directory."""
    for name in ("config.yaml", "split.json", "data.json", "schedule.json", "metrics.jsonl"):
        if not (root / name).exists():
            raise ValueError(f"{root}: expected a run directory with {name}; `pais-ray train` makes them")
    rows = metric_rows(root)
    figures: dict[str, float] = {}
    best = [r["teacher/segm_AP"] for r in rows if r.get("teacher/segm_AP") is not None]
    if best:
        figures[BEST] = max(best)
    names = [f"{role}/{name}" for role in ROLES for name in FIGURES]
    for row in rows:
        figures |= {n: row[n] for n in names if row.get(n) is not None}
    return Run(
        root=root,
        config=load(root / "config.yaml"),
        split=json.loads((root / "split.json").read_text())["sha256"],
        validation=json.loads((root / "data.json").read_text())["validation"]["sha256"],
        step=max((row["step"] for row in rows), default=0),
        schedule=describe.schedule(root),
        figures=figures,
    )


def figure(name: str, column: Sequence[Run], first: Sequence[Run]) -> Figure | None:
    """One metric of one column; None where no run has it."""
    runs = [r for r in column if name in r.figures]
    if not runs:
        return None
    values = tuple(r.figures[name] for r in runs)
    others = [r for r in first if name in r.figures]
    if column is first or not others:
        return Figure(values)
    ours, theirs = ({(r.config.train.seed, r.split): r.figures[name] for r in part} for part in (runs, others))
    if ours.keys() == theirs.keys() and len(ours) == len(runs) == len(others):  # the pairs say more than the spread
        return Figure(values, tuple(ours[key] - theirs[key] for key in ours))
    return Figure(values, (statistics.fmean(values) - statistics.fmean(theirs.values()),))


def warnings(columns: Sequence[Sequence[Run]]) -> list[str]:
    """Why figures of the columns may say nothing about each other."""
    found = []
    first = columns[0]
    for column in columns:
        name = column[0].name
        if {r.validation for r in column} != {first[0].validation}:
            found.append(f"{name} is scored on other validation annotations than {first[0].name}: not comparable")
        if {r.split for r in column} != {r.split for r in first}:
            found.append(f"{name} learned from other labeled images than {first[0].name} (data.labeled, data.fold)")
        found += [f"{r.name} is at step {r.step} of {r.steps}" for r in column if r.step < r.steps]
    return found


def _spread(values: Sequence[float], form: str) -> str:
    text = f"{statistics.fmean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"


def _summary(prefix: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {f"{prefix}mean": statistics.fmean(values), f"{prefix}std": std}


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _lines(head: str, titles: Sequence[str], rows: dict[str, list[str]]) -> str:
    table = [[head, *titles], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
