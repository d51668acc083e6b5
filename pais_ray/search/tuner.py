"""A search with Ray Tune: each trial is a function that launches an ordinary run. The only module that uses Tune.

Tune starts and stops trials, but the state of a search is only in the trial store: a search that was killed resumes
as a new Tune experiment over the trials that are left. A trial resumes from its own checkpoints, as any run does.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from pais_ray.cluster import connect, ray_compat
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config, load
from pais_ray.files.console import echo
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import describe
from pais_ray.runs.checkpoints import CheckpointError, checkpoints
from pais_ray.runs.lock import RunLockedError, lock_run
from pais_ray.runs.prepare import Data, prepare
from pais_ray.search import report
from pais_ray.search.capacity import concurrent_trials
from pais_ray.search.plan import SearchOptions, SearchPlan, import_trials, make_plan, setting_value
from pais_ray.search.scheduler import METRIC, TrialScheduler
from pais_ray.search.space import Params, compose_with
from pais_ray.search.tracking import SearchTracker
from pais_ray.search.trials import RankedConfiguration, TrialStore
from pais_ray.tracking import record
from pais_ray.tracking.settings import tracking_uri
from pais_ray.train.driver import launch, resources, run_loop
from pais_ray.train.driver.result import summary
from pais_ray.train.messages import EvaluationScores, Event

UNDEFINED = -1.0  # COCO's AP if there is nothing to detect
TRIAL_RESOURCES = {"memory": 1}  # of a trial's process: Tune requires some, and its workers reserve the CPUs
TABLE_EVERY_S = 60.0  # between two tables while trials run
REPORT = "report"  # key of the kind of a trial's report to Tune: score, end, failure or input_error


def search(words: tuple[str, ...], options: SearchOptions) -> dict[str, Any]:
    """Runs a search, or resumes the search of the same name; returns the content of results.json.

    Raises ConfigError or DataError (wrong input), mostly before anything starts.
    """
    plan = make_plan(words, options)
    prepared, data = prepare(plan.base)  # once, so that all trials find the generated data set
    plan.check_unchanged()
    plan.write()
    with lock_run(plan.root):
        return run_search(plan, words, options, prepared, data)


def run_search(
    plan: SearchPlan, words: tuple[str, ...], options: SearchOptions, prepared: Config, data: Data
) -> dict[str, Any]:
    """Runs the trials that are left, writes the results and trains the best configuration if requested."""
    paths = data_paths(prepared)
    store = plan.open_store()
    if options.warm_start:
        count = import_trials(plan, store, base_of_trials(plan, prepared), Path(options.warm_start))
        echo(f"{count} trials imported from {options.warm_start}")
    echo(f"search {plan.root.name}: {plan.sampler}, {plan.samples} configurations x {len(plan.seeds)} seeds over")
    for path, domain in plan.space.items():
        echo(f"  {path}: {domain}")
    rungs = f"after {', '.join(map(str, plan.rungs))} of {plan.steps} steps" if plan.rungs else "none"
    echo(f"rungs: {rungs}" + ("; they require train.eval_every" if plan.base.train.eval_every is None else ""))
    is_own_cluster = connect.connect()
    try:
        concurrent, cpus, threads = divide_cluster(plan.base, options.max_concurrent, is_own_cluster)
        echo(f"{concurrent} trials at a time; a worker has {cpus:g} CPUs and {threads} threads")
        settings = {
            **paths,
            "scaling.cpus_per_worker": cpus,
            "train.threads_per_worker": threads,
            "run.storage_path": str(plan.root / "trials"),
            "tracking.uri": tracking_uri(plan.base.tracking, plan.root.parent),
        }
        tracker = SearchTracker(plan, describe.tags(prepared, data.manifest.split, data.facts), data.facts)
        scheduler = TrialScheduler(plan, store, settings, tracker.close_trial, echo, options.minutes)
        with closing_trials(scheduler, tracker):
            run_until_done(build_tuner(scheduler, tracker.run_id, concurrent), scheduler)
        if scheduler.input_error is not None:
            raise ConfigError(scheduler.input_error)
        result = report.to_json(plan, store, scheduler.stop_reason)
        if options.retrain and scheduler.stop_reason is None:
            result["retrained"] = train_best(plan, words, store)
            report.write(plan, store, result)
    finally:
        if is_own_cluster:
            ray.shutdown()
    return result


def divide_cluster(config: Config, max_concurrent: int | None, is_own_cluster: bool) -> tuple[int, float, int]:
    """(trials at a time, CPUs per worker, threads per worker). Raises ConfigError if not one trial fits."""
    cpus, _ = resources.worker_resources(config, is_own_cluster=is_own_cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = config.scaling.most
    try:
        fits = concurrent_trials(nodes, workers=workers, cpus=cpus, use_gpu=config.scaling.use_gpu)
    except ConfigError:
        if is_own_cluster or max_concurrent is None:
            raise
        fits = max_concurrent  # on a cluster that grows on demand
    count = min(fits, max_concurrent or fits)
    cores = sum(node.get("CPU", 0.0) for node in nodes)
    return count, cpus, config.train.threads_per_worker or max(1, int(cores / (count * workers)))


@contextmanager
def closing_trials(scheduler: TrialScheduler, tracker: SearchTracker) -> Iterator[None]:
    """Writes the results at the end of the block, even if it fails, and ends the runs in MLflow."""
    plan, store = scheduler.plan, scheduler.store
    for trial in store.own_trials():  # stopped by an earlier start that was killed before it closed the run
        if trial.state == "stopped" and record.is_open(plan.trial_root(trial.id)):
            tracker.close_trial(trial, "KILLED")
    try:
        yield
    except BaseException:
        scheduler.stop_reason = scheduler.stop_reason or "an error"
        raise
    finally:
        for trial in scheduler.release_running():
            tracker.close_trial(trial, "KILLED")
        result = report.to_json(plan, store, scheduler.stop_reason)
        try:
            report.write(plan, store, result)
        except OSError as error:
            echo(f"{plan.root}: the results could not be written ({error}); free storage and repeat the command")
        tracker.close(result, "KILLED" if scheduler.stop_reason else "FINISHED")


def build_tuner(scheduler: TrialScheduler, parent: str | None, concurrent: int) -> tune.Tuner:
    """A Tuner that runs ``concurrent`` trials at a time; ``parent`` is the ID of the search's run in MLflow."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    ray_compat.set_tune_environment()
    plan = scheduler.plan
    root, store_path = plan.root, scheduler.store.path

    def trainable(config: dict[str, str]) -> None:
        run_trial(root / "trials" / config["trial"], store_path, root.name, parent)

    return tune.Tuner(
        tune.with_resources(trainable, TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=TrialSearcher(scheduler),
            scheduler=ReportScheduler(scheduler),
            num_samples=-1,  # until the searcher has no more trials
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}",
            storage_path=str(root / run_loop.RAY_FOLDER),
            failure_config=tune.FailureConfig(max_failures=plan.base.run.max_failures),
            stop=SearchStopper(scheduler),
            verbose=0,
        ),
    )


def run_until_done(tuner: tune.Tuner, scheduler: TrialScheduler) -> None:
    """Runs Tune in a thread (in the main thread it would handle Ctrl-C itself) and prints tables meanwhile.

    Raises the error of Tune.
    """
    errors: list[BaseException] = []
    done = threading.Event()

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=fit, daemon=True).start()
    shown_at, shown = time.monotonic(), ""
    while not done.is_set():
        try:
            done.wait(timeout=0.5)
            if time.monotonic() > shown_at + TABLE_EVERY_S:
                shown_at, progress = time.monotonic(), scheduler.progress()
                if progress != shown:
                    echo(progress)
                shown = progress
        except KeyboardInterrupt:
            if scheduler.stop_reason is not None:
                raise
            scheduler.stop_reason = "Ctrl-C"
            echo("stopping all trials; they can resume from their last checkpoints. Ctrl-C again stops immediately")
    if errors:
        raise errors[0]


class NotPickled:
    """An object that Tune pickles as an empty one: Tune's own resume is not used, and locks cannot be pickled."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class TrialSearcher(NotPickled, Searcher):
    """Tune's searcher: asks the scheduler for the next trial."""

    def __init__(self, scheduler: TrialScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        trial = self.scheduler.next_trial()
        if trial is not None:
            return {"trial": trial.id}
        if self.scheduler.has_waiting_trials():
            return None  # Tune asks again later
        finished: str = Searcher.FINISHED
        return finished

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to do: trials report to the scheduler."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the state is in the trial store."""


class ReportScheduler(NotPickled, FIFOScheduler):
    """Tune's scheduler: passes the reports of trials on, and stops none of them.

    Tune would end the process of a trial, which owns the workers, and Ray (2.60) may then keep their CPUs reserved
    until the search ends. Trials therefore stop themselves.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def on_trial_result(self, tune_controller: object, trial: Trial, result: Mapping[str, Any]) -> str:
        name = trial.config["trial"]
        match result.get(REPORT):
            case "score":
                self.scheduler.on_score(name, result["step"], result[METRIC])
            case "end":
                self.scheduler.on_end(name, is_finished=result["finished"])
            case "failure":
                self.scheduler.on_failure(name, result["reason"])
            case "input_error":
                self.scheduler.on_input_error(name, result["reason"])
        return str(self.CONTINUE)

    def on_trial_error(self, tune_controller: object, trial: Trial) -> None:
        if trial.status == Trial.ERROR:  # Tune retries it; a trial that it gives up is RUNNING or PENDING here (2.60)
            return
        lines = str(trial.get_error()).strip().splitlines()
        self.scheduler.on_failure(trial.config["trial"], lines[-1] if lines else "its process died")


class SearchStopper(NotPickled, tune.Stopper):
    """Tune's stopper: ends the whole search."""

    def __init__(self, scheduler: TrialScheduler) -> None:
        self.scheduler = scheduler

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.scheduler.should_stop()


def run_trial(root: Path, store_path: Path, search_name: str, parent: str | None) -> None:
    """Trains the run in ``root``, in the process of a trial, and reports each evaluation to Tune.

    Evaluations of earlier starts are reported first. If the trial store in ``store_path`` then says that the trial is
    stopped, the trial stops with a checkpoint.
    """
    reported = 0
    stop = threading.Event()

    def report_new_scores() -> None:
        nonlocal reported
        for row in metric_rows(root):
            if METRIC in row and row["step"] > reported and not stop.is_set():
                reported = row["step"]
                ap = UNDEFINED if row[METRIC] is None else row[METRIC]
                # Returns after the scheduler has handled the report and saved its decision.
                tune.report({REPORT: "score", "step": reported, METRIC: ap})
                if TrialStore(store_path).trial(root.name).state == "stopped":
                    stop.set()

    def on_event(event: Event) -> None:
        if isinstance(event, EvaluationScores) and event.role == "teacher":
            report_new_scores()

    report_new_scores()
    if stop.is_set():
        tune.report({REPORT: "end", "finished": False})
        return
    try:
        config = load(root / "config.yaml")
        result = launch.train(config, tags={"search": search_name}, parent=parent, on_event=on_event, stop=stop)
    except (run_loop.RunFailedError, CheckpointError) as error:  # affects only this trial; a retry would fail again
        tune.report({REPORT: "failure", "reason": str(error)})
    except RunLockedError:  # locked by an earlier process of this trial, on a node that is draining: Tune retries
        raise
    except ValueError as error:
        tune.report({REPORT: "input_error", "reason": str(error)})
    else:
        report_new_scores()
        tune.report({REPORT: "end", "finished": result.step >= result.steps})


def base_of_trials(plan: SearchPlan, prepared: Config) -> Config:
    """The config of the plan as a trial records it: with absolute paths, and with the settings of the split."""
    base = compose_with(plan.words, data_paths(prepared))
    split = {name: getattr(prepared.data, name) for name in ("labeled", "fold", "holdout")}
    return base.model_copy(update={"data": base.data.model_copy(update=split)})


def data_paths(config: Config) -> Params:
    """The settings that are paths of data and weights, made absolute."""
    paths = {f"data.{name}": value for name, value in config.data if isinstance(value, str)}
    weights = getattr(config.segmentor, "weights", None)
    if isinstance(weights, str):
        paths["segmentor.weights"] = weights
    return {name: os.path.abspath(path) for name, path in paths.items() if os.path.exists(path)}


def train_best(plan: SearchPlan, words: tuple[str, ...], store: TrialStore) -> dict[str, Any]:
    """Trains ``words`` at their own length with the best settings, as the run NAME-best, or resumes that run."""
    best = report.best_of(store.ranking())
    if best is None:
        raise ConfigError(
            f"--retrain-best: no configuration finished, see {plan.root / 'table.txt'}; repeat the command"
        )
    config = best_run_config(f"{plan.root.name}-best", best, words)
    name = config.run.name
    echo(f"training the best configuration, {best.point:03d}, as {name}: {report.describe(best.params)}")
    result = launch.train(config, tags={"search": plan.root.name})
    echo(summary(result, config))
    return result.to_json()


def best_run_config(name: str, best: RankedConfiguration, words: tuple[str, ...]) -> Config:
    """``words`` with the best settings, as the run ``name``; as NAME-011 if that run has other settings."""
    config = compose_with(words, {**best.params, "run.name": name})
    root = Path(config.run.storage_path).absolute() / name
    if not checkpoints(root):
        return config
    before = load(root / "config.yaml")
    if all(setting_value(before, path) == setting_value(config, path) for path in best.params):
        return config
    own = f"{name}-{best.point:03d}"
    echo(f"{root} was trained with the settings of an earlier best configuration; the new run is {own}")
    return compose_with(words, {**best.params, "run.name": own})
