"""The driver: heartbeats, requests, stuck ranks, restarts and stops, without a cluster."""

import contextlib
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
from pais_ray.train.messages import RankStatus, Requests, StepProgress
from pais_ray.train.worker import heartbeat


def status(rank, **changes):
    """The status of a rank in step 7."""
    fields = {"pid": 1, "node": "n", "process_start_time": 0.0, "stacks_path": "", "attempt": 1.0}
    return RankStatus(**{**fields, "rank": rank, "step": 7, "stage": "step", "age_s": 1.0, "silence_s": 0.5, **changes})


LIMITS = GuardConfig(step_timeout_s=60, evaluate_timeout_s=600)


def test_no_rank_is_stuck_within_the_limit_of_its_stage():
    assert find_stuck_rank([], LIMITS) is None
    assert find_stuck_rank([status(0, age_s=59), status(1, stage="evaluate", age_s=300)], LIMITS) is None


def test_ranks_that_wait_for_a_rank_in_a_longer_stage_are_not_stuck():
    late = status(1, age_s=300)
    assert find_stuck_rank([status(0, stage="save", age_s=310, step=6), late], LIMITS) is None
    assert find_stuck_rank([status(0, stage="first_batch", age_s=310), late], LIMITS) is None
    over_its_limit = status(0, stage="evaluate", age_s=601, step=6)
    assert find_stuck_rank([over_its_limit, late], LIMITS).rank == 0
    ahead = status(0, stage="save", age_s=3, step=8)  # no rank waits for one that is ahead
    assert find_stuck_rank([ahead, late], LIMITS).rank == 1


@pytest.fixture
def monitor():
    return Monitor.__ray_metadata__.modified_class()


@pytest.fixture
def start_heartbeat(tmp_path, monkeypatch):
    """Starts heartbeats that receive no answers: the test sets them."""
    monkeypatch.setattr(heartbeat.ray, "wait", lambda answers, timeout: ([], answers))
    started = []

    def start():
        silent = SimpleNamespace(heartbeat=SimpleNamespace(remote=lambda status: None))
        started.append(heartbeat.Heartbeat(silent, tmp_path, 0, "n"))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_a_stop_request_stays_when_checkpoints_are_requested(monitor):
    monitor.request_save()
    monitor.request_stop()
    monitor.request_save()
    assert monitor.heartbeat(status(0)) == Requests(stop=True, save=2)


def test_an_answer_that_arrives_late_does_not_repeat_a_save(monitor, start_heartbeat):
    beats = start_heartbeat()
    assert not beats.take_save_request()
    monitor.request_save()
    beats.requests = monitor.heartbeat(status(0))
    in_flight = monitor.heartbeat(status(0))  # answered before the worker serves the request
    assert beats.take_save_request()
    assert not beats.take_save_request()
    beats.requests = in_flight
    assert not beats.take_save_request()
    monitor.request_save()
    beats.requests = monitor.heartbeat(status(0, saves_done=beats.saves_done))
    assert beats.take_save_request()


def test_a_new_worker_serves_the_save_that_is_pending_and_no_earlier_one(monitor, start_heartbeat):
    monitor.request_save()
    beats = start_heartbeat()
    beats.requests = monitor.heartbeat(status(0))
    assert beats.take_save_request()
    monitor.heartbeat(status(0, saves_done=beats.saves_done))
    beats = start_heartbeat()
    beats.requests = monitor.heartbeat(status(0, attempt=2.0))
    assert not beats.take_save_request()


def test_a_stage_ends_with_its_block_even_if_it_fails(start_heartbeat):
    beats = start_heartbeat()
    beats.enter(3, "evaluate")
    with contextlib.suppress(OSError), beats.within("save"):
        assert beats.current[:2] == (3, "save")
        raise OSError
    assert beats.current[:2] == (3, "evaluate")


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
    """Replaces Ray's trainer: raises the given errors one after the other, then trains."""

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


def test_the_death_of_a_worker_while_the_group_starts_counts_as_a_failure(tmp_path):
    messages = []
    trainer = Trainer([DIED, MET])
    run_loop.fit_with_restarts(trainer, tmp_path, 2, messages.append)
    assert len(messages) == 2
    assert len(set(trainer.names)) == 3
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(Trainer([DIED, MET, DIED]), tmp_path, 2, messages.append)
    run_loop.fit_with_restarts(Trainer([DIED] * 20), tmp_path, -1, messages.append)


def test_an_error_that_would_recur_is_not_retried(tmp_path):
    trainer = Trainer([WRONG])
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(trainer, tmp_path, -1, pytest.fail)
    assert len(trainer.names) == 1


def test_the_stuck_rank_is_distinguished_from_those_that_wait_for_it(tmp_path):
    waiting = status(0, age_s=70)
    assert find_stuck_rank([waiting, status(1, age_s=70, silence_s=65)], LIMITS).rank == 1  # its process is stopped
    assert find_stuck_rank([waiting, status(1, age_s=69, step=6)], LIMITS).rank == 1  # it has not reached the step
    assert find_stuck_rank([waiting, status(1, age_s=72)], LIMITS).rank == 1  # the longest in the step
    text = describe(status(1, age_s=70, silence_s=65), tmp_path)
    assert "rank 1 hangs: stage 'step' of step 7 for 70 s, without a heartbeat for 65 s" in text


class Group:
    """Replaces the monitor: records requests, has no ranks."""

    def __init__(self):
        self.requests = []
        for name, answer in (("take_messages", []), ("rank_statuses", []), ("forget_all_ranks", None)):
            setattr(self, name, SimpleNamespace(remote=lambda *_, answer=answer: answer))
        for name in ("request_stop", "request_save"):
            setattr(self, name, SimpleNamespace(remote=lambda name=name: self.requests.append(name)))


def test_a_stop_request_without_workers_ends_the_driver(tmp_path, monkeypatch):
    """SIGTERM, twice, while the run waits for resources and training does not return."""
    monkeypatch.setattr(run_loop, "POLL_S", 0.01)
    monkeypatch.setattr(run_loop, "NO_WORKERS_S", 0.2)
    monkeypatch.setattr(run_loop.ray, "get", lambda answer: answer)
    monkeypatch.setattr(run_loop, "fit_with_restarts", lambda *_: threading.Event().wait())
    monkeypatch.setattr(Supervisor, "check", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    events, group = [], Group()
    supervisor = Supervisor(group, tmp_path, SimpleNamespace(run=SimpleNamespace(max_failures=0)), 1.0, events.append)
    assert run_loop.run_until_done(None, supervisor, tmp_path, 8, threading.Event())
    assert group.requests == ["request_stop"]
    assert [event.text.split(";")[0] for event in events] == [
        run_loop.STOPPING,
        "no worker is running that could save another checkpoint",
        "stopped before the first checkpoint",
    ]


def test_the_progress_line_of_a_step_that_ran_out_of_memory():
    metrics = {"lr": 0.1, "time/img_per_s": 1.0, "time/data_wait_share": 0.0}
    event = StepProgress(step=7, last_step=16, eta_s=9.0, metrics=metrics)
    assert "7/16 | no loss, skipped" in progress.event_line(event)
