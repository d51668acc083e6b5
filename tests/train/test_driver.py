"""The driver without Ray: messages, requests and their race, the watchdog, restarts, the run loop, the supervisor."""

import contextlib
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray.train

from pais_ray.config.overlays import ConfigError
from pais_ray.config.sections import GuardConfig
from pais_ray.config.tree import compose
from pais_ray.train.driver import monitor as monitor_module
from pais_ray.train.driver import progress, resources, run_loop, supervisor, watchdog
from pais_ray.train.driver.monitor import Monitor
from pais_ray.train.driver.supervisor import Supervisor
from pais_ray.train.driver.watchdog import describe, find_stuck_rank
from pais_ray.train.messages import EvaluationScores, FatalError, Notice, RankStatus, Requests, StepProgress
from pais_ray.train.worker import heartbeat

LIMITS = GuardConfig(step_timeout_s=60, evaluate_timeout_s=600)


def status(rank, **changes):
    """The status of a rank in step 7."""
    fields = {"pid": 1, "node": "n", "process_start_time": 0.0, "stacks_path": "", "attempt": 1.0}
    return RankStatus(**{**fields, "rank": rank, "step": 7, "stage": "step", "age_s": 1.0, "silence_s": 0.5, **changes})


@pytest.fixture
def monitor():
    return Monitor.__ray_metadata__.modified_class()


# Requests


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


def test_a_new_worker_serves_a_pending_save_and_no_earlier_one(monitor, start_heartbeat):
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


# Messages


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


def test_messages_arrive_once_and_in_order(monitor):
    sent = [Notice(text="a"), FatalError(text="b", is_input_error=False), Notice(text="c")]
    monitor.publish(sent[0])
    monitor.publish_fatal_error(sent[1])
    monitor.publish(sent[2])
    assert monitor.has_fatal_error()
    assert monitor.take_messages() == sent
    assert monitor.take_messages() == []


@pytest.mark.parametrize(
    ("is_input_error", "error"), [(True, run_loop.InvalidInputError), (False, run_loop.RunFailedError)]
)
def test_events_are_passed_on_and_a_fatal_error_is_returned(is_input_error, error):
    events = []
    messages = [Notice(text="before"), FatalError(text="why", is_input_error=is_input_error), Notice(text="after")]
    fatal = run_loop.dispatch(messages, events.append)
    assert (type(fatal), str(fatal)) == (error, "why")
    assert events == [messages[0], messages[2]]
    assert run_loop.dispatch(events, events.copy().append) is None


def test_each_kind_of_event_has_its_line():
    metrics = {"lr": 0.1, "time/img_per_s": 1.0, "time/data_wait_share": 0.0}
    step = StepProgress(step=7, last_step=16, eta_s=3601.0, metrics=metrics)
    assert "7/16 | no loss, skipped" in progress.event_line(step)
    assert progress.event_line(step).endswith("ETA 1:00:01")
    scores = EvaluationScores(step=8, role="student", scores={"student/segm_AP": 0.25, "student/bbox_AP": 0.5})
    assert progress.event_line(scores) == "  evaluation at step 8: student segm AP 0.250, bbox AP 0.500"
    assert progress.event_line(Notice(text="step 1: text")) == "step 1: text"


# The watchdog


def test_no_rank_hangs_within_the_limits_of_its_stage():
    assert find_stuck_rank([], LIMITS) is None
    assert find_stuck_rank([status(0, age_s=59), status(1, stage="evaluate", age_s=300)], LIMITS) is None


def test_ranks_may_wait_for_a_longer_stage_until_its_own_limit():
    late = status(1, age_s=300)
    assert find_stuck_rank([status(0, stage="save", age_s=310, step=6), late], LIMITS) is None
    assert find_stuck_rank([status(0, stage="first_batch", age_s=310), late], LIMITS) is None
    assert find_stuck_rank([status(0, stage="evaluate", age_s=601, step=6), late], LIMITS).rank == 0
    assert find_stuck_rank([status(0, stage="save", age_s=3, step=8), late], LIMITS).rank == 1  # rank 0 is ahead


def test_the_rank_that_hangs_differs_from_those_that_wait_for_it(tmp_path):
    waiting = status(0, age_s=70)
    assert find_stuck_rank([waiting, status(1, age_s=70, silence_s=65)], LIMITS).rank == 1  # its process is stopped
    assert find_stuck_rank([waiting, status(1, age_s=69, step=6)], LIMITS).rank == 1  # it never reached the step
    assert find_stuck_rank([waiting, status(1, age_s=72)], LIMITS).rank == 1  # it has been in the step for longest
    text = describe(status(1, age_s=70, silence_s=65), tmp_path)
    assert "rank 1 hangs: stage 'step' of step 7 for 70 s, without a heartbeat for 65 s" in text


# Restarts


class Trainer:
    """A trainer that raises the given errors one after the other, then trains."""

    def __init__(self, errors):
        self.errors, self.names = list(errors), []

    def __call__(self, run_config):
        self.names.append(run_config.name)
        return self

    def fit(self):
        if self.errors:
            raise self.errors.pop(0)


def task_error(cause):
    return ray.train.ControllerError(ray.exceptions.RayTaskError("f", "...", cause))


DEATH = ray.train.ControllerError(ray.exceptions.ActorDiedError())
LOST_CONNECTION = task_error(RuntimeError("connection closed by peer"))
IMPORT_ERROR = task_error(ImportError("no module of that name"))


def test_a_death_while_the_group_is_created_counts_as_a_failure(tmp_path):
    reports = []
    trainer = Trainer([DEATH, LOST_CONNECTION])
    run_loop.fit_with_restarts(trainer, tmp_path, 2, reports.append)
    assert len(reports) == 2
    assert len(set(trainer.names)) == 3
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(Trainer([DEATH, LOST_CONNECTION, DEATH]), tmp_path, 2, reports.append)
    run_loop.fit_with_restarts(Trainer([DEATH] * 20), tmp_path, -1, reports.append)


def test_an_error_that_would_recur_is_not_retried(tmp_path):
    trainer = Trainer([IMPORT_ERROR])
    with pytest.raises(ray.train.ControllerError):
        run_loop.fit_with_restarts(trainer, tmp_path, -1, pytest.fail)
    assert len(trainer.names) == 1


# The run loop and the supervisor


class FakeMonitor:
    """Answers as the monitor does, without Ray; records requests."""

    def __init__(self, messages=(), statuses=()):
        self.requests = []
        queue = [list(messages)]
        self.take_messages = self.method(lambda: queue.pop() if queue else [])
        self.rank_statuses = self.method(lambda: list(statuses))
        self.forget_all_ranks = self.method(lambda: None)
        for name in ("request_stop", "request_save"):
            setattr(self, name, self.method(lambda name=name: self.requests.append(name)))

    @staticmethod
    def method(function):
        return SimpleNamespace(remote=function)


@pytest.fixture
def make_supervisor(tmp_path, monkeypatch):
    """Creates a supervisor of a fake monitor; returns it and the events that it passes on."""
    monkeypatch.setattr(run_loop.ray, "get", lambda answer: answer)
    monkeypatch.setattr(supervisor.ray_compat, "draining_nodes", dict)

    def make(monitor):
        events = []
        config = SimpleNamespace(run=SimpleNamespace(max_failures=0), guards=LIMITS)
        return Supervisor(monitor, tmp_path, config, 1.0, events.append), events

    return make


@pytest.fixture
def endless(monkeypatch):
    """Training that never ends."""
    monkeypatch.setattr(run_loop, "POLL_S", 0.01)
    monkeypatch.setattr(run_loop, "fit_with_restarts", lambda *_: threading.Event().wait())


@pytest.mark.usefixtures("endless")
def test_a_stop_request_without_any_worker_ends_the_driver(tmp_path, monkeypatch, make_supervisor):
    """Two SIGTERM while the run waits for resources."""
    monkeypatch.setattr(run_loop, "NO_WORKERS_S", 0.2)
    monkeypatch.setattr(Supervisor, "check", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    monitor = FakeMonitor()
    watcher, events = make_supervisor(monitor)
    assert run_loop.run_until_done(None, watcher, tmp_path, 8, threading.Event())
    assert monitor.requests == ["request_stop"]
    assert [event.text.split(";")[0] for event in events] == [
        run_loop.STOPPING,
        "no worker is running that could save another checkpoint",
        "stopped before the first checkpoint",
    ]


@pytest.mark.usefixtures("endless")
def test_a_fatal_error_ends_the_driver_even_if_workers_do_not_end(tmp_path, monkeypatch, make_supervisor):
    monkeypatch.setattr(run_loop, "FATAL_GRACE_S", 0.1)
    watcher, events = make_supervisor(FakeMonitor([Notice(text="a"), FatalError(text="why", is_input_error=False)]))
    started = time.monotonic()
    with pytest.raises(run_loop.RunFailedError, match="why"):
        run_loop.run_until_done(None, watcher, tmp_path, 8, threading.Event())
    assert time.monotonic() - started >= 0.1, "the workers had time to end"
    assert events == [Notice(text="a")]


def test_a_draining_node_causes_one_request_for_a_checkpoint(tmp_path, monkeypatch, make_supervisor):
    monitor = FakeMonitor(statuses=[status(0), status(1, step=6)])
    watcher, events = make_supervisor(monitor)
    watcher.check()
    assert (monitor.requests, events) == ([], [])
    monkeypatch.setattr(supervisor.ray_compat, "draining_nodes", lambda: {"node1": 0})
    watcher.check()
    watcher.check()
    assert monitor.requests == ["request_save"]
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert (json.loads(line)["event"], json.loads(line)["step"]) == ("node_leaving", 6)


def test_missing_resources_are_reported_once_per_interval(tmp_path, monkeypatch, make_supervisor):
    monkeypatch.setattr(supervisor.resources, "find_shortage", lambda *_: "2 workers of 1 CPUs; the cluster has none")
    watcher, events = make_supervisor(FakeMonitor())
    watcher.check()
    assert events == []
    for _ in range(2):
        watcher.last_report -= supervisor.CHECK_RESOURCES_S + 1
        watcher.check()
        watcher.check()
    assert [event.text.split(":")[0] for event in events] == ["waiting for resources"] * 2


def test_a_stuck_rank_is_killed_and_reported(tmp_path, monkeypatch, make_supervisor):
    stuck = status(1, age_s=61)
    killed = []
    monkeypatch.setattr(watchdog, "kill_rank", lambda *arguments: killed.append(arguments))
    watcher, events = make_supervisor(FakeMonitor(statuses=[status(0), stuck]))
    watcher.check()
    assert killed == [(stuck, [status(0), stuck])]
    assert "rank 1 hangs" in events[0].text


def test_a_joined_cluster_may_be_too_small_because_it_can_grow(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})  # a head without CPUs, and no nodes yet
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    config = compose(["synthetic", "mask_rcnn", "pais", "scaling.num_workers=2", "scaling.use_gpu=true"])
    assert resources.worker_resources(config, is_own_cluster=False) == (1.0, 1)
    with pytest.raises(ConfigError, match="and 0 of 2 GPUs"):
        resources.worker_resources(config, is_own_cluster=True)
