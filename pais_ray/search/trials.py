"""What a search knows: its trials with their scores, in one file that is rewritten whole. One process writes.

All else is computed from it: rungs, ranking, what Optuna learns. So a search that was killed goes on from the file.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pais_ray.files.atomic import replace_text
from pais_ray.search.space import Params

LEDGER = "trials.json"  # of a search's folder
FORMAT = 1  # of the file; a reader refuses what it does not know
STATES = ("running", "waiting", "failed", "stopped", "finished")  # a configuration is in the first that a trial is in


@dataclass(kw_only=True)
class Trial:
    """One training: a configuration and a seed."""

    id: str
    point: int  # the number of its configuration; trials that differ by seed share it
    params: Params
    seed: int
    state: str = "waiting"
    why: str = ""
    scores: dict[int, float] = field(default_factory=dict)  # absolute step -> teacher's segm AP
    folder: str | None = None  # the run directory, where it lies in another search's folder


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a configuration came to, over its seeds, at the last step that all of them were scored at."""

    point: int
    params: Params
    state: str
    step: int
    ap: float | None
    spread: float | None  # standard deviation over seeds
    trials: tuple[Trial, ...]


class TrialStore:
    """The trials of the search at ``path``, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[Trial] = []
        if path.exists():
            tree = json.loads(path.read_text())
            if tree["format"] != FORMAT:
                raise ValueError(f"{path}: format {tree['format']}, this version reads {FORMAT}; use the one it is of")
            for row in tree["trials"]:
                row["scores"] = {int(step): ap for step, ap in row["scores"].items()}
                self.trials.append(Trial(**row))

    def save(self) -> None:
        """Whole or not at all."""
        trials = [asdict(trial) for trial in self.trials]
        replace_text(self.path, json.dumps({"format": FORMAT, "trials": trials}, indent=1))

    def trial(self, name: str) -> Trial:
        return next(t for t in self.trials if t.id == name)

    def add(self, params: Params, seed: int) -> Trial:
        """A new trial: of a known configuration, or of a new one."""
        points = [t.point for t in self.trials if t.params == params]
        point = points[0] if points else max((t.point for t in self.trials), default=-1) + 1
        trial = Trial(id=f"{point:03d}s{seed}", point=point, params=params, seed=seed)
        self.trials.append(trial)
        return trial

    def has(self, params: Params, seed: int) -> bool:
        return any(t.params == params and t.seed == seed for t in self.trials)

    def firsts(self) -> list[Trial]:
        """The first trial of each configuration, whose verdict at a rung is the configuration's."""
        found: dict[int, Trial] = {}
        for trial in self.trials:
            found.setdefault(trial.point, trial)
        return list(found.values())

    def rung(self, step: int) -> dict[str, float]:
        """Trial -> AP at that step, of the first ones of their configurations that reached it."""
        return {t.id: t.scores[step] for t in self.firsts() if step in t.scores}

    def standings(self) -> list[Standing]:
        """Configurations, best first: by how far they came, as finished ones did furthest, and then by AP."""
        points: dict[int, list[Trial]] = {}
        for trial in self.trials:
            points.setdefault(trial.point, []).append(trial)
        found = [_standing(trials) for trials in points.values()]
        return sorted(found, key=lambda s: (-s.step, s.ap is None, -(s.ap or 0.0), s.point))


def mean_scores(trials: Sequence[Trial]) -> dict[int, float]:
    """Step -> mean AP, of the steps at which all of them were scored."""
    common = set.intersection(*(set(t.scores) for t in trials))
    return {step: statistics.fmean(t.scores[step] for t in trials) for step in sorted(common)}


def state_of(states: Iterable[str]) -> str:
    """Of a configuration: finished where all its trials are, else what keeps it from that."""
    found = set(states)
    return next(s for s in STATES if s in found)


def _standing(trials: list[Trial]) -> Standing:
    means = mean_scores(trials)
    step = max(means, default=0)
    spread = statistics.stdev(t.scores[step] for t in trials) if means and len(trials) > 1 else None
    return Standing(
        point=trials[0].point,
        params=trials[0].params,
        state=state_of(t.state for t in trials),
        step=step,
        ap=means.get(step),
        spread=spread,
        trials=tuple(trials),
    )
