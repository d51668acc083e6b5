"""Laws of the guards: a healthy run hears nothing, a sick one hears it once, and the verdict needs no other rank."""

import contextlib
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import ray.train

from pais_ray.config.sections import GuardConfig
from pais_ray.train.driver import monitor as monitor_module
from pais_ray.train.driver import progress, run_loop
from pais_ray.train.driver.monitor import Monitor
from pais_ray.train.driver.supervisor import Supervisor
from pais_ray.train.driver.watchdog import describe, find_stuck_rank
from pais_ray.train.guards import Guards
from pais_ray.train.messages import RankStatus, Requests, StepProgress
from pais_ray.train.worker import heartbeat


@pytest.fixture
def guards():
    return Guards(
        GuardConfig(
            min_kept_per_image=0.5, max_kept_per_image=10, kept_alarm_steps=100, teacher_gap=0.1, zero_loss_steps=40
        )
    )


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


def test_labeled_images_without_an_instance_end_the_run_in_time(guards):
    """Background is still learned: class and objectness are not zero."""
    zero = {"labeled/class": 0.7, "labeled/objectness": 0.2, "labeled/mask": 0.0, "unlabeled/mask": 3.0}
    assert guards.labeled_loss(zero, 30) is None
    assert guards.labeled_loss({**zero, "labeled/mask": 0.2}, 30) is None
    assert guards.labeled_loss(zero, 30) is None
    assert "60 steps" in guards.labeled_loss(zero, 30)
    assert guards.labeled_loss({"labeled/mask": math.nan}, 1000) is None  # that is another trouble
    assert guards.labeled_loss({"labeled/class": 0.0}, 1000) is None  # no such terms to judge by


def status(rank, **changes):
    """The status of a rank in step 7."""
    fields = {"pid": 1, "node": "n", "process_start_time": 0.0, "stacks_path": "", "attempt": 1.0}
    return RankStatus(**{**fields, "rank": rank, "step": 7, "stage": "step", "age_s": 1.0, "silence_s": 0.5, **changes})


LIMITS = GuardConfig(step_timeout_s=60, evaluate_timeout_s=600)


def test_nobody_hangs_within_the_limits_of_the_stage():
    assert find_stuck_rank([], LIMITS) is None
    assert find_stuck_rank([status(0, age_s=59), status(1, stage="evaluate", age_s=300)], LIMITS) is None


def test_those_that_wait_for_a_longer_stage_wait_as_long_as_it_may_last():
    late = status(1, age_s=300)
    assert find_stuck_rank([status(0, stage="save", age_s=310, step=6), late], LIMITS) is None
    assert find_stuck_rank([status(0, stage="first_batch", age_s=310), late], LIMITS) is None
    assert (
        find_stuck_rank([status(0, stage="evaluate", age_s=601, step=6), late], LIMITS).rank == 0
    )  # beyond its own limit
    assert (
        find_stuck_rank([status(0, stage="save", age_s=3, step=8), late], LIMITS).rank == 1
    )  # nobody waits for what is ahead


@pytest.fixture
def monitor():
    return Monitor.__ray_metadata__.modified_class()


@pytest.fixture
def start_heartbeat(tmp_path, monkeypatch):
    """Starts heartbeats that get no answer by themselves: the test delivers the answers."""
    monkeypatch.setattr(heartbeat.ray, "wait", lambda answers, timeout: ([], answers))
    started = []

    def start():
        silent = SimpleNamespace(heartbeat=SimpleNamespace(remote=lambda status: None))
        started.append(heartbeat.Heartbeat(silent, tmp_path, 0, "n"))
        return started[-1]

    yield start
    for heart in started:
        heart.close()


def test_a_stop_request_stays_when_checkpoints_are_requested(monitor):
    monitor.request_save()
    monitor.request_stop()
    monitor.request_save()
    assert monitor.heartbeat(status(0)) == Requests(stop=True, save=2)


def test_an_answer_that_arrives_late_does_not_repeat_a_save(monitor, start_heartbeat):
    heart = start_heartbeat()
    assert not heart.take_save_request()
    monitor.request_save()
    heart.requests = monitor.heartbeat(status(0))
    in_flight = monitor.heartbeat(status(0))  # answered before the worker serves the request
    assert heart.take_save_request()
    assert not heart.take_save_request()
    heart.requests = in_flight
    assert not heart.take_save_request()
    monitor.request_save()
    heart.requests = monitor.heartbeat(status(0, saves_done=heart.saves_done))
    assert heart.take_save_request()


def test_a_new_worker_serves_the_save_that_is_pending_and_no_earlier_one(monitor, start_heartbeat):
    monitor.request_save()
    heart = start_heartbeat()
    heart.requests = monitor.heartbeat(status(0))
    assert heart.take_save_request()
    monitor.heartbeat(status(0, saves_done=heart.saves_done))
    heart = start_heartbeat()
    heart.requests = monitor.heartbeat(status(0, attempt=2.0))
    assert not heart.take_save_request()


def test_a_stage_ends_with_its_block_even_if_it_fails(start_heartbeat):
    heart = start_heartbeat()
    heart.enter(3, "evaluate")
    with contextlib.suppress(OSError), heart.within("save"):
        assert heart.current[:2] == (3, "save")
        raise OSError
    assert heart.current[:2] == (3, "evaluate")


def test_ages_and_silences_grow_until_a_new_worker_group_replaces_the_old_one(monitor, monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.time, time=100.0)
    monkeypatch.setattr(monitor_module, "time", now)
    monitor.heartbeat(status(1, age_s=5.0))
    monitor.heartbeat(status(0, age_s=0.0))
    now.time += 10
    monitor.heartbeat(status(0, age_s=10.0))
    assert [(s.rank, s.age_s, s.silence_s) for s in monitor.rank_statuses()] == [(0, 10.0, 0.0), (1, 15.0, 10.0)]
    monitor.heartbeat(status(0, attempt=2.0))
    assert [s.rank for s in monitor.rank_statuses()] == [0]


class Trainer:
    """Stands for Ray's: raises the errors one after the other, then trains."""

    def __init__(self, errors):
        self.errors, self.names = list(errors), []

    def __call__(self, run_config):
        self.names.append(run_config.name)
        return self

    def fit(self):
        if self.errors:
            raise self.errors.pop(0)


DIED = ray.train.ControllerError(ray.exceptions.ActorDiedError())
MET = ray.train.ControllerError(ray.exceptions.RayTaskError("f", "...", RuntimeError("connection closed by peer")))
WRONG = ray.train.ControllerError(ray.exceptions.RayTaskError("f", "...", ImportError("no module of that name")))


def test_a_worker_that_dies_while_the_group_is_made_costs_one_of_the_failures(tmp_path):
    told = []
    trainer = Trainer([DIED, MET])
    run_loop.fit_with_restarts(trainer, tmp_path, 2, told.append)
    assert len(told) == 2
    assert len(set(trainer.names)) == 3
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(Trainer([DIED, MET, DIED]), tmp_path, 2, told.append)
    run_loop.fit_with_restarts(Trainer([DIED] * 20), tmp_path, -1, told.append)


def test_an_error_that_would_come_again_is_not_tried_again(tmp_path):
    trainer = Trainer([WRONG])
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(trainer, tmp_path, -1, pytest.fail)
    assert len(trainer.names) == 1


def test_the_one_that_hangs_is_told_from_those_that_wait_for_it(tmp_path):
    waiting = status(0, age_s=70)
    assert find_stuck_rank([waiting, status(1, age_s=70, silence_s=65)], LIMITS).rank == 1  # its process stands still
    assert find_stuck_rank([waiting, status(1, age_s=69, step=6)], LIMITS).rank == 1  # it never reached the step
    assert find_stuck_rank([waiting, status(1, age_s=72)], LIMITS).rank == 1  # it is in it for longest
    text = describe(status(1, age_s=70, silence_s=65), tmp_path)
    assert "rank 1 hangs: stage 'step' of step 7 for 70 s, without a heartbeat for 65 s" in text


class Group:
    """Stands for the monitor: records requests, has no ranks."""

    def __init__(self):
        self.requests = []
        for name, answer in (("take_messages", []), ("rank_statuses", []), ("forget_all_ranks", None)):
            setattr(self, name, SimpleNamespace(remote=lambda *_, answer=answer: answer))
        for name in ("request_stop", "request_save"):
            setattr(self, name, SimpleNamespace(remote=lambda name=name: self.requests.append(name)))


def test_a_wish_to_stop_that_no_worker_is_there_to_hear_ends_the_driver(tmp_path, monkeypatch):
    """SIGTERM, twice, while the run waits for room; and training that does not come back."""
    monkeypatch.setattr(run_loop, "POLL_S", 0.01)
    monkeypatch.setattr(run_loop, "NO_WORKERS_S", 0.2)
    monkeypatch.setattr(run_loop.ray, "get", lambda answer: answer)
    monkeypatch.setattr(run_loop, "fit_with_restarts", lambda *_: threading.Event().wait())
    monkeypatch.setattr(Supervisor, "check", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    said, group = [], Group()
    watch = Supervisor(group, tmp_path, SimpleNamespace(run=SimpleNamespace(max_failures=0)), 1.0, said.append)
    assert run_loop.run_until_done(None, watch, tmp_path, 8, threading.Event())
    assert group.requests == ["request_stop"]
    assert [event.text.split(";")[0] for event in said] == [
        run_loop.STOPPING,
        "no worker is running that could save another checkpoint",
        "stopped before the first checkpoint",
    ]


def test_the_progress_line_of_a_step_that_did_not_fit_into_memory():
    metrics = {"lr": 0.1, "time/img_per_s": 1.0, "time/data_wait_share": 0.0}
    event = StepProgress(step=7, last_step=16, eta_s=9.0, metrics=metrics)
    assert "7/16 | no loss, skipped" in progress.event_line(event)
