"""The state of a search: its trials with their scores, in one file that is rewritten atomically by one process.

Everything else is computed from it: rungs, ranking, the input of Optuna. A search that was killed resumes from this
file.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pais_ray.files.atomic import replace_text
from pais_ray.search.space import Params

TRIALS_FILE = "trials.json"  # in the folder of a search
FORMAT = 1  # of the file; other formats are refused
STATES = ("running", "waiting", "failed", "stopped", "finished")  # a configuration has the first state of its trials


@dataclass(kw_only=True)
class Trial:
    """One training: a configuration and a seed. The fields are the keys of the file."""

    id: str
    point: int  # number of the configuration; trials that differ in the seed share it
    params: Params
    seed: int
    state: str = "waiting"
    why: str = ""  # reason of the state
    scores: dict[int, float] = field(default_factory=dict)  # absolute step -> the teacher's segm AP
    folder: str | None = None  # run directory, if it is in the folder of another search


@dataclass(frozen=True, kw_only=True)
class RankedConfiguration:
    """A configuration over all its seeds, at the last step at which each of them has a score."""

    point: int
    params: Params
    state: str
    step: int
    ap: float | None
    spread: float | None  # standard deviation over the seeds
    trials: tuple[Trial, ...]


class TrialStore:
    """The trials in the file ``path``, oldest first. Raises ValueError for a file of another format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[Trial] = []
        if path.exists():
            tree = json.loads(path.read_text())
            if tree["format"] != FORMAT:
                raise ValueError(
                    f"{path}: expected format {FORMAT}, got {tree['format']}; use the version of pais_ray that wrote it"
                )
            for row in tree["trials"]:
                row["scores"] = {int(step): ap for step, ap in row["scores"].items()}
                self.trials.append(Trial(**row))

    def save(self) -> None:
        """Writes the file atomically."""
        trials = [asdict(trial) for trial in self.trials]
        replace_text(self.path, json.dumps({"format": FORMAT, "trials": trials}, indent=1))

    def trial(self, name: str) -> Trial:
        """The trial with the ID ``name``."""
        return next(t for t in self.trials if t.id == name)

    def add(self, params: Params, seed: int) -> Trial:
        """Adds a trial of a known or of a new configuration."""
        points = [t.point for t in self.trials if t.params == params]
        point = points[0] if points else max((t.point for t in self.trials), default=-1) + 1
        trial = Trial(id=f"{point:03d}s{seed}", point=point, params=params, seed=seed)
        self.trials.append(trial)
        return trial

    def has(self, params: Params, seed: int) -> bool:
        """Whether there is a trial of this configuration and seed."""
        return any(t.params == params and t.seed == seed for t in self.trials)

    def own_trials(self) -> list[Trial]:
        """The trials that do not come from another search."""
        return [t for t in self.trials if t.folder is None]

    def first_trials(self) -> list[Trial]:
        """The first trial of each configuration; only these are compared at rungs."""
        found: dict[int, Trial] = {}
        for trial in self.trials:
            found.setdefault(trial.point, trial)
        return list(found.values())

    def rung(self, step: int) -> dict[str, float]:
        """Trial -> AP at ``step``, for the first trials that reached it."""
        return {t.id: t.scores[step] for t in self.first_trials() if step in t.scores}

    def ranking(self) -> list[RankedConfiguration]:
        """Configurations, best first: by their last common step (that of finished ones is the highest), then by AP."""
        points: dict[int, list[Trial]] = {}
        for trial in self.trials:
            points.setdefault(trial.point, []).append(trial)
        found = [_rank(trials) for trials in points.values()]
        return sorted(found, key=lambda s: (-s.step, s.ap is None, -(s.ap or 0.0), s.point))


def mean_scores(trials: Sequence[Trial]) -> dict[int, float]:
    """Step -> mean AP, for the steps at which all ``trials`` have a score."""
    common = set.intersection(*(set(t.scores) for t in trials))
    return {step: statistics.fmean(t.scores[step] for t in trials) for step in sorted(common)}


def configuration_state(states: Iterable[str]) -> str:
    """The state of a configuration: finished if all its trials are, else the first other state in STATES."""
    found = set(states)
    return next(s for s in STATES if s in found)


def _rank(trials: list[Trial]) -> RankedConfiguration:
    means = mean_scores(trials)
    step = max(means, default=0)
    spread = statistics.stdev(t.scores[step] for t in trials) if means and len(trials) > 1 else None
    return RankedConfiguration(
        point=trials[0].point,
        params=trials[0].params,
        state=configuration_state(t.state for t in trials),
        step=step,
        ap=means.get(step),
        spread=spread,
        trials=tuple(trials),
    )
