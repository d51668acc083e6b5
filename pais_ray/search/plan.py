"""What a search is told, checked before anything starts, and what makes it the same search on the next start."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pais_ray.config.identity import changed_identity
from pais_ray.config.overlays import ConfigError, resolve
from pais_ray.config.tree import Config, dump, load, run_schedule
from pais_ray.files.atomic import replace_text
from pais_ray.search import asha, samplers
from pais_ray.search.space import Choice, Params, Space, check_space, compose_with, read_space
from pais_ray.search.trials import LEDGER, TrialStore

PAPERS = "search.json"
KINDS = ("grid", "random", "optuna")
ATTEMPTS = 20  # of Optuna to propose what was not tried yet, before its few choices count as exhausted
SAMPLES = 20  # configurations, unless told: Optuna's first ten are random, so half of them are informed


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `pais-ray tune` is told beside WORDS; see its help."""

    over: tuple[str, ...] = ()
    name: str | None = None
    kind: str | None = None
    samples: int | None = None
    seeds: int = 1
    steps: int | None = None
    rungs: str | None = None
    minutes: float | None = None
    max_concurrent: int | None = None
    warm_start: str | None = None
    retrain: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search that may start."""

    words: tuple[str, ...]  # of a trial
    base: Config  # what they spell
    space: Space
    kind: str  # grid | random | optuna
    samples: int
    seeds: tuple[int, ...]
    rungs: tuple[int, ...]
    steps: int  # of a trial
    root: Path

    def trial_root(self, trial: str) -> Path:
        return self.root / "trials" / trial

    def propose(self, ledger: TrialStore) -> tuple[Params, int] | None:
        """The next trial, a configuration and its seed, or None where none may start now. Further seeds of what is
        known come before what is new: means teach Optuna, and are there when the time is up."""
        if self.kind != "optuna":
            found = ((p, self.next_seed(ledger, p)) for p in self.known_points())
            return next(((p, seed) for p, seed in found if seed is not None), None)
        own = {t.point: t.params for t in ledger.trials if t.folder is None}
        for params in own.values():
            if (seed := self.next_seed(ledger, params)) is not None:
                return params, seed
        if len(own) >= self.samples:
            return None
        standings = sorted(ledger.standings(), key=lambda s: s.point)
        for attempt in range(ATTEMPTS):
            params = samplers.tpe_point(self.space, self.base.train.seed + 1000 * attempt, standings)
            if (seed := self.next_seed(ledger, params)) is not None:
                return params, seed
        return None

    def next_seed(self, ledger: TrialStore, params: Params) -> int | None:
        """The seed of a configuration's next trial, where it may start now: rungs judge the first one alone, so the
        others wait until that one finished."""
        missing = self.missing(ledger, params)
        first = next((t for t in ledger.trials if t.params == params), None)
        waits = self.rungs and first is not None and first.state != "finished"
        return None if waits or not missing else missing[0]

    def missing(self, ledger: TrialStore, params: Params) -> list[int]:
        """The seeds of a configuration that have no trial yet."""
        return [seed for seed in self.seeds if not ledger.has(params, seed)]

    def has_to_come(self, ledger: TrialStore) -> bool:
        """Whether further seeds wait for a first one that runs."""
        return any(t.state == "running" and self.missing(ledger, t.params) for t in ledger.trials)

    def known_points(self) -> Iterator[Params]:
        """The configurations that do not depend on results: all, unless Optuna proposes them."""
        if self.kind == "grid":
            yield from samplers.grid(self.space)
        elif self.kind == "random":
            yield from samplers.random_points(self.space, self.base.train.seed, self.samples)

    def configs(self) -> Iterator[tuple[Params, Config]]:
        """What can be composed of the space before the start: all configurations, or each end where Optuna proposes
        them. Raises ConfigError."""
        first = {path: domain.corners()[0] for path, domain in self.space.items()}
        ends = ({**first, path: value} for path, domain in self.space.items() for value in domain.corners())
        for params in ends if self.kind == "optuna" else self.known_points():
            try:
                yield params, compose_with(self.words, params)
            except ConfigError as error:
                raise ConfigError(f"--over {params}: {error}") from error

    def check_same(self) -> None:
        """Refuses to go on with a search of that name that was told otherwise; else writes down this one."""
        now = {
            "--search": self.kind,
            "--seeds": len(self.seeds),
            "--rungs": list(self.rungs),
            **{f"--over {path}": str(domain) for path, domain in self.space.items()},
        }
        papers, config = self.root / PAPERS, self.root / "config.yaml"
        if papers.exists():
            was = json.loads(papers.read_text())
            changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
            changed += changed_identity(load(config), self.base)
            if changed:
                raise ConfigError(
                    f"{papers}: this search was started with another {', '.join(changed)}; give it as it was, or "
                    f"choose another --name (with --warm-start {self.root} to keep what was found)"
                )
        elif config.exists():
            raise ConfigError(f"{self.root}: a run of `pais-ray train`, not a search; choose another --name")
        (self.root / "trials").mkdir(parents=True, exist_ok=True)
        for path, text in ((config, dump(self.base)), (papers, json.dumps(now, indent=1))):
            replace_text(path, text)


def make_plan(words: Sequence[str], options: Options) -> Plan:
    """Composes and checks all that can be known before the start. Raises ConfigError."""
    trial_words = (*words, *([f"train.steps={options.steps}"] if options.steps else []))
    space = read_space(resolve(trial_words).get("search") or {}, options.over)
    base = compose_with(trial_words, {})
    if base.train.stop_at is not None:
        raise ConfigError("train.stop_at: trials end at --steps or at a rung; leave it out")
    if "://" in base.run.storage_path:
        raise ConfigError(f"run.storage_path: expected a path that every node sees, got {base.run.storage_path!r}")
    check_space(trial_words, space)
    kind = options.kind or ("grid" if all(isinstance(d, Choice) for d in space.values()) else "optuna")
    if kind == "grid" and options.samples is not None:
        raise ConfigError("--samples: a grid has all its combinations; leave it out, or use --sampler random")
    steps, every = run_schedule(base).steps, base.train.eval_every
    name = options.name or base.run.name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
    storage = compose_with(trial_words, {"run.name": name}).run.storage_path
    plan = Plan(
        words=trial_words,
        base=base,
        space=space,
        kind=kind,
        samples=sum(1 for _ in samplers.grid(space)) if kind == "grid" else options.samples or SAMPLES,
        seeds=tuple(base.train.seed + k for k in range(options.seeds)),
        rungs=(),
        steps=steps,
        root=Path(storage).absolute() / name,
    )
    configs = []
    for params, config in plan.configs():
        check_trial(plan, params, config)
        configs.append(config)
    if options.rungs is None:
        marks = asha.default_rungs(steps, every)
        return replace(plan, rungs=tuple(r for r in marks if not any(burns_in(c, r - 1) for c in configs)))
    marks = asha.parse_rungs(options.rungs, steps, every)
    early = [r for r in marks if any(burns_in(c, r) for c in configs)]
    if early:
        raise ConfigError(
            f"--rungs {options.rungs}: at {early[-1]} no unlabeled image was learned from yet, and trials cannot be "
            "told apart; lower method.burn_in, or judge later"
        )
    return replace(plan, rungs=marks)


def check_trial(plan: Plan, params: Params, config: Config) -> None:
    """Raises ConfigError unless a trial of ``config`` is as long as the others and learns what it is judged by."""
    own = run_schedule(config).steps
    if own != plan.steps:
        raise ConfigError(
            f"--over {params}: its trials would have {own} steps, others {plan.steps}, and the longer would win; "
            "give --steps"
        )
    if burns_in(config, plan.steps - 1):
        raise ConfigError(
            f"method.burn_in: a trial of {plan.steps} steps ends within it ({params}), so no unlabeled image would be "
            "learned from and trials could not be told apart; lower method.burn_in, or give more --steps"
        )


def burns_in(config: Config, step: int) -> bool:
    """Whether the method leaves unlabeled images out at ``step``, counted from 0, and would not for ever."""
    weight = config.method.unlabeled_weight
    return weight(step) == 0 and weight(sys.maxsize) > 0


def warm_start(plan: Plan, ledger: TrialStore, base: Config, folder: Path) -> int:
    """Takes up the trials of the search in ``folder`` that differ from this one's in nothing but what it searches
    over, and returns how many. ``base`` has the data paths that trials get. Raises ConfigError where none fits."""
    if not (folder / PAPERS).exists():
        raise ConfigError(f"--warm-start {folder}: not the folder of a search")
    taken, reasons = 0, set()
    for trial in TrialStore(folder / LEDGER).trials:
        root = Path(trial.folder or folder.absolute() / "trials" / trial.id)
        if trial.state not in ("finished", "stopped"):
            continue
        config = load(root / "config.yaml")
        other = [n for n in changed_identity(base, config) if n not in plan.space and n != "train.seed"]
        params = {path: value_at(config, path) for path in plan.space}
        if other:
            reasons |= set(other)
        elif not ledger.has(params, trial.seed):
            own = ledger.add(params, trial.seed)
            own.state, own.why, own.scores = trial.state, trial.why or f"of {folder}", trial.scores
            own.folder = str(root)
            taken += 1
    if not ledger.trials:
        why = f"its trials differ in {', '.join(sorted(reasons))}" if reasons else "it has no finished trial"
        raise ConfigError(f"--warm-start {folder}: nothing to learn from: {why}")
    return taken


def value_at(config: Config, path: str) -> Any:
    """The value of a dotted setting, as a file would say it."""
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
