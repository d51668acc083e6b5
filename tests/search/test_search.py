"""Searches without Ray: search spaces, decisions at rungs, proposals, and what survives a restart."""

import inspect
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from pais_ray.cli.training import tune, tune_options
from pais_ray.config.identity import flatten
from pais_ray.config.overlays import ConfigError, config_dirs, resolve
from pais_ray.config.tree import compose, dump, load
from pais_ray.runs.prepare import prepare
from pais_ray.search import report, samplers, tuner
from pais_ray.search.asha import REDUCTION, default_rungs, is_promoted, parse_rungs
from pais_ray.search.capacity import concurrent_trials
from pais_ray.search.plan import SearchOptions, import_trials, make_plan
from pais_ray.search.scheduler import METRIC, TrialScheduler
from pais_ray.search.space import Choice, Range, check_space, compose_with, read_space, short_names
from pais_ray.search.trials import TrialStore

WORDS = ("quickstart", "method.burn_in=5", "train.steps=90", "train.eval_every=10")


def plan_of(tmp_path, *over, words=WORDS, **options):
    options = SearchOptions(over=over or ("method.tau_cls=0.35,0.5,0.65",), name=options.pop("name", "s"), **options)
    plan = make_plan((*words, f"run.storage_path={tmp_path}"), options)
    plan.check_unchanged()
    plan.write()
    return plan


def scheduler_of(plan, lines=None):
    closed = []
    scheduler = TrialScheduler(
        plan,
        plan.open_store(),
        {"run.storage_path": str(plan.root / "trials")},
        lambda trial, status: closed.append((trial.id, status)),
        (lines if lines is not None else []).append,
    )
    return scheduler, closed


def report_scores(scheduler, trial, **aps):
    """Reports the AP at steps, such as `s10=0.1`; returns whether the trial must stop."""
    return [scheduler.on_score(trial, int(step[1:]), ap) for step, ap in aps.items()][-1]


def test_a_search_over_a_setting_that_was_renamed_since_resumes(tmp_path):
    """search.json and trials.json of version 0.1.0 have the old names."""
    over = "method.normalizer=pos,mean"
    plan = plan_of(tmp_path, over)
    scheduler, _ = scheduler_of(plan)
    report_scores(scheduler, scheduler.next_trial().id, s30=0.1)
    for name in ("search.json", "trials.json"):
        path = plan.root / name
        path.write_text(path.read_text().replace("method.normalizer", "method.normaliser"))

    scheduler, _ = scheduler_of(plan_of(tmp_path, over))
    resumed, added = scheduler.next_trial(), scheduler.next_trial()
    assert (resumed.id, resumed.scores) == ("000s0", {30: 0.1})
    assert added.id == "001s0"
    assert load(plan.trial_root(resumed.id) / "config.yaml").method.normalizer == "pos"
    assert [s.params for s in scheduler.store.ranking()] == [{"method.normalizer": v} for v in ("pos", "mean")]


def test_a_full_disk_does_not_end_a_search(tmp_path, monkeypatch):
    """Results stay in memory until storage works again; trials that cannot start wait for it."""
    lines = []
    scheduler, _ = scheduler_of(plan_of(tmp_path), lines)
    first = scheduler.next_trial()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        report_scores(scheduler, first.id, s30=0.1)
        assert scheduler.next_trial() is None
        assert scheduler.has_waiting_trials()
    assert len([line for line in lines if "cannot be written" in line]) == 1
    assert scheduler.next_trial().id == "001s0"
    known = TrialStore(scheduler.plan.root / "trials.json")
    assert known.trial(first.id).scores == {30: 0.1}
    assert [t.state for t in known.trials] == ["running", "running"]


# Search spaces


def test_values_and_ranges_are_parsed():
    space = read_space(
        {"method": {"beta": "loguniform(1, 8)", "ema": [0.99, 0.999], "alpha": None}},
        [
            "method.tau_cls=0.35,0.5",
            "method.tau_iou=uniform(0.3,0.7)",
            "method.burn_in=randint(0,100)",
            "segmentor.preset=choice(nano,resnet50)",
            "optim.reference.milestones=[1,2],[3]",
            "method.beta=2",
        ],
    )
    assert space == {
        "method.beta": Choice((2,)),
        "method.ema": Choice((0.99, 0.999)),
        "method.tau_cls": Choice((0.35, 0.5)),
        "method.tau_iou": Range("uniform", 0.3, 0.7),
        "method.burn_in": Range("randint", 0, 100),
        "segmentor.preset": Choice(("nano", "resnet50")),
        "optim.reference.milestones": Choice(([1, 2], [3])),
    }


@pytest.mark.parametrize(
    ("over", "line"),
    [
        ("method.alhpa=1,2", "did you mean 'alpha'?"),
        ("method.tau_cls=0.5,1.5", "method.tau_cls: input should be less than or equal to 1; got '1.5'"),
        ("method.tau_cls=uniform(0.5,1.5)", "less than or equal to 1"),
        ("method.burn_in=uniform(0,100)", "method.burn_in: input should be a valid integer"),
        ("method.tau_cls=uniform(0.7,0.5)", "uniform takes two ascending numbers"),
        ("method.alpha=loguniform(0,8)", "numbers above 0"),
        ("method.burn_in=randint(0,1.5)", "randint takes two ascending integers"),
        ("method.alpha=logunifrom(1,8)", "did you mean 'loguniform'?"),
        ("method.alpha=1,1", "different values"),
        ("method.alpha", "expected PATH=VALUES"),
        ("method.alpha=", "expected PATH=VALUES"),
        ("method.alpha=[1", "expected values"),
        ("train.seed=0,1", "use --seeds"),
        ("train.steps=10,20", "same steps"),
        ("run.name=a,b", "its own name and folder"),
        ("train=1,2", "expected section.setting=value"),
    ],
)
def test_an_invalid_search_space_is_a_one_line_error_before_anything_starts(over, line, tmp_path):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        plan_of(tmp_path, over)
    assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_search_space_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to search over"):
        make_plan(("quickstart",), SearchOptions())


def test_invalid_combinations_are_found_before_anything_starts(tmp_path):
    """Each value is valid by itself."""
    words = ("synthetic", "mask_rcnn", "pais", "train.steps=90")
    with pytest.raises(ConfigError, match=r"batch\.unlabeled"):
        plan_of(tmp_path, "method.name=pais,supervised", "batch.unlabeled=2,3", words=words)


def test_trials_that_end_within_the_burn_in_are_refused(tmp_path):
    """They would all learn the same: the searched settings have no effect until then."""
    long = (*WORDS, "method.burn_in=90")
    with pytest.raises(ConfigError, match=r"method\.burn_in: a trial of 90 steps .*more --steps"):
        plan_of(tmp_path, words=long)
    with pytest.raises(ConfigError, match=r"method\.burn_in: a trial of 5 steps"):
        plan_of(tmp_path, steps=5)
    for over in ("method.burn_in=0,90", "method.burn_in=randint(0,200)"):
        with pytest.raises(ConfigError, match=r"'method\.burn_in': (90|200)"):
            plan_of(tmp_path, over)
    plan_of(tmp_path, words=(*WORDS, "method.burn_in=89"))
    plan_of(tmp_path, "method.burn_in=0,20", words=long, name="over")  # no trial uses the value in the words
    plan_of(tmp_path, "method.lambda_unlabeled=0,1.5", name="none")  # a deliberate baseline
    plan_of(tmp_path, "method.ema=0.9,0.99", words=("quickstart", "supervised"), name="supervised")


def test_no_rung_is_within_the_burn_in(tmp_path):
    assert plan_of(tmp_path).rungs == (10, 30)
    assert plan_of(tmp_path, words=(*WORDS, "method.burn_in=10"), name="a").rungs == (30,)
    assert plan_of(tmp_path, "method.burn_in=0,30", name="b").rungs == ()
    assert plan_of(tmp_path, words=(*WORDS, "method.burn_in=10"), rungs="10,20", name="c").rungs == (10, 20)
    with pytest.raises(ConfigError, match=r"--rungs 10,30: at 10 no trial has learned from unlabeled images"):
        plan_of(tmp_path, words=(*WORDS, "method.burn_in=11"), rungs="10,30", name="d")


@pytest.mark.parametrize("over", ["batch.unlabeled=1,2", "optim.reference.steps=choice(300,600)"])
def test_trials_of_different_lengths_are_refused(tmp_path, over):
    words = ("quickstart", "method.burn_in=5", "train.steps=null")
    with pytest.raises(ConfigError, match=r"its trials would have \d+ steps, others \d+, .*use --steps"):
        plan_of(tmp_path, over, words=words)
    assert plan_of(tmp_path, over, words=words, steps=90).steps == 90


def test_the_documented_searches_have_rungs(tmp_path):
    """Their trials outlast the burn-in, and weak trials are stopped early."""
    page = Path("docs/guides/search.md").read_text()
    texts = [page, next(d for d in config_dirs()).joinpath("search_pais.yaml").read_text()]
    lines = "".join(texts).replace("\\\n", " ").splitlines()
    commands = [line.lstrip("# ") for line in lines if line.lstrip("# ").startswith("pais-ray tune ")]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        given = tune.make_context("tune", shlex.split(command)[2:]).params
        words = (*given["words"], f"run.storage_path={tmp_path}/{number}")
        assert make_plan(words, tune_options(given)).rungs, command


@given(
    st.sampled_from(["uniform", "loguniform", "randint"]), st.floats(0.001, 1e3), st.floats(0.002, 1e3), st.integers()
)
def test_draws_are_within_the_range(kind, low, span, seed):
    domain = Range(kind, math.ceil(low), math.ceil(low) + math.ceil(span)) if kind == "randint" else None
    domain = domain or Range(kind, low, low + span)
    value = domain.draw(np.random.default_rng(abs(seed)))
    assert domain.low <= value <= domain.high
    assert value in domain
    assert isinstance(value, int) == (kind == "randint")


@pytest.mark.parametrize("segmentor", ["mask_rcnn", "knet"])
def test_the_preset_of_the_paper_searches_its_six_settings(segmentor):
    words = ("coco", segmentor, "pais", "search_pais")
    space = read_space(resolve(words)["search"], [])
    names = {"tau_cls", "tau_iou", "alpha", "beta", "lambda_unlabeled", "ema"}
    assert set(short_names(list(space)).values()) == names
    check_space(words, space)
    paper = flatten(compose(words[:-1]))
    assert all(paper[path] in domain for path, domain in space.items()), "the values of the paper are in the space"
    without = read_space(resolve((*words, "search.method.ema=null"))["search"], [])
    assert set(space) - set(without) == {"method.ema"}


def test_the_preset_names_its_command_and_source():
    head = next(p for d in config_dirs() for p in d.glob("search_pais.yaml")).read_text().split("\n\n")[0]
    assert "#   pais-ray tune " in head
    assert "# Source: " in head


# Rungs


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_at_a_rung_the_best_third_continues(aps):
    """At least one trial continues, and none that is worse than a stopped one."""
    going = [ap for ap in aps if is_promoted(ap, aps)]
    best = sorted(aps, reverse=True)[: -(-len(aps) // REDUCTION)]
    assert sorted(going, reverse=True)[: len(best)] == best
    assert set(going) == set(best), "equal trials continue together"


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_default_rungs_are_evaluations_before_the_end(steps, every):
    rungs = default_rungs(steps, every)
    assert list(rungs) == sorted(set(rungs))
    assert all(0 < r < steps and r % every == 0 for r in rungs)
    assert all(parse_rungs(str(r), steps, every) == (r,) for r in rungs)


def test_rungs_without_an_evaluation_are_refused():
    assert default_rungs(90, 10) == (10, 30)
    assert default_rungs(90, None) == ()
    assert parse_rungs("none", 90, None) == ()
    for text, every in (("15", 10), ("90", 10), ("20,10", 10), ("10", None), ("ten", 10), ("10,10", 10), ("", 10)):
        with pytest.raises(ConfigError, match="--rungs"):
            parse_rungs(text, 90, every)


# Decisions and the trial store


def test_trials_start_report_stop_and_finish(tmp_path):
    plan = plan_of(tmp_path)
    scheduler, closed = scheduler_of(plan)
    a, b, c = (scheduler.next_trial().id for _ in range(3))
    assert scheduler.next_trial() is None
    assert [t.params["method.tau_cls"] for t in scheduler.store.trials] == [0.35, 0.5, 0.65]
    assert not report_scores(scheduler, a, s10=0.1, s20=0.15, s30=0.2)
    assert not report_scores(scheduler, b, s10=0.3)
    assert report_scores(scheduler, c, s10=0.2)
    assert closed == []
    scheduler.on_end(c, is_finished=False)
    assert closed == [(c, "KILLED")], "after it has stopped writing"
    assert scheduler.store.trial(c).state == "stopped"
    assert "AP 0.2000 at rung 10" in scheduler.store.trial(c).why
    for trial, ap in ((a, 0.3), (b, 0.4)):
        report_scores(scheduler, trial, s90=ap)
        scheduler.on_end(trial, is_finished=True)
    ranked = scheduler.store.ranking()
    assert [(s.trials[0].id, s.state, s.ap) for s in ranked] == [
        (b, "finished", 0.4),
        (a, "finished", 0.3),
        (c, "stopped", 0.2),
    ]


def test_rungs_survive_a_kill_and_ignore_late_results(tmp_path):
    """Ray 2.60's ASHA loses its rungs when it is restored, and then fills them with later results."""
    plan = plan_of(tmp_path, "method.tau_cls=0.2,0.3,0.4,0.5")
    scheduler, _ = scheduler_of(plan)
    ids = [scheduler.next_trial().id for _ in range(3)]
    for trial, ap in zip(ids, (0.3, 0.2, 0.1), strict=True):
        report_scores(scheduler, trial, s10=ap)
    before = {step: scheduler.store.rung(step) for step in plan.rungs}
    assert before == {10: dict(zip(ids, (0.3, 0.2, 0.1), strict=True)), 30: {}}

    again, closed = scheduler_of(plan)  # a new process has only the folder
    assert {step: again.store.rung(step) for step in plan.rungs} == before
    assert [t.state for t in again.store.trials] == ["waiting", "stopped", "stopped"]
    assert again.next_trial().id == ids[0], "running trials resume first"
    # It resumed from a checkpoint before the rung and got another AP there; later results follow.
    assert not report_scores(again, ids[0], s10=0.05, s20=0.4, s40=0.9)
    assert {step: again.store.rung(step) for step in plan.rungs} == before
    fresh = again.next_trial().id
    assert not report_scores(again, fresh, s10=0.35), "compared with the values at step 10, not with 0.4 or 0.9"
    assert closed == []


def test_the_trial_store_is_written_atomically(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    scheduler, _ = scheduler_of(plan)
    trial = scheduler.next_trial().id
    text = (plan.root / "trials.json").read_text()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        report_scores(scheduler, trial, s10=0.5)
    assert (plan.root / "trials.json").read_text() == text


def test_failed_trials_are_retried_and_wrong_input_ends_the_search(tmp_path):
    plan = plan_of(tmp_path)
    scheduler, closed = scheduler_of(plan)
    trial = scheduler.next_trial().id
    scheduler.on_failure(trial, "no finite loss")
    assert closed == [(trial, "FAILED")]
    assert not scheduler.should_stop()
    assert scheduler_of(plan)[0].next_trial().id == trial
    other = scheduler.next_trial().id
    scheduler.on_input_error(other, "a.jpg: truncated")
    assert scheduler.should_stop()
    assert scheduler.input_error == f"trial {other}: a.jpg: truncated"


def test_a_later_failure_of_the_process_changes_no_decision(tmp_path):
    scheduler, closed = scheduler_of(plan_of(tmp_path))
    a, b = scheduler.next_trial().id, scheduler.next_trial().id
    report_scores(scheduler, a, s10=0.3, s90=0.3)
    scheduler.on_end(a, is_finished=True)
    assert report_scores(scheduler, b, s10=0.1)
    for trial in (a, b):
        scheduler.on_failure(trial, "its process died")
    assert [t.state for t in scheduler.store.trials] == ["finished", "stopped"]
    assert closed == [(b, "KILLED")], "nothing else ends its run"


@pytest.mark.parametrize(("status", "state"), [(Trial.ERROR, "running"), (Trial.RUNNING, "failed")])
def test_a_failure_that_tune_retries_is_not_recorded(tmp_path, status, state):
    """Tune reports both kinds to its scheduler; a trial that it retries has the status ERROR."""
    scheduler, _ = scheduler_of(plan_of(tmp_path))
    trial = scheduler.next_trial()
    died = SimpleNamespace(config={"trial": trial.id}, status=status, get_error=lambda: "its node died")
    tuner.ReportScheduler(scheduler).on_trial_error(None, died)
    assert (trial.state, trial.why) == (state, "its node died" if state == "failed" else "")


def test_tune_gives_up_before_it_changes_a_trials_state():
    """The test above relies on this; seen in Ray 2.60."""
    source = inspect.getsource(TuneController._process_trial_failure)
    given_up = source[source.index("elif trial.status in {Trial.RUNNING, Trial.PENDING}") :]
    assert given_up.index("_scheduler_alg.on_trial_error") < given_up.index("_schedule_trial_stop")
    recovered = inspect.getsource(TuneController._try_recover)
    assert recovered.index("_schedule_trial_stop(trial, exception=exc)") < recovered.index("_requeue_trial(trial)")


def test_the_time_budget_ends_the_search_and_running_trials_wait(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    lines: list[str] = []
    scheduler = TrialScheduler(
        plan, TrialStore(plan.root / "trials.json"), {}, lambda *_: None, lines.append, minutes=60
    )
    trial = scheduler.next_trial()
    assert not scheduler.should_stop()
    scheduler.deadline -= 3601
    assert scheduler.should_stop()
    assert "time budget" in lines[-1]
    assert [t.id for t in scheduler.release_running()] == [trial.id]
    assert TrialStore(plan.root / "trials.json").trial(trial.id).state == "waiting"


def test_a_search_with_changed_settings_is_refused(tmp_path):
    plan_of(tmp_path)
    plan_of(tmp_path)
    for changed, line in (
        ({"over": ("method.tau_cls=0.35,0.5",)}, "--over method.tau_cls"),
        ({"over": ("method.tau_iou=0.35,0.5",)}, "--over method.tau_cls, --over method.tau_iou"),
        ({"seeds": 2}, "--seeds"),
        ({"rungs": "10"}, "--rungs"),
        ({"sampler": "random"}, "--sampler"),
        ({"words": (*WORDS, "method.alpha=2")}, "method.alpha"),
    ):
        with pytest.raises(ConfigError, match=f"different {line};"):
            plan_of(tmp_path, *changed.pop("over", ()), **changed)
    plan_of(tmp_path, words=(*WORDS, "train.log_every=1"))  # not part of the identity of a search


def test_a_search_does_not_use_the_directory_of_a_run(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"a run of `pais-ray train`"):
        plan_of(tmp_path)


# Proposals


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", "method.alpha=1,2,4", seeds=2, rungs="none")
    scheduler, _ = scheduler_of(plan)
    trials = [scheduler.next_trial() for _ in range(12)]
    assert scheduler.next_trial() is None
    assert len({(t.params["method.tau_cls"], t.params["method.alpha"], t.seed) for t in trials}) == 12
    assert {t.point for t in trials} == set(range(6))
    config = scheduler.trial_config(trials[-1])
    assert (config.method.tau_cls, config.method.alpha, config.train.seed) == (0.5, 4.0, 1)
    assert config.run.name == trials[-1].id
    with pytest.raises(ConfigError, match="has no grid"):
        plan_of(tmp_path, "method.alpha=uniform(1,2)", sampler="grid", name="other")
    with pytest.raises(ConfigError, match="--samples"):
        plan_of(tmp_path, "method.alpha=1,2", samples=3, name="other")


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_a_killed_search_proposes_the_same_configurations(tmp_path, sampler):
    over = ("method.tau_cls=uniform(0.2,0.6)", "method.alpha=loguniform(1,8)", "method.burn_in=randint(0,9)")
    runs = []
    for name, killed in (("whole", False), ("killed", True)):
        plan = plan_of(tmp_path, *over, sampler=sampler, samples=14, name=name)
        scheduler, _ = scheduler_of(plan)
        for k in range(14):
            trial = scheduler.next_trial()
            report_scores(scheduler, trial.id, s90=1 - abs(trial.params["method.tau_cls"] - 0.45))
            scheduler.on_end(trial.id, is_finished=True)
            if killed and k in (4, 11):
                scheduler, _ = scheduler_of(plan)
        assert scheduler.next_trial() is None
        runs.append([t.params for t in scheduler.store.trials])
    assert runs[0] == runs[1]
    assert len({json.dumps(p) for p in runs[0]}) == 14


def test_optuna_proposes_near_the_best(tmp_path):
    """After twenty configurations; random proposals would be 0.34 away on average."""
    plan = plan_of(tmp_path, "method.tau_cls=uniform(0,1)", sampler="optuna", samples=30)
    scheduler, _ = scheduler_of(plan)
    for _ in range(30):
        trial = scheduler.next_trial()
        report_scores(scheduler, trial.id, s90=1 - abs(trial.params["method.tau_cls"] - 0.8))
        scheduler.on_end(trial.id, is_finished=True)
    late = [t.params["method.tau_cls"] for t in scheduler.store.trials[20:]]
    assert sum(abs(v - 0.8) for v in late) / 10 < 0.17


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_a_small_search_space_ends_early(tmp_path, sampler):
    scheduler, _ = scheduler_of(plan_of(tmp_path, "method.tau_cls=0.35,0.5", sampler=sampler, samples=9))
    assert [scheduler.next_trial().params["method.tau_cls"] for _ in range(2)] != [0.35, 0.35]
    assert scheduler.next_trial() is None


def finished_search(tmp_path, name, over, aps, **options):
    plan = plan_of(tmp_path, *over, name=name, **options)
    scheduler, _ = scheduler_of(plan)
    for ap in aps:
        trial = scheduler.next_trial()
        report_scores(scheduler, trial.id, s10=ap / 2, s90=ap)
        scheduler.on_end(trial.id, is_finished=True)
    return plan


def test_a_warm_start_skips_grid_points_and_teaches_optuna(tmp_path):
    over = ("method.tau_cls=0.35,0.5",)
    first = finished_search(tmp_path, "first", over, (0.1, 0.2))
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5,0.65", name="wider")
    scheduler, _ = scheduler_of(plan)
    assert import_trials(plan, scheduler.store, plan.base, first.root) == 2
    assert import_trials(plan, scheduler.store, plan.base, first.root) == 0, "once"
    assert scheduler.next_trial().params == {"method.tau_cls": 0.65}
    assert scheduler.next_trial() is None
    assert [s.ap for s in scheduler.store.ranking()] == [0.2, 0.1, None]
    learned = plan_of(
        tmp_path, "method.tau_cls=uniform(0.3,0.6)", "method.alpha=uniform(1,5)", samples=1, name="learns"
    )
    scheduler, _ = scheduler_of(learned)
    assert import_trials(learned, scheduler.store, learned.base, first.root) == 2
    assert scheduler.store.trials[0].params == {"method.tau_cls": 0.35, "method.alpha": 4.0}, "its fixed value"
    assert scheduler.next_trial() is not None
    assert scheduler.next_trial() is None, "--samples counts new configurations"


def test_a_warm_start_from_a_different_search_is_refused(tmp_path):
    first = finished_search(tmp_path, "first", ("method.tau_cls=0.35",), (0.1,))
    plan = plan_of(tmp_path, words=(*WORDS, "method.beta=1"), name="other")
    scheduler, _ = scheduler_of(plan)
    with pytest.raises(ConfigError, match=r"its trials differ in method\.beta"):
        import_trials(plan, scheduler.store, plan.base, first.root)
    with pytest.raises(ConfigError, match="not the folder of a search"):
        import_trials(plan, scheduler.store, plan.base, tmp_path)


def test_a_warm_start_compares_the_split_of_a_manifest(tmp_path, tiny_coco):
    """The config.yaml of a trial has the settings of the manifest, which the words do not name."""
    words = (*WORDS, *(f"data.{n}={tiny_coco}/{n}.json" for n in ("train", "val")), f"data.images={tiny_coco}/images")
    _, data = prepare(compose((*words, "data.labeled=0.5", "data.fold=3")))
    (tmp_path / "split.json").write_text(data.manifest.to_json())
    words = (*words, f"data.split={tmp_path}/split.json")
    first = finished_search(tmp_path, "first", ("method.tau_cls=0.35",), (0.1,), words=words)
    for trial in TrialStore(first.root / "trials.json").trials:
        path = first.trial_root(trial.id) / "config.yaml"
        path.write_text(dump(prepare(load(path))[0]))
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", words=words, name="wider")
    base = tuner.base_of_trials(plan, prepare(plan.base)[0])
    assert import_trials(plan, TrialStore(plan.root / "trials.json"), base, first.root) == 1


# Capacity


@given(st.lists(st.integers(0, 96), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 48), st.randoms())
@settings(max_examples=300)
def test_the_workers_of_all_trials_fit_wherever_they_are_placed(nodes, workers, quarters, chance):
    """In quarters of a CPU, placed at random; one more trial would not fit."""
    cluster, cpus = [{"CPU": n / 4} for n in nodes], quarters / 4
    try:
        count = concurrent_trials(cluster, workers=workers, cpus=cpus, use_gpu=False)
    except ConfigError:
        count = 0
    free = list(nodes)
    for _ in range(count * workers):
        free[chance.choice([i for i, n in enumerate(free) if n >= quarters])] -= quarters
    assert sum(n // quarters for n in free) < workers


def test_the_capacity_of_typical_machines():
    def count(*cpus, workers=1, each=1.0, gpus=None):
        nodes = [{"CPU": float(c), "GPU": float(gpus or 0)} for c in cpus]
        return concurrent_trials(nodes, workers=workers, cpus=each, use_gpu=gpus is not None)

    assert count(2, each=0.5) == 4
    assert count(2) == 2
    assert count(16, workers=4) == 4
    assert count(2, each=0.4, workers=5) == 1
    assert count(32, 32, workers=4, each=4, gpus=8) == 4
    assert count(64, workers=2, each=4, gpus=8) == 4
    with pytest.raises(ConfigError, match=r"its 3 workers need 1 CPUs each; the cluster's nodes have 2 CPUs\."):
        count(2, workers=3)
    with pytest.raises(ConfigError, match="1 CPUs and a GPU each"):
        count(8, workers=2, gpus=1)


# Reports


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.randoms())
def test_the_ranking_is_by_the_mean_over_seeds(aps, chance):
    store = TrialStore(Path("nowhere"))
    trials = [store.add({"method.tau_cls": point}, seed) for point in range(len(aps)) for seed in (0, 1)]
    for trial in trials:
        trial.scores, trial.state = {90: aps[trial.point][trial.seed]}, "finished"
    chance.shuffle(store.trials)
    ranking = store.ranking()
    means = [sum(pair) / 2 for pair in aps]
    assert [s.ap for s in ranking] == pytest.approx(sorted(means, reverse=True))
    for s in ranking:
        a, b = aps[s.point]
        assert s.ap == pytest.approx((a + b) / 2)
        assert s.spread == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
    assert report.best_of(ranking) == ranking[0]


def test_a_configuration_is_ranked_at_the_last_step_of_all_its_seeds(tmp_path):
    """One seed is still running: the later, higher AP of the other does not count yet."""
    plan = plan_of(tmp_path, "method.tau_cls=0.35", seeds=2)
    scheduler, _ = scheduler_of(plan)
    a = scheduler.next_trial().id
    report_scores(scheduler, a, s10=0.2, s30=0.4, s90=0.9)
    scheduler.on_end(a, is_finished=True)
    report_scores(scheduler, scheduler.next_trial().id, s10=0.1)
    (only,) = scheduler.store.ranking()
    assert (only.state, only.step, only.ap) == ("running", 10, pytest.approx(0.15))
    assert report.best_of([only]) is None


def test_the_first_seed_decides_for_its_configuration(tmp_path):
    """If each seed was compared by itself, all seeds of a configuration would seldom finish."""
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5,0.65", seeds=3)
    scheduler, _ = scheduler_of(plan)
    a, b = scheduler.next_trial(), scheduler.next_trial()
    assert (a.seed, b.seed, a.point, b.point) == (0, 0, 0, 1), "first seeds of other configurations start meanwhile"
    report_scores(scheduler, a.id, s10=0.5, s30=0.5, s90=0.5)
    scheduler.on_end(a.id, is_finished=True)
    again = scheduler_of(plan)[0]  # killed here: running trials resume first, then new ones start
    assert [(t.point, t.seed) for t in (again.next_trial(), again.next_trial(), again.next_trial())] == [
        (1, 0),
        (0, 1),
        (0, 2),
    ]
    assert report_scores(again, b.id, s10=0.4)
    again.on_end(b.id, is_finished=False)
    for trial in ("000s1", "000s2"):
        assert not report_scores(again, trial, s10=0.1, s30=0.1, s90=0.1), "runs to the end without comparisons"
        again.on_end(trial, is_finished=True)
    c = again.next_trial()
    assert (c.point, c.seed) == (2, 0), "no further seed of a stopped configuration"
    assert again.next_trial() is None
    assert again.has_waiting_trials(), "its other seeds may start later"
    assert report_scores(again, c.id, s10=0.2), "against 0.5 and 0.4: further seeds are not at the rung"
    assert again.store.rung(10) == {"000s0": 0.5, "001s0": 0.4, "002s0": 0.2}
    assert again.next_trial() is None
    assert not again.has_waiting_trials()
    best = report.best_of(again.store.ranking())
    assert (best.point, len(best.trials), best.ap) == (0, 3, pytest.approx(0.7 / 3))


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from(["grid", "random", "optuna"]), st.randoms())
@settings(max_examples=25, deadline=None)
def test_every_search_ends_with_a_best(tmp_path_factory, places, seeds, sampler, chance):
    """For any number of concurrent trials and any scores, one configuration finishes all its seeds."""
    over = "method.tau_cls=0.2,0.3,0.4,0.5,0.6"
    plan = plan_of(
        tmp_path_factory.mktemp("s"), over, seeds=seeds, sampler=sampler, samples=None if sampler == "grid" else 5
    )
    scheduler, _ = scheduler_of(plan)
    running = {}
    while True:
        while len(running) < places and (trial := scheduler.next_trial()) is not None:
            running[trial.id] = iter((10, 30, 90))
        if not running:
            break
        name = chance.choice(sorted(running))
        step = next(running[name], None)
        if step is None or report_scores(scheduler, name, **{f"s{step}": chance.random()}):
            scheduler.on_end(name, is_finished=step is None)
            del running[name]
    assert not scheduler.has_waiting_trials()
    best = report.best_of(scheduler.store.ranking())
    assert [t.seed for t in best.trials] == list(range(seeds))
    assert {len(s.trials) for s in scheduler.store.ranking() if s.state == "stopped"} <= {1}
    assert {s.state for s in scheduler.store.ranking()} <= {"finished", "stopped"}


def test_tune_asks_again_while_seeds_wait(tmp_path):
    """FINISHED would be final for Tune."""
    scheduler, _ = scheduler_of(plan_of(tmp_path, "method.tau_cls=0.35", seeds=2))
    suggest = tuner.TrialSearcher(scheduler)
    assert suggest.suggest("x") == {"trial": "000s0"}
    assert suggest.suggest("x") is None
    scheduler.on_end("000s0", is_finished=True)
    assert suggest.suggest("x") == {"trial": "000s1"}
    assert suggest.suggest("x") == Searcher.FINISHED


def test_another_best_configuration_has_its_own_run_name(tmp_path):
    """NAME-best belongs to the first best configuration and cannot be resumed with other settings."""
    words = (*WORDS, f"run.storage_path={tmp_path}")
    plan = finished_search(tmp_path, "s", ("method.tau_cls=0.35,0.5",), (0.1, 0.2), rungs="none")
    low, high = sorted(TrialStore(plan.root / "trials.json").ranking(), key=lambda s: s.point)
    config = tuner.best_run_config("s-best", low, words)
    assert (config.run.name, config.method.tau_cls) == ("s-best", 0.35)
    assert tuner.best_run_config("s-best", high, words).run.name == "s-best", "it has no checkpoint yet"
    root = tmp_path / "s-best"
    checkpoint = root / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (root / "config.yaml").write_text(dump(config))
    assert tuner.best_run_config("s-best", low, words).run.name == "s-best"
    other = tuner.best_run_config("s-best", high, words)
    assert (other.run.name, other.method.tau_cls) == ("s-best-001", 0.5)


def test_retraining_without_a_finished_configuration_is_a_one_line_error(tmp_path):
    plan = plan_of(tmp_path)
    with pytest.raises(ConfigError, match="--retrain-best: no configuration finished"):
        tuner.train_best(plan, plan.words, TrialStore(plan.root / "trials.json"))


def test_the_files_of_a_search(tmp_path):
    over = ("method.tau_cls=0.35,0.5", "method.alpha=1,4", "optim.reference.milestones=[240,280]")
    plan = finished_search(tmp_path, "first", over, (0.1, 0.4, 0.3, 0.2), rungs="none")
    store = TrialStore(plan.root / "trials.json")
    result = report.to_json(plan, store, None)
    report.write(plan, store, result)
    figures = ("figures/parallel.png", "figures/parameters.png")
    for name in ("table.txt", "results.json", "results.csv", "best.yaml", *figures):
        assert (plan.root / name).stat().st_size > 100
    best = (plan.root / "best.yaml").read_text()
    assert yaml.safe_load(best)["method"] == {"tau_cls": 0.35, "alpha": 4}
    assert "segm AP 0.4000" in best
    assert compose_with((*WORDS, str(plan.root / "best.yaml")), {}).method.alpha == 4
    rows = (plan.root / "results.csv").read_text().splitlines()
    assert rows[0] == "trial,configuration,seed,state,step,teacher/segm_AP,method.tau_cls,method.alpha," + (
        "optim.reference.milestones"
    )
    assert rows[2].startswith("001s0,1,0,finished,90,0.4,0.35,4,")
    lines = (plan.root / "table.txt").read_text().splitlines()
    assert lines[0].split() == ["segm", "AP", "step", "state", "tau_cls", "alpha", "milestones"]
    assert [line.split()[0] for line in lines[1:]] == ["001", "002", "003", "000"]
    assert json.loads((plan.root / "results.json").read_text())["best"]["teacher/segm_AP"] == 0.4


def test_csv_columns_do_not_depend_on_the_order_of_params(tmp_path):
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", "method.alpha=1,4")
    store = TrialStore(plan.root / "trials.json")
    store.add({"method.alpha": 4, "method.tau_cls": 0.5}, 0)
    report.write(plan, store, {})
    head, row = (plan.root / "results.csv").read_text().splitlines()
    assert head.split(",")[-2:] == ["method.tau_cls", "method.alpha"]
    assert row.split(",")[-2:] == ["0.5", "4"]


def test_random_points_are_a_prefix_of_more():
    space = read_space({}, ["method.tau_cls=uniform(0,1)", "method.alpha=1,2"])
    few, many = (list(samplers.random_points(space, 7, count)) for count in (3, 9))
    assert many[:3] == few
    assert few != list(samplers.random_points(space, 8, 3))


def test_reports_of_trials_reach_the_scheduler_by_their_kind(tmp_path):
    scheduler, closed = scheduler_of(plan_of(tmp_path))
    adapter = tuner.ReportScheduler(scheduler)
    a, b, c = (scheduler.next_trial() for _ in range(3))

    def send(trial, **result):
        return adapter.on_trial_result(None, SimpleNamespace(config={"trial": trial.id}), result)

    assert send(a, report="score", step=10, **{METRIC: 0.4}) == adapter.CONTINUE
    send(a, report="end", finished=True)
    send(b, report="failure", reason="no finite loss")
    send(b)  # Tune repeats the end of a function without a report
    send(c, report="input_error", reason="a.jpg: truncated")
    assert [(t.state, t.why, t.scores) for t in (a, b)] == [
        ("finished", "", {10: 0.4}),
        ("failed", "no finite loss", {}),
    ]
    assert closed == [(b.id, "FAILED")]
    assert scheduler.input_error == f"trial {c.id}: a.jpg: truncated"


@pytest.mark.parametrize("decision", ["running", "stopped"])
def test_a_trial_stops_itself_if_the_store_says_so(tmp_path, monkeypatch, decision):
    """It reports the scores of an earlier start first."""
    plan = plan_of(tmp_path)
    scheduler, _ = scheduler_of(plan)
    trial = scheduler.next_trial()
    root = plan.trial_root(trial.id)
    (root / "metrics.jsonl").write_text(json.dumps({"step": 10, "time": 1.0, METRIC: 0.1}) + "\n")
    reports = []

    def report_to_tune(result):
        reports.append(result)
        trial.state = decision
        scheduler.save()

    def train(config, *, stop, **_):
        assert decision == "running"
        assert config.run.name == trial.id
        return SimpleNamespace(step=90, steps=90)

    monkeypatch.setattr(tuner.tune, "report", report_to_tune)
    monkeypatch.setattr(tuner.launch, "train", train)
    tuner.run_trial(root, plan.root / "trials.json", plan.root.name, None)
    assert reports == [
        {"report": "score", "step": 10, METRIC: 0.1},
        {"report": "end", "finished": decision == "running"},
    ]
