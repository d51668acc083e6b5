"""tune(): a search with Ray Tune, one driver function a trial that launches Ray Train. The only user of Tune.

Tune starts and stops trials; what is remembered is in the ledger alone, and a search that was killed goes on as a
new Tune experiment over what is left. A trial is an ordinary run, so it resumes from its own checkpoints.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
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
from pais_ray.search.plan import Options, Plan, make_plan, value_at, warm_start
from pais_ray.search.scheduler import METRIC, TrialScheduler
from pais_ray.search.space import Params, compose_with
from pais_ray.search.tracking import Tracked
from pais_ray.search.trials import LEDGER, Standing, TrialStore
from pais_ray.tracking import record
from pais_ray.tracking.settings import tracking_uri
from pais_ray.train.driver import launch, resources, run_loop
from pais_ray.train.driver.result import summary
from pais_ray.train.messages import EvaluationScores, Event

UNDEFINED = -1.0  # COCO's AP where there is nothing to find

WAITING = {"memory": 1}  # of a trial's own process: Tune wants it to take something, and the CPUs are for its workers

TABLE_EVERY = 60.0  # s between two tables while trials run


def search(words: tuple[str, ...], options: Options) -> dict[str, Any]:
    """Searches, or goes on with the search of that name; what came out, as in results.json.

    Raises ConfigError or DataError (wrong input), mostly before anything starts.
    """
    plan = make_plan(words, options)
    prepared, data = prepare(plan.base)  # here, once: trials find the generated data set in its place
    plan.check_same()
    with lock_run(plan.root):
        return carry_out(plan, words, options, prepared, data)


def carry_out(plan: Plan, words: tuple[str, ...], options: Options, prepared: Config, data: Data) -> dict[str, Any]:
    """The search from its ledger to its results."""
    paths = data_paths(prepared)
    ledger = TrialStore(plan.root / LEDGER)
    if options.warm_start:
        taken = warm_start(plan, ledger, as_written(plan, prepared), Path(options.warm_start))
        echo(f"{taken} trials taken up from {options.warm_start}")
    echo(f"search {plan.root.name}: {plan.kind}, {plan.samples} configurations x {len(plan.seeds)} seeds over")
    for path, domain in plan.space.items():
        echo(f"  {path}: {domain}")
    echo(f"rungs: {', '.join(map(str, plan.rungs)) or 'none; they need train.eval_every'} of {plan.steps} steps")
    started_here = connect.connect()
    try:
        concurrent, shares = share(plan.base, options.max_concurrent, started_here)
        cpus, threads = shares.values()
        echo(f"{concurrent} trials at a time; a worker has {cpus:g} CPUs and {threads} threads")
        settings = {
            **paths,
            **shares,
            "run.storage_path": str(plan.root / "trials"),
            "tracking.uri": tracking_uri(plan.base.tracking, plan.root.parent),
        }
        tracked = Tracked(plan, describe.tags(prepared, data.manifest.split, data.facts), data.facts)
        control = TrialScheduler(plan, ledger, settings, tracked.close_trial, echo, options.minutes)
        result = conclude(control, tracked, lambda: follow(tuner(control, tracked, concurrent), control))
        if options.retrain and control.halt is None:
            result["retrained"] = retrain(plan, words, ledger)
            report.write(plan, ledger, result)
    finally:
        if started_here:
            ray.shutdown()
    return result


def share(config: Config, wanted: int | None, ours: bool) -> tuple[int, Params]:
    """How many trials run at once, and the part of the cluster that each of their workers gets."""
    cpus, _ = resources.worker_resources(config, is_own_cluster=ours)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = config.scaling.most
    try:
        fits = concurrent_trials(nodes, workers=workers, cpus=cpus, use_gpu=config.scaling.use_gpu)
    except ConfigError:
        if ours or wanted is None:
            raise
        fits = wanted  # of a cluster that grows when work waits for it
    count = min(fits, wanted or fits)
    cores = sum(node.get("CPU", 0.0) for node in nodes)
    threads = config.train.threads_per_worker or max(1, int(cores / (count * workers)))
    return count, {"scaling.cpus_per_worker": cpus, "train.threads_per_worker": threads}


def conclude(control: TrialScheduler, tracked: Tracked, work: Any) -> dict[str, Any]:
    """Does the work and, however it ends, writes down what came out."""
    plan = control.plan
    for trial in control.own():  # stopped, and the search was killed before its run was closed
        if trial.state == "stopped" and record.is_open(plan.trial_root(trial.id)):
            tracked.close_trial(trial, "KILLED")
    try:
        work()
    except BaseException:
        control.halt = control.halt or "an error"
        raise
    finally:
        for trial in control.rest():
            tracked.close_trial(trial, "KILLED")
        result = report.to_json(plan, control.ledger, control.halt)
        try:
            report.write(plan, control.ledger, result)
        except OSError as error:
            echo(f"{plan.root}: the results could not be written ({error}); make room, and give the same command again")
        tracked.close(result, "KILLED" if control.halt else "FINISHED")
    if control.wrong_input is not None:
        raise ConfigError(control.wrong_input)
    return result


def tuner(control: TrialScheduler, tracked: Tracked, concurrent: int) -> tune.Tuner:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    ray_compat.set_tune_environment()
    root, trials, parent = control.plan.root, control.plan.root / "trials", tracked.run_id
    return tune.Tuner(
        tune.with_resources(lambda config: run_trial(trials / config["trial"], root.name, parent), WAITING),
        tune_config=tune.TuneConfig(
            search_alg=Suggest(control),
            scheduler=Judge(control),
            num_samples=-1,  # until the searcher has no more
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}",
            storage_path=str(root / run_loop.RAY_FOLDER),
            failure_config=tune.FailureConfig(max_failures=control.plan.base.run.max_failures),
            stop=Halt(control),
            verbose=0,
        ),
    )


def follow(tuner: tune.Tuner, control: TrialScheduler) -> None:
    """Runs Tune in a thread of its own (in the main one it would take Ctrl-C for itself), with a table now and then.
    Raises what Tune raised."""
    outcome: dict[str, BaseException] = {}
    done = threading.Event()

    def target() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    threading.Thread(target=target, daemon=True).start()
    shown, told = time.monotonic(), ""
    while not done.is_set():
        try:
            done.wait(timeout=0.5)
            if time.monotonic() > shown + TABLE_EVERY:
                shown, progress = time.monotonic(), control.progress()
                if progress != told:
                    echo(progress)
                told = progress
        except KeyboardInterrupt:
            if control.halt is not None:
                raise
            control.halt = "Ctrl-C"
            echo("stopping all trials; they go on from their last checkpoints. Ctrl-C again to stop at once")
    if "error" in outcome:
        raise outcome["error"]


class Unsaved:
    """Tune pickles these for its own way to resume, which we do not use: locks and threads stay here."""

    def __reduce__(self) -> Any:
        return object, ()


class Suggest(Unsaved, Searcher):
    """Tune's searcher: asks for the next trial."""

    def __init__(self, control: TrialScheduler) -> None:
        super().__init__()
        self.control = control

    def suggest(self, trial_id: str) -> Any:
        trial = self.control.next()
        if trial is None:  # None: ask again later
            return None if self.control.waits() else Searcher.FINISHED
        return {"trial": trial.id}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...
    def save(self, checkpoint_path: str) -> None: ...


class Judge(Unsaved, FIFOScheduler):
    """Tune's scheduler: hands on what trials report. It stops none: Tune would end a trial's process, and with it the
    owner of its workers, whose CPUs Ray (2.60) may then keep reserved until the search ends. Trials stop themselves."""

    def __init__(self, control: TrialScheduler) -> None:
        super().__init__()
        self.control = control

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.control.on_result(trial.config["trial"], result)
        return str(self.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if trial.status == Trial.ERROR:  # Tune tries it again; what it gives up is still RUNNING or PENDING here (2.60)
            return
        lines = str(trial.get_error()).strip().splitlines()
        self.control.on_result(trial.config["trial"], {"failed": lines[-1] if lines else "its process died"})


class Halt(Unsaved, tune.Stopper):
    """Tune's stopper: ends the whole search."""

    def __init__(self, control: TrialScheduler) -> None:
        self.control = control

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.control.halts()


def run_trial(root: Path, search: str, parent: str | None) -> None:
    """A trial's life, in a process of its own: trains the run at ``root`` and reports each evaluation to Tune, those
    of an earlier start first. Where the ledger then says that it is stopped, it stops with a checkpoint."""
    reported = 0
    stop = threading.Event()

    def report_new() -> None:
        nonlocal reported
        for row in metric_rows(root):
            if METRIC in row and row["step"] > reported and not stop.is_set():
                reported = row["step"]
                # Returns when Tune has taken it, and the verdict stands in the ledger.
                tune.report({"step": reported, METRIC: UNDEFINED if row[METRIC] is None else row[METRIC]})
                if TrialStore(root.parent.parent / LEDGER).trial(root.name).state == "stopped":
                    stop.set()

    def report_scores(event: Event) -> None:
        if isinstance(event, EvaluationScores) and event.role == "teacher":
            report_new()

    report_new()
    if stop.is_set():
        tune.report({"finished": False})
        return
    try:
        config = load(root / "config.yaml")
        result = launch.train(config, tags={"search": search}, parent=parent, on_event=report_scores, stop=stop)
    except (run_loop.RunFailedError, CheckpointError) as error:  # of this trial alone; trying again cannot help
        tune.report({"failed": str(error)})
    except RunLockedError:  # by this trial's process on a node that is being given up: Tune tries again
        raise
    except ValueError as error:
        tune.report({"wrong_input": str(error)})
    else:
        report_new()
        tune.report({"finished": result.step >= result.steps})


def as_written(plan: Plan, prepared: Config) -> Config:
    """What WORDS spell, as the config.yaml of a trial says it: with paths for every node and what the split is."""
    base = compose_with(plan.words, data_paths(prepared))
    split = {name: getattr(prepared.data, name) for name in ("labeled", "fold", "holdout")}
    return base.model_copy(update={"data": base.data.model_copy(update=split)})


def data_paths(config: Config) -> Params:
    """The config's paths of data and weights, as every node can find them."""
    paths = {f"data.{name}": value for name, value in config.data if isinstance(value, str)}
    weights = getattr(config.segmentor, "weights", None)
    if isinstance(weights, str):
        paths["segmentor.weights"] = weights
    return {name: os.path.abspath(path) for name, path in paths.items() if os.path.exists(path)}


def retrain(plan: Plan, words: tuple[str, ...], ledger: TrialStore) -> dict[str, Any]:
    """Trains WORDS, at their own length, with the best settings, as the run NAME-best; or resumes it."""
    best = report.best_of(ledger.standings())
    if best is None:
        raise ConfigError(f"--retrain-best: no configuration finished, see {plan.root / 'table.txt'}; run it again")
    config = named_best(f"{plan.root.name}-best", best, words)
    name = config.run.name
    echo(f"training the best configuration, {best.point:03d}, as {name}: {report.describe(best.params)}")
    result = launch.train(config, tags={"search": plan.root.name})
    echo(summary(result, config))
    return result.to_json()


def named_best(name: str, best: Standing, words: tuple[str, ...]) -> Config:
    """WORDS with the best settings, as the run ``name``, or as NAME-011 where that name is of an earlier best."""
    config = compose_with(words, {**best.params, "run.name": name})
    root = Path(config.run.storage_path).absolute() / name
    if not checkpoints(root):
        return config
    before = load(root / "config.yaml")
    if all(value_at(before, path) == value_at(config, path) for path in best.params):
        return config
    own = f"{name}-{best.point:03d}"
    echo(f"{root} has the settings of an earlier best; this one is {own}")
    return compose_with(words, {**best.params, "run.name": own})


def concurrent_trials(nodes: Sequence[Mapping[str, float]], *, workers: int, cpus: float, use_gpu: bool) -> int:
    """The most trials that all of a cluster's ``nodes`` (resource -> amount) can run at once: each worker has a place
    of ``cpus`` CPUs (and a GPU). With more, trials would wait for workers that cannot start. A trial's own process and
    the tasks that read images take no CPU. Raises ConfigError below one."""
    places = 0
    for node in nodes:
        fits = _floor(node.get("CPU", 0.0) / cpus)
        places += min(fits, int(node.get("GPU", 0.0))) if use_gpu else fits
    found = places // workers
    if found < 1:
        have = ", ".join(f"{n.get('CPU', 0.0):g} CPUs" + f" {n.get('GPU', 0.0):g} GPUs" * use_gpu for n in nodes)
        raise ConfigError(
            f"not one trial fits: its {workers} workers need {cpus:g} CPUs{' and a GPU' * use_gpu} each; the cluster's "
            f"nodes have {have or 'none'}. Lower scaling.cpus_per_worker or scaling.num_workers; where "
            "the cluster grows by itself, say how many trials at once with --max-concurrent"
        )
    return found


def _floor(value: float) -> int:
    """Of 2.9999999999999996, which is 1.2 / 0.4, it is 3."""
    return math.floor(value + 1e-9)
