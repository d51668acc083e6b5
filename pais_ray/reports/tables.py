"""A table of runs in the form of the paper's: one row per method, one column per share of labeled images."""

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pais_ray.config.identity import Scalar, identity
from pais_ray.config.tree import load
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import describe

REPEATS = ("data.fold", "data.split", "train.seed")  # settings that may differ between the runs of a cell


@dataclass(frozen=True, kw_only=True)
class Result:
    """The last score of a finished run."""

    run: str
    labeled: float  # share of the training images
    settings: dict[str, Scalar]  # the identity of the run and its schedule, without share, fold and seed
    score: float

    @property
    def method(self) -> str:
        return f"{self.settings['segmentor.name']} {self.settings['method.name']}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Scores of runs that differ only in fold and seed."""

    method: str
    labeled: float
    scores: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None for a single run."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread} ({len(self.scores)})"


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run directories among ``places`` and directly below them. Raises ValueError if there are none."""
    found: list[Path] = []
    for place in places:
        found += [place] if is_run_directory(place) else sorted(filter(is_run_directory, place.iterdir()))
    if not found:
        raise ValueError(f"{', '.join(map(str, places))}: expected run directories or folders of them, got none")
    return list(dict.fromkeys(found))


def is_run_directory(path: Path) -> bool:
    return (path / "config.yaml").exists()


def read_result(run: Path, role: str, metric: str) -> Result | None:
    """The run's score at its last planned step; None if the run has not reached it."""
    schedule = describe.schedule(run)
    last = schedule["schedule.steps"]
    scores = [r[f"{role}/{metric}"] for r in metric_rows(run) if r["step"] == last and f"{role}/{metric}" in r]
    if not scores or scores[-1] is None:
        return None
    settings = {**identity(load(run / "config.yaml")), **schedule}
    labeled = settings.pop("data.labeled")
    assert isinstance(labeled, float | int)
    compared = {name: value for name, value in settings.items() if name not in REPEATS}
    return Result(run=run.name, labeled=float(labeled), settings=compared, score=scores[-1])


def build_cells(results: Sequence[Result]) -> list[Cell]:
    """Group results by method and share. Methods of the same name are distinguished by the settings that differ."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps(result.settings, sort_keys=True)].append(result)
    cells = []
    for group in groups.values():
        same_name = [other[0].settings for other in groups.values() if other[0].method == group[0].method]
        own = group[0].settings
        names = sorted(n for n in {k for s in same_name for k in s} if len({str(s.get(n)) for s in same_name}) > 1)
        method = " ".join([group[0].method, *(f"{name}={own.get(name)}" for name in names)])
        for share in sorted({r.labeled for r in group}):
            same = [r for r in group if r.labeled == share]
            scores, runs = tuple(r.score for r in same), tuple(r.run for r in same)
            cells.append(Cell(method=method, labeled=share, scores=scores, runs=runs))
    return sorted(cells, key=lambda cell: (cell.method, cell.labeled))


def to_markdown(cells: Sequence[Cell], title: str) -> str:
    """The table with scores in percent: mean ± standard deviation (number of runs)."""
    shares = sorted({cell.labeled for cell in cells})
    lines = [f"| {title} | " + " | ".join(f"{100 * s:g} %" for s in shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for method in dict.fromkeys(cell.method for cell in cells):
        of = {cell.labeled: str(cell) for cell in cells if cell.method == method}
        lines.append(f"| {method} | " + " | ".join(of.get(s, "-") for s in shares) + " |")
    return "\n".join(lines) + "\n"


def to_csv(cells: Sequence[Cell]) -> str:
    """One line per cell, with unrounded values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "labeled", "runs", "mean", "spread", "names"])
    for cell in cells:
        spread = "" if cell.spread is None else cell.spread
        writer.writerow([cell.method, cell.labeled, len(cell.scores), cell.mean, spread, " ".join(cell.runs)])
    return text.getvalue()
