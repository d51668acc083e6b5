"""Guards: a healthy run causes no alarm, and each failure causes one."""

import math

import pytest

from pais_ray.config.sections import GuardConfig
from pais_ray.train.guards import Guards


@pytest.fixture
def guards():
    return Guards(
        GuardConfig(
            min_kept_per_image=0.5, max_kept_per_image=10, kept_alarm_steps=100, teacher_gap=0.1, zero_loss_steps=40
        )
    )


def test_a_spike_is_far_above_the_median_and_a_higher_level_is_not(guards):
    assert [guards.gradient(1.0 + 0.1 * (i % 3)) for i in range(30)] == [None] * 30
    assert "50" in guards.gradient(55.0)
    assert guards.gradient(math.inf) is None  # skipped steps are reported elsewhere
    alarms = [guards.gradient(55.0) for _ in range(120)]
    assert alarms[0] is not None
    assert alarms[-1] is None


def test_the_first_steps_are_no_spikes(guards):
    assert [guards.gradient(n) for n in (0.001, 100.0, 1.0)] == [None] * 3


@pytest.mark.parametrize(("kept", "amount"), [(0.1, "hardly any"), (30.0, "too many")])
def test_a_collapse_causes_one_alarm_per_number_of_steps(guards, kept, amount):
    alarms = [guards.pseudo_labels(kept, 25) for _ in range(8)]
    assert [alarm is not None for alarm in alarms] == [False, False, False, True] * 2
    assert amount in alarms[3]
    assert "100 steps" in alarms[3]


def test_a_number_of_pseudo_labels_within_the_limits_resets_the_count(guards):
    for _ in range(3):
        assert [guards.pseudo_labels(k, 30) for k in (0.1, 0.2, 5.0)] == [None] * 3
    assert guards.pseudo_labels(None, 1000) is None  # a method without pseudo-labels


def test_a_teacher_far_below_the_student_causes_an_alarm(guards):
    assert guards.teacher(0.30, 0.35) is None
    assert guards.teacher(None, 0.35) is None
    assert "0.200" in guards.teacher(0.20, 0.35)


def test_labeled_images_without_instances_end_the_run(guards):
    """The network still learns background: the losses of class and objectness are not zero."""
    zero = {"labeled/class": 0.7, "labeled/objectness": 0.2, "labeled/mask": 0.0, "unlabeled/mask": 3.0}
    assert guards.labeled_loss(zero, 30) is None
    assert guards.labeled_loss({**zero, "labeled/mask": 0.2}, 30) is None
    assert guards.labeled_loss(zero, 30) is None
    assert "60 steps" in guards.labeled_loss(zero, 30)
    assert guards.labeled_loss({"labeled/mask": math.nan}, 1000) is None  # a different failure
    assert guards.labeled_loss({"labeled/class": 0.0}, 1000) is None  # the segmentor has no such loss
