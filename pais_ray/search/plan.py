"""The plan of a search: resolved and checked before anything starts, and recorded so that a restart matches it."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pais_ray.config.identity import changed_identity
from pais_ray.config.overlays import ConfigError, resolve
from pais_ray.config.renamed import present_name
from pais_ray.config.tree import Config, dump, load, run_schedule
from pais_ray.files.atomic import replace_text
from pais_ray.search import asha, samplers
from pais_ray.search.space import Choice, Params, Space, check_space, compose_with, read_space
from pais_ray.search.trials import TRIALS_FILE, TrialStore

SEARCH_FILE = "search.json"  # in the folder of a search: the settings that may not change
PROPOSAL_ATTEMPTS = 20  # proposals of Optuna before its search space counts as exhausted
DEFAULT_SAMPLES = 20  # configurations; Optuna's first ten are random, so half of them are informed


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `pais-ray tune`; see its help."""

    over: tuple[str, ...] = ()
    name: str | None = None
    sampler: str | None = None
    samples: int | None = None
    seeds: int = 1
    steps: int | None = None
    rungs: str | None = None
    minutes: float | None = None  # time budget of this start
    max_concurrent: int | None = None
    warm_start: str | None = None
    retrain: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search that may start."""

    words: tuple[str, ...]  # config names and overrides of a trial
    base: Config  # the config that they resolve to
    space: Space
    sampler: str  # grid | random | optuna
    samples: int  # configurations
    seeds: tuple[int, ...]
    rungs: tuple[int, ...]
    steps: int  # per trial
    root: Path  # the folder of the search

    def trial_root(self, trial: str) -> Path:
        """The run directory of a trial."""
        return self.root / "trials" / trial

    def propose(self, store: TrialStore) -> tuple[Params, int] | None:
        """The configuration and seed of the next trial, or None if none may start now.

        Further seeds of known configurations precede new configurations: their means improve Optuna's proposals, and
        they are complete if the time budget runs out.
        """
        if self.sampler != "optuna":
            found = ((p, self.next_seed(store, p)) for p in self.fixed_points())
            return next(((p, seed) for p, seed in found if seed is not None), None)
        own = {t.point: t.params for t in store.own_trials()}
        for params in own.values():
            if (seed := self.next_seed(store, params)) is not None:
                return params, seed
        if len(own) >= self.samples:
            return None
        known = sorted(store.ranking(), key=lambda s: s.point)
        for attempt in range(PROPOSAL_ATTEMPTS):
            params = samplers.tpe_point(self.space, self.base.train.seed + 1000 * attempt, known)
            if (seed := self.next_seed(store, params)) is not None:
                return params, seed
        return None

    def next_seed(self, store: TrialStore, params: Params) -> int | None:
        """The seed of the next trial of a configuration, or None if none may start now.

        Only the first trial is compared at rungs, so with rungs the others wait until it has finished.
        """
        missing = self.missing_seeds(store, params)
        first = next((t for t in store.trials if t.params == params), None)
        waits = self.rungs and first is not None and first.state != "finished"
        return None if waits or not missing else missing[0]

    def missing_seeds(self, store: TrialStore, params: Params) -> list[int]:
        """The seeds of a configuration that have no trial yet."""
        return [seed for seed in self.seeds if not store.has(params, seed)]

    def has_waiting_seeds(self, store: TrialStore) -> bool:
        """Whether seeds of a configuration wait for its first trial, which is running."""
        return any(t.state == "running" and self.missing_seeds(store, t.params) for t in store.trials)

    def fixed_points(self) -> Iterator[Params]:
        """The configurations that do not depend on results: all of them, or none if Optuna proposes them."""
        if self.sampler == "grid":
            yield from samplers.grid_points(self.space)
        elif self.sampler == "random":
            yield from samplers.random_points(self.space, self.base.train.seed, self.samples)

    def known_configs(self) -> Iterator[tuple[Params, Config]]:
        """The configs that can be checked before the start: all of them, or the corners of each domain if Optuna
        proposes them. Raises ConfigError."""
        first = {path: domain.corners()[0] for path, domain in self.space.items()}
        corners = ({**first, path: value} for path, domain in self.space.items() for value in domain.corners())
        for params in corners if self.sampler == "optuna" else self.fixed_points():
            try:
                yield params, compose_with(self.words, params)
            except ConfigError as error:
                raise ConfigError(f"--over {params}: {error}") from error

    def recorded_settings(self) -> dict[str, Any]:
        """The content of search.json: settings that may not change between starts."""
        return {
            "--search": self.sampler,
            "--seeds": len(self.seeds),
            "--rungs": list(self.rungs),
            **{f"--over {path}": str(domain) for path, domain in self.space.items()},
        }

    def present_settings(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a search.json, perhaps of an earlier version, with the present names of settings."""
        names = {key: present_name(key.removeprefix("--over "), self.space) for key in recorded}
        return {f"--over {names[k]}" if k.startswith("--over ") else k: value for k, value in recorded.items()}

    def open_store(self) -> TrialStore:
        """The trials of earlier starts, perhaps of an earlier version, with the present names of settings."""
        store = TrialStore(self.root / TRIALS_FILE)
        for trial in store.trials:
            trial.params = {present_name(path, self.space): value for path, value in trial.params.items()}
        return store

    def check_unchanged(self) -> None:
        """Raises ConfigError if the folder holds a run, or a search of other settings."""
        recorded, config = self.root / SEARCH_FILE, self.root / "config.yaml"
        if recorded.exists():
            before, now = self.present_settings(json.loads(recorded.read_text())), self.recorded_settings()
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            changed = ["--sampler" if key == "--search" else key for key in changed]
            changed += changed_identity(load(config), self.base)
            if changed:
                raise ConfigError(
                    f"{recorded}: this search was started with a different {', '.join(changed)}; restore the earlier "
                    f"value, or choose another --name (with --warm-start {self.root} to keep the results)"
                )
        elif config.exists():
            raise ConfigError(f"{self.root}: a run of `pais-ray train`, not a search; choose another --name")

    def write(self) -> None:
        """Writes config.yaml and search.json, which later starts are checked against."""
        (self.root / "trials").mkdir(parents=True, exist_ok=True)
        replace_text(self.root / "config.yaml", dump(self.base))
        replace_text(self.root / SEARCH_FILE, json.dumps(self.recorded_settings(), indent=1))


def make_plan(words: Sequence[str], options: SearchOptions) -> SearchPlan:
    """Resolves the plan and checks everything that is known before the start. Raises ConfigError."""
    trial_words = (*words, *([f"train.steps={options.steps}"] if options.steps else []))
    space = read_space(resolve(trial_words).get("search") or {}, options.over)
    base = compose_with(trial_words, {})
    if base.train.stop_at is not None:
        raise ConfigError("train.stop_at: trials end at --steps or at a rung; remove this setting")
    if "://" in base.run.storage_path:
        raise ConfigError(f"run.storage_path: expected a path that every node sees, got {base.run.storage_path!r}")
    check_space(trial_words, space)
    sampler = options.sampler or ("grid" if all(isinstance(d, Choice) for d in space.values()) else "optuna")
    if sampler == "grid" and options.samples is not None:
        raise ConfigError("--samples: a grid always tries all combinations; remove --samples, or use --sampler random")
    is_grid = sampler == "grid"
    name = options.name or base.run.name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
    storage = compose_with(trial_words, {"run.name": name}).run.storage_path
    plan = SearchPlan(
        words=trial_words,
        base=base,
        space=space,
        sampler=sampler,
        samples=sum(1 for _ in samplers.grid_points(space)) if is_grid else options.samples or DEFAULT_SAMPLES,
        seeds=tuple(base.train.seed + k for k in range(options.seeds)),
        rungs=(),
        steps=run_schedule(base).steps,
        root=Path(storage).absolute() / name,
    )
    configs = []
    for params, config in plan.known_configs():
        check_trial(plan, params, config)
        configs.append(config)
    return replace(plan, rungs=choose_rungs(plan, configs, options.rungs))


def choose_rungs(plan: SearchPlan, configs: Sequence[Config], text: str | None) -> tuple[int, ...]:
    """The rungs in ``text``, or the default ones that lie after the burn-in. Raises ConfigError for a rung within it:
    until then, trials learn the same."""
    every = plan.base.train.eval_every
    if text is None:
        defaults = asha.default_rungs(plan.steps, every)
        return tuple(r for r in defaults if not any(is_in_burn_in(c, r - 1) for c in configs))
    rungs = asha.parse_rungs(text, plan.steps, every)
    early = [r for r in rungs if any(is_in_burn_in(c, r) for c in configs)]
    if early:
        raise ConfigError(
            f"--rungs {text}: at {early[-1]} no trial has learned from unlabeled images yet, so trials cannot be "
            "compared; lower method.burn_in, or use later rungs"
        )
    return rungs


def check_trial(plan: SearchPlan, params: Params, config: Config) -> None:
    """Raises ConfigError unless a trial of ``config`` is as long as the others and learns from unlabeled images."""
    own = run_schedule(config).steps
    if own != plan.steps:
        raise ConfigError(
            f"--over {params}: its trials would have {own} steps, others {plan.steps}, and longer trials have an "
            "advantage; use --steps"
        )
    if is_in_burn_in(config, plan.steps - 1):
        raise ConfigError(
            f"method.burn_in: a trial of {plan.steps} steps ends within it ({params}) and never learns from unlabeled "
            "images, so trials cannot be compared; lower method.burn_in, or use more --steps"
        )


def is_in_burn_in(config: Config, step: int) -> bool:
    """Whether the method ignores unlabeled images at ``step`` (counted from 0), but not at all steps."""
    weight = config.method.unlabeled_weight
    return weight(step) == 0 and weight(sys.maxsize) > 0


def import_trials(plan: SearchPlan, store: TrialStore, base: Config, folder: Path) -> int:
    """Imports the trials of the search in ``folder`` that differ from this search only in what it searches over.

    ``base`` has the data paths of this search's trials. Returns the number of imported trials. Raises ConfigError if
    there are none.
    """
    if not (folder / SEARCH_FILE).exists():
        raise ConfigError(f"--warm-start {folder}: not the folder of a search")
    imported, reasons = 0, set()
    for trial in TrialStore(folder / TRIALS_FILE).trials:
        root = Path(trial.folder or folder.absolute() / "trials" / trial.id)
        if trial.state not in ("finished", "stopped"):
            continue
        config = load(root / "config.yaml")
        other = [n for n in changed_identity(base, config) if n not in plan.space and n != "train.seed"]
        params = {path: setting_value(config, path) for path in plan.space}
        if other:
            reasons |= set(other)
        elif not store.has(params, trial.seed):
            own = store.add(params, trial.seed)
            own.state, own.why, own.scores = trial.state, trial.why or f"of {folder}", trial.scores
            own.folder = str(root)
            imported += 1
    if not store.trials:
        why = f"its trials differ in {', '.join(sorted(reasons))}" if reasons else "it has no finished trial"
        raise ConfigError(f"--warm-start {folder}: no usable trial: {why}")
    return imported


def setting_value(config: Config, path: str) -> Any:
    """The value of a dotted setting, as it is written in a file; None if there is no such setting."""
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
