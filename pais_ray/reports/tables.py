"""Runs -> a table in the form of the paper's: a row a method, a column a share of labels, mean and spread."""

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

REPEATS = ("data.fold", "data.split", "train.seed")  # what runs of one cell may differ in


@dataclass(frozen=True, kw_only=True)
class Result:
    """The last score of a finished run."""

    run: str
    labeled: float  # share of the images
    settings: dict[str, Scalar]  # what makes the run what it is, without share, fold and seed
    score: float

    @property
    def method(self) -> str:
        return f"{self.settings['segmentor.name']} {self.settings['method.name']}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Scores of runs that differ in fold and seed alone."""

    method: str
    labeled: float
    scores: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the sample; None of a single run."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread} ({len(self.scores)})"


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run directories among ``places`` and directly below them. Raises ValueError without any."""
    found = [p for place in places for p in ([place] if is_run(place) else sorted(filter(is_run, place.iterdir())))]
    if not found:
        raise ValueError(f"{', '.join(map(str, places))}: expected run directories or folders of them, got none")
    return list(dict.fromkeys(found))


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()


def read_result(run: Path, role: str, metric: str) -> Result | None:
    """The run's score at its last step; None where it has not come so far."""
    schedule = describe.schedule(run)
    last = schedule["schedule.steps"]
    scores = [r[f"{role}/{metric}"] for r in metric_rows(run) if r["step"] == last and f"{role}/{metric}" in r]
    if not scores or scores[-1] is None:
        return None
    settings = {**identity(load(run / "config.yaml")), **schedule}
    labeled = settings.pop("data.labeled")
    assert isinstance(labeled, float | int)
    kept = {name: value for name, value in settings.items() if name not in REPEATS}
    return Result(run=run.name, labeled=float(labeled), settings=kept, score=scores[-1])


def cells(results: Sequence[Result]) -> list[Cell]:
    """Results by method and share; methods of one name are told apart by the settings they differ in."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps(result.settings, sort_keys=True)].append(result)
    made = []
    for group in groups.values():
        namesakes = [other[0].settings for other in groups.values() if other[0].method == group[0].method]
        own = group[0].settings
        names = sorted(n for n in {k for s in namesakes for k in s} if len({str(s.get(n)) for s in namesakes}) > 1)
        method = " ".join([group[0].method, *(f"{name}={own.get(name)}" for name in names)])
        for share in sorted({r.labeled for r in group}):
            same = [r for r in group if r.labeled == share]
            scores, runs = tuple(r.score for r in same), tuple(r.run for r in same)
            made.append(Cell(method=method, labeled=share, scores=scores, runs=runs))
    return sorted(made, key=lambda cell: (cell.method, cell.labeled))


def markdown(made: Sequence[Cell], title: str) -> str:
    """The table, scores in per cent: mean ± standard deviation (number of runs)."""
    shares = sorted({cell.labeled for cell in made})
    lines = [f"| {title} | " + " | ".join(f"{100 * s:g} %" for s in shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for method in dict.fromkeys(cell.method for cell in made):
        of = {cell.labeled: str(cell) for cell in made if cell.method == method}
        lines.append(f"| {method} | " + " | ".join(of.get(s, "-") for s in shares) + " |")
    return "\n".join(lines) + "\n"


def as_csv(made: Sequence[Cell]) -> str:
    """One line a cell, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "labeled", "runs", "mean", "spread", "names"])
    for cell in made:
        spread = "" if cell.spread is None else cell.spread
        writer.writerow([cell.method, cell.labeled, len(cell.scores), cell.mean, spread, " ".join(cell.runs)])
    return text.getvalue()
