"""Laws of the guards: a healthy run hears nothing, a sick one hears it once, and the verdict needs no other rank."""

import math

import pytest

from pais_ray.guards import GuardConfig, Guards
from pais_ray.train import launch
from pais_ray.train.watchdog import describe, stuck


@pytest.fixture
def guards():
    return Guards(GuardConfig(kept_low=0.5, kept_high=10, kept_steps=100, teacher_gap=0.1, zero_loss_steps=40))


def test_a_spike_is_far_above_the_median_and_a_new_level_is_not(guards):
    assert [guards.gradient(1.0 + 0.1 * (i % 3)) for i in range(30)] == [None] * 30
    assert "50" in guards.gradient(55.0)
    assert guards.gradient(math.inf) is None  # skipped steps are told elsewhere
    told = [guards.gradient(55.0) for _ in range(120)]
    assert told[0] is not None
    assert told[-1] is None


def test_the_first_steps_are_no_spikes(guards):
    assert [guards.gradient(n) for n in (0.001, 100.0, 1.0)] == [None] * 3


@pytest.mark.parametrize(("kept", "words"), [(0.1, "hardly any"), (30.0, "too many")])
def test_a_collapse_is_told_once_in_so_many_steps(guards, kept, words):
    told = [guards.pseudo_labels(kept, 25) for _ in range(8)]
    assert [t is not None for t in told] == [False, False, False, True] * 2
    assert words in told[3]
    assert "100 steps" in told[3]


def test_a_teacher_within_its_band_starts_the_count_anew(guards):
    for _ in range(3):
        assert [guards.pseudo_labels(k, 30) for k in (0.1, 0.2, 5.0)] == [None] * 3
    assert guards.pseudo_labels(None, 1000) is None  # a method without pseudo-labels


def test_a_teacher_below_the_student(guards):
    assert guards.teacher(0.30, 0.35) is None
    assert guards.teacher(None, 0.35) is None
    assert "0.200" in guards.teacher(0.20, 0.35)


def test_a_loss_of_zero_ends_the_run_in_time(guards):
    zero = {"labeled/class": 0.0, "labeled/mask": 0.0, "unlabeled/class": 3.0}
    assert guards.labeled_loss(zero, 30) is None
    assert guards.labeled_loss({**zero, "labeled/mask": 0.2}, 30) is None
    assert guards.labeled_loss(zero, 30) is None
    assert "60 steps" in guards.labeled_loss(zero, 30)
    assert guards.labeled_loss({"labeled/class": math.nan}, 1000) is None  # that is another trouble


def beat(rank, **changes):
    return {"rank": rank, "pid": 1, "node": "n", "step": 7, "stage": "step", "age": 1.0, "silent": 0.5, **changes}


LIMITS = GuardConfig(step_s=60, evaluate_s=600)


def test_nobody_hangs_within_the_limits_of_the_stage():
    assert stuck([], LIMITS) is None
    assert stuck([beat(0, age=59), beat(1, stage="evaluate", age=300)], LIMITS) is None


def test_the_one_that_hangs_is_told_from_those_that_wait_for_it(tmp_path):
    waiting = beat(0, age=70)
    assert stuck([waiting, beat(1, age=70, silent=65)], LIMITS)["rank"] == 1  # its process stands still
    assert stuck([waiting, beat(1, age=69, step=6)], LIMITS)["rank"] == 1  # it never reached the step
    assert stuck([waiting, beat(1, age=72)], LIMITS)["rank"] == 1  # it is in it for longest
    text = describe(beat(1, age=70, silent=65), tmp_path)
    assert "rank 1 hangs: stage 'step' of step 7 for 70 s, without a sign of life for 65 s" in text


def test_the_progress_line_of_a_step_that_did_not_fit_into_memory():
    row = {"step": 7, "last": 16, "eta": 9.0, "lr": 0.1, "time/img_per_s": 1.0, "time/data_wait_share": 0.0}
    assert "7/16 | no loss, skipped" in launch.progress_line(row)
