"""Laws of a search without Ray: what may be searched, who goes on at a rung, what is proposed, what survives."""

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

from pais_ray.cli.training import tune
from pais_ray.config.identity import flatten
from pais_ray.config.overlays import ConfigError, config_dirs, resolve
from pais_ray.config.tree import compose, dump, load
from pais_ray.runs.prepare import prepare
from pais_ray.search import report, samplers, tuner
from pais_ray.search.asha import ETA, default_rungs, goes_on, parse_rungs
from pais_ray.search.plan import Options, make_plan, warm_start
from pais_ray.search.scheduler import METRIC, TrialScheduler
from pais_ray.search.space import Choice, Range, check_space, compose_with, read_space, short_names
from pais_ray.search.trials import TrialStore
from pais_ray.search.tuner import concurrent_trials

WORDS = ("quickstart", "method.burn_in=5", "train.steps=90", "train.eval_every=10")


def plan_of(tmp_path, *over, words=WORDS, **options):
    told = Options(over=over or ("method.tau_cls=0.35,0.5,0.65",), name=options.pop("name", "s"), **options)
    plan = make_plan((*words, f"run.storage_path={tmp_path}"), told)
    plan.check_same()
    return plan


def control_of(plan, said=None):
    closed = []
    control = TrialScheduler(
        plan,
        TrialStore(plan.root / "trials.json"),
        {"run.storage_path": str(plan.root / "trials")},
        lambda trial, status: closed.append((trial.id, status)),
        (said if said is not None else []).append,
    )
    return control, closed


def on_result(control, trial, **aps):
    """Reports AP at steps, as `s10=0.1`; whether the trial must stop."""
    return [control.on_result(trial, {"step": int(s[1:]), METRIC: ap}) for s, ap in aps.items()][-1]


def test_a_full_disk_does_not_end_a_search(tmp_path, monkeypatch):
    """What is known stays in memory, and is written when there is room; trials that cannot begin wait for it."""
    said = []
    control, _ = control_of(plan_of(tmp_path), said)
    first = control.next()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        on_result(control, first.id, s30=0.1)
        assert control.next() is None
        assert control.waits()
    assert len([s for s in said if "cannot be written" in s]) == 1
    assert control.next().id == "001s0"
    known = TrialStore(control.plan.root / "trials.json")
    assert known.trial(first.id).scores == {30: 0.1}
    assert [t.state for t in known.trials] == ["running", "running"]


# What may be searched over


def test_values_and_ranges_are_read():
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
        ("run.name=a,b", "folders of their own"),
        ("train=1,2", "expected section.setting=value"),
    ],
)
def test_what_cannot_be_searched_is_one_line_before_anything_starts(over, line, tmp_path):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        plan_of(tmp_path, over)
    assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_search_over_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to search over"):
        make_plan(("quickstart",), Options())


def test_combinations_that_do_not_fit_are_found_before_anything_starts(tmp_path):
    """Each value fits on its own."""
    words = ("synthetic", "mask_rcnn", "pais", "train.steps=90")
    with pytest.raises(ConfigError, match=r"batch\.unlabeled"):
        plan_of(tmp_path, "method.name=pais,supervised", "batch.unlabeled=2,3", words=words)


def test_trials_that_end_within_the_burn_in_are_refused(tmp_path):
    """All of them would be the same training: what is searched over weighs nothing until then."""
    long = (*WORDS, "method.burn_in=90")
    with pytest.raises(ConfigError, match=r"method\.burn_in: a trial of 90 steps .*more --steps"):
        plan_of(tmp_path, words=long)
    with pytest.raises(ConfigError, match=r"method\.burn_in: a trial of 5 steps"):
        plan_of(tmp_path, steps=5)
    for over in ("method.burn_in=0,90", "method.burn_in=randint(0,200)"):
        with pytest.raises(ConfigError, match=r"'method\.burn_in': (90|200)"):
            plan_of(tmp_path, over)
    plan_of(tmp_path, words=(*WORDS, "method.burn_in=89"))
    plan_of(tmp_path, "method.burn_in=0,20", words=long, name="over")  # the words' own is no trial's
    plan_of(tmp_path, "method.lambda_unlabeled=0,1.5", name="none")  # a baseline on purpose
    plan_of(tmp_path, "method.ema=0.9,0.99", words=("quickstart", "supervised"), name="supervised")


def test_no_rung_lies_within_the_burn_in(tmp_path):
    assert plan_of(tmp_path).rungs == (10, 30)
    assert plan_of(tmp_path, words=(*WORDS, "method.burn_in=10"), name="a").rungs == (30,)
    assert plan_of(tmp_path, "method.burn_in=0,30", name="b").rungs == ()
    assert plan_of(tmp_path, words=(*WORDS, "method.burn_in=10"), rungs="10,20", name="c").rungs == (10, 20)
    with pytest.raises(ConfigError, match=r"--rungs 10,30: at 10 no unlabeled image"):
        plan_of(tmp_path, words=(*WORDS, "method.burn_in=11"), rungs="10,30", name="d")


@pytest.mark.parametrize("over", ["batch.unlabeled=1,2", "optim.reference.steps=choice(300,600)"])
def test_trials_of_different_lengths_are_refused(tmp_path, over):
    words = ("quickstart", "method.burn_in=5", "train.steps=null")
    with pytest.raises(ConfigError, match=r"its trials would have \d+ steps, others \d+, .*give --steps"):
        plan_of(tmp_path, over, words=words)
    assert plan_of(tmp_path, over, words=words, steps=90).steps == 90


def test_the_documented_searches_have_rungs(tmp_path):
    """And so are worth their time: their trials get over the burn-in, and weak ones are stopped."""
    page = Path("docs/guides/search.md").read_text()
    told = [page, next(d for d in config_dirs()).joinpath("search_pais.yaml").read_text()]
    lines = "".join(told).replace("\\\n", " ").splitlines()
    commands = [line.lstrip("# ") for line in lines if line.lstrip("# ").startswith("pais-ray tune ")]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        given = tune.make_context("tune", shlex.split(command)[2:]).params
        words = (*given.pop("words"), f"run.storage_path={tmp_path}/{number}")
        given.pop("json_path")
        assert make_plan(words, Options(**given)).rungs, command


@given(
    st.sampled_from(["uniform", "loguniform", "randint"]), st.floats(0.001, 1e3), st.floats(0.002, 1e3), st.integers()
)
def test_draws_lie_between_the_ends(kind, low, span, seed):
    domain = Range(kind, math.ceil(low), math.ceil(low) + math.ceil(span)) if kind == "randint" else None
    domain = domain or Range(kind, low, low + span)
    value = domain.draw(np.random.default_rng(abs(seed)))
    assert domain.low <= value <= domain.high
    assert value in domain
    assert isinstance(value, int) == (kind == "randint")


@pytest.mark.parametrize("segmentor", ["mask_rcnn", "knet"])
def test_the_papers_preset_searches_its_six_numbers(segmentor):
    words = ("coco", segmentor, "pais", "search_pais")
    space = read_space(resolve(words)["search"], [])
    names = {"tau_cls", "tau_iou", "alpha", "beta", "lambda_unlabeled", "ema"}
    assert set(short_names(list(space)).values()) == names
    check_space(words, space)
    paper = flatten(compose(words[:-1]))
    assert all(paper[path] in domain for path, domain in space.items()), "the paper's own numbers are within"
    without = read_space(resolve((*words, "search.method.ema=null"))["search"], [])
    assert set(space) - set(without) == {"method.ema"}


def test_the_preset_names_its_command_and_source():
    head = next(p for d in config_dirs() for p in d.glob("search_pais.yaml")).read_text().split("\n\n")[0]
    assert "#   pais-ray tune " in head
    assert "# Source: " in head


# Rungs


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_at_a_rung_the_best_third_goes_on(aps):
    """However many there are: at least one, and no one who is worse than somebody stopped."""
    going = [ap for ap in aps if goes_on(ap, aps)]
    best = sorted(aps, reverse=True)[: -(-len(aps) // ETA)]
    assert sorted(going, reverse=True)[: len(best)] == best
    assert set(going) == set(best), "equals go on together"


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_default_rungs_are_evaluations_before_the_end(steps, every):
    rungs = default_rungs(steps, every)
    assert list(rungs) == sorted(set(rungs))
    assert all(0 < r < steps and r % every == 0 for r in rungs)
    assert all(parse_rungs(str(r), steps, every) == (r,) for r in rungs)


def test_rungs_that_no_trial_is_evaluated_at_are_refused():
    assert default_rungs(90, 10) == (10, 30)
    assert default_rungs(90, None) == ()
    assert parse_rungs("none", 90, None) == ()
    for text, every in (("15", 10), ("90", 10), ("20,10", 10), ("10", None), ("ten", 10), ("10,10", 10), ("", 10)):
        with pytest.raises(ConfigError, match="--rungs"):
            parse_rungs(text, 90, every)


# What is decided and remembered


def test_trials_start_report_stop_and_finish(tmp_path):
    plan = plan_of(tmp_path)
    control, closed = control_of(plan)
    a, b, c = (control.next().id for _ in range(3))
    assert control.next() is None
    assert [t.params["method.tau_cls"] for t in control.ledger.trials] == [0.35, 0.5, 0.65]
    assert not on_result(control, a, s10=0.1, s20=0.15, s30=0.2)
    assert not on_result(control, b, s10=0.3)
    assert on_result(control, c, s10=0.2)
    assert closed == []
    control.on_result(c, {"finished": False})
    assert closed == [(c, "KILLED")], "when it writes no more"
    assert control.ledger.trial(c).state == "stopped"
    assert "AP 0.2000 at rung 10" in control.ledger.trial(c).why
    for trial, ap in ((a, 0.3), (b, 0.4)):
        on_result(control, trial, s90=ap)
        control.on_result(trial, {"finished": True})
    ranked = control.ledger.standings()
    assert [(s.trials[0].id, s.state, s.ap) for s in ranked] == [
        (b, "finished", 0.4),
        (a, "finished", 0.3),
        (c, "stopped", 0.2),
    ]


def test_rungs_survive_a_kill_and_late_results_stay_out_of_them(tmp_path):
    """Ray 2.60's ASHA, killed and restored, has empty rungs and fills them with later results."""
    plan = plan_of(tmp_path, "method.tau_cls=0.2,0.3,0.4,0.5")
    control, _ = control_of(plan)
    ids = [control.next().id for _ in range(3)]
    for trial, ap in zip(ids, (0.3, 0.2, 0.1), strict=True):
        on_result(control, trial, s10=ap)
    before = {step: control.ledger.rung(step) for step in plan.rungs}
    assert before == {10: dict(zip(ids, (0.3, 0.2, 0.1), strict=True)), 30: {}}

    again, closed = control_of(plan)  # a new process: nothing but the folder
    assert {step: again.ledger.rung(step) for step in plan.rungs} == before
    assert [t.state for t in again.ledger.trials] == ["waiting", "stopped", "stopped"]
    assert again.next().id == ids[0], "what was running goes on first"
    # It resumed from a checkpoint before the rung, and on other hardware its AP came out otherwise; then it is late.
    assert not on_result(again, ids[0], s10=0.05, s20=0.4, s40=0.9)
    assert {step: again.ledger.rung(step) for step in plan.rungs} == before
    fresh = again.next().id
    assert not on_result(again, fresh, s10=0.35), "judged against what was there at step 10, not against 0.4 or 0.9"
    assert closed == []


def test_a_half_written_ledger_is_never_seen(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    control, _ = control_of(plan)
    trial = control.next().id
    text = (plan.root / "trials.json").read_text()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        on_result(control, trial, s10=0.5)
    assert (plan.root / "trials.json").read_text() == text


def test_failed_trials_are_tried_again_and_wrong_input_ends_the_search(tmp_path):
    plan = plan_of(tmp_path)
    control, closed = control_of(plan)
    trial = control.next().id
    assert control.on_result(trial, {"failed": "no finite loss"})
    assert closed == [(trial, "FAILED")]
    assert not control.halts()
    assert control_of(plan)[0].next().id == trial
    other = control.next().id
    control.on_result(other, {"wrong_input": "a.jpg: truncated"})
    assert control.halts()
    assert control.wrong_input == f"trial {other}: a.jpg: truncated"


def test_what_a_process_dies_of_later_undoes_no_verdict(tmp_path):
    control, closed = control_of(plan_of(tmp_path))
    a, b = control.next().id, control.next().id
    on_result(control, a, s10=0.3, s90=0.3)
    control.on_result(a, {"finished": True})
    assert on_result(control, b, s10=0.1)
    for trial in (a, b):
        control.on_result(trial, {"failed": "its process died"})
    assert [t.state for t in control.ledger.trials] == ["finished", "stopped"]
    assert closed == [(b, "KILLED")], "nobody else ends its run"


@pytest.mark.parametrize(("status", "state"), [(Trial.ERROR, "running"), (Trial.RUNNING, "failed")])
def test_a_failure_that_tune_recovers_from_is_none(tmp_path, status, state):
    """Tune tells its scheduler of both: with the state ERROR what it puts back into its queue."""
    control, _ = control_of(plan_of(tmp_path))
    trial = control.next()
    died = SimpleNamespace(config={"trial": trial.id}, status=status, get_error=lambda: "its node died")
    tuner.Judge(control).on_trial_error(None, died)
    assert (trial.state, trial.why) == (state, "its node died" if state == "failed" else "")


def test_tune_gives_up_before_it_changes_a_trials_state():
    """What the law above rests on, of Ray 2.60."""
    source = inspect.getsource(TuneController._process_trial_failure)
    given_up = source[source.index("elif trial.status in {Trial.RUNNING, Trial.PENDING}") :]
    assert given_up.index("_scheduler_alg.on_trial_error") < given_up.index("_schedule_trial_stop")
    recovered = inspect.getsource(TuneController._try_recover)
    assert recovered.index("_schedule_trial_stop(trial, exception=exc)") < recovered.index("_requeue_trial(trial)")


def test_the_time_budget_ends_the_search_and_what_ran_waits(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    said: list[str] = []
    control = TrialScheduler(plan, TrialStore(plan.root / "trials.json"), {}, lambda *_: None, said.append, minutes=60)
    trial = control.next()
    assert not control.halts()
    control.deadline -= 3601
    assert control.halts()
    assert "time budget" in said[-1]
    assert [t.id for t in control.rest()] == [trial.id]
    assert TrialStore(plan.root / "trials.json").trial(trial.id).state == "waiting"


def test_a_search_told_otherwise_under_its_name_is_refused(tmp_path):
    plan_of(tmp_path)
    plan_of(tmp_path)
    for changed, line in (
        ({"over": ("method.tau_cls=0.35,0.5",)}, "--over method.tau_cls"),
        ({"over": ("method.tau_iou=0.35,0.5",)}, "--over method.tau_cls, --over method.tau_iou"),
        ({"seeds": 2}, "--seeds"),
        ({"rungs": "10"}, "--rungs"),
        ({"kind": "random"}, "--search"),
        ({"words": (*WORDS, "method.alpha=2")}, "method.alpha"),
    ):
        with pytest.raises(ConfigError, match=f"another {line};"):
            plan_of(tmp_path, *changed.pop("over", ()), **changed)
    plan_of(tmp_path, words=(*WORDS, "train.log_every=1"))  # no part of what a search is


def test_a_search_does_not_take_the_folder_of_a_run(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"a run of `pais-ray train`"):
        plan_of(tmp_path)


# What is proposed


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", "method.alpha=1,2,4", seeds=2, rungs="none")
    control, _ = control_of(plan)
    trials = [control.next() for _ in range(12)]
    assert control.next() is None
    assert len({(t.params["method.tau_cls"], t.params["method.alpha"], t.seed) for t in trials}) == 12
    assert {t.point for t in trials} == set(range(6))
    config = control.config(trials[-1])
    assert (config.method.tau_cls, config.method.alpha, config.train.seed) == (0.5, 4.0, 1)
    assert config.run.name == trials[-1].id
    with pytest.raises(ConfigError, match="has no grid"):
        plan_of(tmp_path, "method.alpha=uniform(1,2)", kind="grid", name="other")
    with pytest.raises(ConfigError, match="--samples"):
        plan_of(tmp_path, "method.alpha=1,2", samples=3, name="other")


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_killed_search_proposes_what_it_would_have(tmp_path, kind):
    over = ("method.tau_cls=uniform(0.2,0.6)", "method.alpha=loguniform(1,8)", "method.burn_in=randint(0,9)")
    runs = []
    for name, killed in (("whole", False), ("killed", True)):
        plan = plan_of(tmp_path, *over, kind=kind, samples=14, name=name)
        control, _ = control_of(plan)
        for k in range(14):
            trial = control.next()
            on_result(control, trial.id, s90=1 - abs(trial.params["method.tau_cls"] - 0.45))
            control.on_result(trial.id, {"finished": True})
            if killed and k in (4, 11):
                control, _ = control_of(plan)
        assert control.next() is None
        runs.append([t.params for t in control.ledger.trials])
    assert runs[0] == runs[1]
    assert len({json.dumps(p) for p in runs[0]}) == 14


def test_optuna_learns_where_the_best_is(tmp_path):
    """After twenty configurations it proposes near the best; chance would be .34 away on average."""
    plan = plan_of(tmp_path, "method.tau_cls=uniform(0,1)", kind="optuna", samples=30)
    control, _ = control_of(plan)
    for _ in range(30):
        trial = control.next()
        on_result(control, trial.id, s90=1 - abs(trial.params["method.tau_cls"] - 0.8))
        control.on_result(trial.id, {"finished": True})
    late = [t.params["method.tau_cls"] for t in control.ledger.trials[20:]]
    assert sum(abs(v - 0.8) for v in late) / 10 < 0.17


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_few_choices_end_early_instead_of_for_ever(tmp_path, kind):
    control, _ = control_of(plan_of(tmp_path, "method.tau_cls=0.35,0.5", kind=kind, samples=9))
    assert [control.next().params["method.tau_cls"] for _ in range(2)] != [0.35, 0.35]
    assert control.next() is None


def finished_search(tmp_path, name, over, aps, **options):
    plan = plan_of(tmp_path, *over, name=name, **options)
    control, _ = control_of(plan)
    for ap in aps:
        trial = control.next()
        on_result(control, trial.id, s10=ap / 2, s90=ap)
        control.on_result(trial.id, {"finished": True})
    return plan


def test_a_warm_start_skips_grid_points_and_teaches_optuna(tmp_path):
    over = ("method.tau_cls=0.35,0.5",)
    first = finished_search(tmp_path, "first", over, (0.1, 0.2))
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5,0.65", name="wider")
    control, _ = control_of(plan)
    assert warm_start(plan, control.ledger, plan.base, first.root) == 2
    assert warm_start(plan, control.ledger, plan.base, first.root) == 0, "once"
    assert control.next().params == {"method.tau_cls": 0.65}
    assert control.next() is None
    assert [s.ap for s in control.ledger.standings()] == [0.2, 0.1, None]
    learned = plan_of(
        tmp_path, "method.tau_cls=uniform(0.3,0.6)", "method.alpha=uniform(1,5)", samples=1, name="learns"
    )
    control, _ = control_of(learned)
    assert warm_start(learned, control.ledger, learned.base, first.root) == 2
    assert control.ledger.trials[0].params == {"method.tau_cls": 0.35, "method.alpha": 4.0}, "what it had fixed"
    assert control.next() is not None
    assert control.next() is None, "samples count what is new"


def test_a_warm_start_from_something_else_is_refused(tmp_path):
    first = finished_search(tmp_path, "first", ("method.tau_cls=0.35",), (0.1,))
    plan = plan_of(tmp_path, words=(*WORDS, "method.beta=1"), name="other")
    control, _ = control_of(plan)
    with pytest.raises(ConfigError, match=r"its trials differ in method\.beta"):
        warm_start(plan, control.ledger, plan.base, first.root)
    with pytest.raises(ConfigError, match="not the folder of a search"):
        warm_start(plan, control.ledger, plan.base, tmp_path)


def test_a_warm_start_knows_the_split_of_a_manifest(tmp_path, tiny_coco):
    """The config.yaml of a trial says what the manifest says, which the words do not."""
    words = (*WORDS, *(f"data.{n}={tiny_coco}/{n}.json" for n in ("train", "val")), f"data.images={tiny_coco}/images")
    _, data = prepare(compose((*words, "data.labeled=0.5", "data.fold=3")))
    (tmp_path / "split.json").write_text(data.manifest.to_json())
    words = (*words, f"data.split={tmp_path}/split.json")
    first = finished_search(tmp_path, "first", ("method.tau_cls=0.35",), (0.1,), words=words)
    for trial in TrialStore(first.root / "trials.json").trials:
        path = first.trial_root(trial.id) / "config.yaml"
        path.write_text(dump(prepare(load(path))[0]))
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", words=words, name="wider")
    base = tuner.as_written(plan, prepare(plan.base)[0])
    assert warm_start(plan, TrialStore(plan.root / "trials.json"), base, first.root) == 1


# How many at once


@given(st.lists(st.integers(0, 96), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 48), st.randoms())
@settings(max_examples=300)
def test_the_workers_of_all_trials_have_places_wherever_they_land(nodes, workers, quarters, chance):
    """In quarters of a CPU, placed at random; one trial more would not fit."""
    cluster, cpus = [{"CPU": n / 4} for n in nodes], quarters / 4
    try:
        count = concurrent_trials(cluster, workers=workers, cpus=cpus, use_gpu=False)
    except ConfigError:
        count = 0
    free = list(nodes)
    for _ in range(count * workers):
        free[chance.choice([i for i, n in enumerate(free) if n >= quarters])] -= quarters
    assert sum(n // quarters for n in free) < workers


def test_the_arithmetic_on_machines_as_they_are():
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


# What is reported


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.randoms())
def test_the_table_is_best_first_by_the_mean_over_seeds(aps, chance):
    ledger = TrialStore(Path("nowhere"))
    trials = [ledger.add({"method.tau_cls": point}, seed) for point in range(len(aps)) for seed in (0, 1)]
    for trial in trials:
        trial.scores, trial.state = {90: aps[trial.point][trial.seed]}, "finished"
    chance.shuffle(ledger.trials)
    standings = ledger.standings()
    means = [sum(pair) / 2 for pair in aps]
    assert [s.ap for s in standings] == pytest.approx(sorted(means, reverse=True))
    for s in standings:
        a, b = aps[s.point]
        assert s.ap == pytest.approx((a + b) / 2)
        assert s.spread == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
    assert report.best_of(standings) == standings[0]


def test_a_configuration_is_ranked_where_all_its_seeds_were(tmp_path):
    """One seed is on its way: the other's later, higher AP does not count yet."""
    plan = plan_of(tmp_path, "method.tau_cls=0.35", seeds=2)
    control, _ = control_of(plan)
    a = control.next().id
    on_result(control, a, s10=0.2, s30=0.4, s90=0.9)
    control.on_result(a, {"finished": True})
    on_result(control, control.next().id, s10=0.1)
    (only,) = control.ledger.standings()
    assert (only.state, only.step, only.ap) == ("running", 10, pytest.approx(0.15))
    assert report.best_of([only]) is None


def test_the_first_seeds_verdict_is_its_configurations(tmp_path):
    """Judged each on its own, seldom would all seeds of a configuration finish, and there would be no best."""
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5,0.65", seeds=3)
    control, _ = control_of(plan)
    a, b = control.next(), control.next()
    assert (a.seed, b.seed, a.point, b.point) == (0, 0, 0, 1), "other first seeds fill the places"
    on_result(control, a.id, s10=0.5, s30=0.5, s90=0.5)
    control.on_result(a.id, {"finished": True})
    again = control_of(plan)[0]  # killed here: what ran comes first, then what the ledger says may start
    assert [(t.point, t.seed) for t in (again.next(), again.next(), again.next())] == [(1, 0), (0, 1), (0, 2)]
    assert on_result(again, b.id, s10=0.4)
    again.on_result(b.id, {"finished": False})
    for trial in ("000s1", "000s2"):
        assert not on_result(again, trial, s10=0.1, s30=0.1, s90=0.1), "runs to the end, unjudged"
        again.on_result(trial, {"finished": True})
    c = again.next()
    assert (c.point, c.seed) == (2, 0), "no further seed of what was stopped"
    assert again.next() is None
    assert again.waits(), "its other seeds may come"
    assert on_result(again, c.id, s10=0.2), "against 0.5 and 0.4: further seeds are not at the rung"
    assert again.ledger.rung(10) == {"000s0": 0.5, "001s0": 0.4, "002s0": 0.2}
    assert again.next() is None
    assert not again.waits()
    best = report.best_of(again.ledger.standings())
    assert (best.point, len(best.trials), best.ap) == (0, 3, pytest.approx(0.7 / 3))


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from(["grid", "random", "optuna"]), st.randoms())
@settings(max_examples=25, deadline=None)
def test_every_search_ends_with_a_best(tmp_path_factory, places, seeds, kind, chance):
    """However many run at once and however they do: no place stays empty for ever, and one configuration is whole."""
    over = "method.tau_cls=0.2,0.3,0.4,0.5,0.6"
    plan = plan_of(tmp_path_factory.mktemp("s"), over, seeds=seeds, kind=kind, samples=None if kind == "grid" else 5)
    control, _ = control_of(plan)
    running = {}
    while True:
        while len(running) < places and (trial := control.next()) is not None:
            running[trial.id] = iter((10, 30, 90))
        if not running:
            break
        name = chance.choice(sorted(running))
        step = next(running[name], None)
        if step is None or on_result(control, name, **{f"s{step}": chance.random()}):
            control.on_result(name, {"finished": step is None})
            del running[name]
    assert not control.waits()
    best = report.best_of(control.ledger.standings())
    assert [t.seed for t in best.trials] == list(range(seeds))
    assert {len(s.trials) for s in control.ledger.standings() if s.state == "stopped"} <= {1}
    assert {s.state for s in control.ledger.standings()} <= {"finished", "stopped"}


def test_tune_asks_again_where_seeds_wait(tmp_path):
    """To Tune, FINISHED is for ever."""
    control, _ = control_of(plan_of(tmp_path, "method.tau_cls=0.35", seeds=2))
    suggest = tuner.Suggest(control)
    assert suggest.suggest("x") == {"trial": "000s0"}
    assert suggest.suggest("x") is None
    control.on_result("000s0", {"finished": True})
    assert suggest.suggest("x") == {"trial": "000s1"}
    assert suggest.suggest("x") == Searcher.FINISHED


def test_another_best_has_a_name_of_its_own(tmp_path):
    """NAME-best is of the first: with other settings it could not be resumed, however often one asks."""
    words = (*WORDS, f"run.storage_path={tmp_path}")
    plan = finished_search(tmp_path, "s", ("method.tau_cls=0.35,0.5",), (0.1, 0.2), rungs="none")
    low, high = sorted(TrialStore(plan.root / "trials.json").standings(), key=lambda s: s.point)
    config = tuner.named_best("s-best", low, words)
    assert (config.run.name, config.method.tau_cls) == ("s-best", 0.35)
    assert tuner.named_best("s-best", high, words).run.name == "s-best", "nothing was made of it yet"
    root = tmp_path / "s-best"
    checkpoint = root / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (root / "config.yaml").write_text(dump(config))
    assert tuner.named_best("s-best", low, words).run.name == "s-best"
    other = tuner.named_best("s-best", high, words)
    assert (other.run.name, other.method.tau_cls) == ("s-best-001", 0.5)


def test_no_best_to_retrain_is_one_line(tmp_path):
    plan = plan_of(tmp_path)
    with pytest.raises(ConfigError, match="--retrain-best: no configuration finished"):
        tuner.retrain(plan, plan.words, TrialStore(plan.root / "trials.json"))


def test_the_files_of_a_search(tmp_path):
    over = ("method.tau_cls=0.35,0.5", "method.alpha=1,4", "optim.reference.milestones=[240,280]")
    plan = finished_search(tmp_path, "first", over, (0.1, 0.4, 0.3, 0.2), rungs="none")
    ledger = TrialStore(plan.root / "trials.json")
    result = report.to_json(plan, ledger, None)
    report.write(plan, ledger, result)
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


def test_values_stand_under_their_names_whatever_order_they_came_in(tmp_path):
    plan = plan_of(tmp_path, "method.tau_cls=0.35,0.5", "method.alpha=1,4")
    ledger = TrialStore(plan.root / "trials.json")
    ledger.add({"method.alpha": 4, "method.tau_cls": 0.5}, 0)
    report.write(plan, ledger, {})
    head, row = (plan.root / "results.csv").read_text().splitlines()
    assert head.split(",")[-2:] == ["method.tau_cls", "method.alpha"]
    assert row.split(",")[-2:] == ["0.5", "4"]


def test_random_points_are_a_prefix_of_more():
    space = read_space({}, ["method.tau_cls=uniform(0,1)", "method.alpha=1,2"])
    few, many = (list(samplers.random_points(space, 7, count)) for count in (3, 9))
    assert many[:3] == few
    assert few != list(samplers.random_points(space, 8, 3))
