"""Runs a trainer until its end, a stop request or a fatal error; passes events on and supervises the workers."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer

from pais_ray.cluster import ray_compat
from pais_ray.runs import directory
from pais_ray.runs.checkpoints import newest_verified
from pais_ray.train.driver.supervisor import Supervisor
from pais_ray.train.messages import Event, FatalError, Message, Notice

POLL_S = 0.5  # between two queries to the monitor
NO_WORKERS_S = 30.0  # without a heartbeat before a stop request ends the driver: no worker can serve it
FATAL_GRACE_S = 30.0  # for the workers to end after a fatal error
RAY_FOLDER = ".ray"  # Ray's own files in the run directory; each start of the driver uses another name in it
STOPPING = "stopping after this step or the next one, with a checkpoint"


class InvalidInputError(ValueError):
    """A worker found the user's input to be wrong; the message is the worker's."""


class RunFailedError(RuntimeError):
    """A worker ended the run because it cannot continue; the message is the worker's."""


def run_until_done(
    trainer: Callable[..., TorchTrainer], supervisor: Supervisor, root: Path, last_step: int, stop: threading.Event
) -> bool:
    """Runs the trainer until its end and returns whether the run was stopped before ``last_step``.

    The trainer runs in a thread: in the main thread its SIGINT handler would abort without a checkpoint. Ctrl-C,
    SIGTERM and ``stop`` make the workers stop with a checkpoint. Raises InvalidInputError or RunFailedError after a
    fatal error, else the error of the trainer.
    """
    thread = TrainerThread(trainer, root, supervisor)
    is_stop_requested = False
    fatal: Exception | None = None
    deadline: float | None = None  # for the trainer to end after a fatal error
    with stop_on_sigterm(stop):
        while not thread.ended.is_set() and (deadline is None or time.monotonic() < deadline):
            try:
                thread.ended.wait(timeout=POLL_S)
                fatal = dispatch(take_messages(supervisor), supervisor.on_event) or fatal
                if fatal is not None and deadline is None:
                    deadline = time.monotonic() + FATAL_GRACE_S
                supervisor.check()
                if stop.is_set() and not is_stop_requested:
                    ray.get(supervisor.monitor.request_stop.remote())  # before it is announced
                    is_stop_requested = True
                    supervisor.on_event(Notice(text=f"{STOPPING}; press Ctrl-C again to stop immediately"))
                elif is_stop_requested and supervisor.seconds_since_heartbeat() > NO_WORKERS_S:
                    supervisor.on_event(Notice(text="no worker is running that could save another checkpoint"))
                    break
            except KeyboardInterrupt:
                if stop.is_set():
                    raise
                stop.set()
    fatal = dispatch(take_messages(supervisor), supervisor.on_event) or fatal
    if fatal is not None:
        raise fatal
    if thread.error is not None:
        raise thread.error
    stopped = is_stop_requested and directory.completed_steps(root) < last_step
    if stopped:
        newest = newest_verified(root)[0]
        where = "before the first checkpoint" if newest is None else f"with a checkpoint in {root / 'checkpoints'}"
        supervisor.on_event(Notice(text=f"stopped {where}"))
    return stopped


class TrainerThread:
    """Runs a trainer in a thread; ``error`` is the error that it raised."""

    def __init__(self, trainer: Callable[..., TorchTrainer], root: Path, supervisor: Supervisor) -> None:
        self.error: BaseException | None = None
        self.ended = threading.Event()  # Thread.join, if interrupted, takes a live thread for dead (Python < 3.13)

        def fit() -> None:
            try:
                fit_with_restarts(
                    trainer,
                    root,
                    supervisor.config.run.max_failures,
                    lambda text: supervisor.report(text, "start_failed"),
                )
            except BaseException as error:
                self.error = error
            finally:
                self.ended.set()

        threading.Thread(target=fit, daemon=True).start()


def fit_with_restarts(
    trainer: Callable[..., TorchTrainer], root: Path, max_failures: int, report: Callable[[str], None]
) -> None:
    """Runs ``trainer`` and starts it again if a worker died while the worker group was being created.

    Ray restarts a group whose workers die during training, but gives up on a death before that. ``max_failures``
    limits these restarts; -1 means no limit.
    """
    failures = 0
    while True:
        run_config = ray.train.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}_{failures}",
            storage_path=str(root / RAY_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        )
        try:
            trainer(run_config=run_config).fit()
            return
        except ray.train.ControllerError as error:
            failures += 1
            if not is_worker_death(ray_compat.controller_failure(error)) or 0 <= max_failures < failures:
                raise
            report(
                f"a worker died while the worker group was being created; the workers restart ({type(error).__name__})"
            )


def is_worker_death(error: Exception) -> bool:
    """Whether a worker died, or another worker failed because it could not connect to it."""
    is_lost_connection = isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RuntimeError)
    return is_lost_connection or isinstance(error, ray.exceptions.RayActorError)


@contextmanager
def stop_on_sigterm(stop: threading.Event) -> Iterator[None]:
    """SIGTERM, sent when a machine or a job ends, sets ``stop``; unlike a second Ctrl-C, a second one changes
    nothing, since some systems send it twice."""
    if threading.current_thread() is not threading.main_thread():  # a trial of a search; its driver has the handler
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def take_messages(supervisor: Supervisor) -> Sequence[Message]:
    """The messages that the workers sent since the last call."""
    messages: Sequence[Message] = ray.get(supervisor.monitor.take_messages.remote())
    return messages


def dispatch(messages: Sequence[Message], on_event: Callable[[Event], None]) -> Exception | None:
    """Passes events to ``on_event``; returns the last fatal error as the exception to raise."""
    fatal: Exception | None = None
    for message in messages:
        if isinstance(message, FatalError):
            fatal = InvalidInputError(message.text) if message.is_input_error else RunFailedError(message.text)
        else:
            on_event(message)
    return fatal
