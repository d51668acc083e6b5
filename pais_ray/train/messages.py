"""Messages between the driver and the workers, carried by the Monitor actor. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["first_batch", "step", "evaluate", "save"]


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """Means of the steps since the last log line."""

    step: int
    last_step: int  # the step at which this start of the run ends
    eta_s: float  # estimated seconds until ``last_step``
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class EvaluationScores:
    """Scores of one role at one evaluation."""

    step: int
    role: str  # teacher | student
    scores: Mapping[str, float]  # metric name -> value, such as teacher/segm_AP


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line of text for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class FatalError:
    """The reason why the run cannot continue: retrying would fail in the same way."""

    text: str
    is_input_error: bool  # the user's input is wrong, not the training


Event = StepProgress | EvaluationScores | Notice
Message = Event | FatalError


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One heartbeat: the step and stage of a rank, and the identity of its process."""

    rank: int
    node: str  # Ray's node ID
    pid: int
    process_start_time: float  # s since boot; identifies the process if the pid is reused
    stacks_path: str  # the file that the process writes its Python stacks to
    attempt: float  # increases with each start of the worker group; 0 until the ranks have agreed on it
    step: int
    stage: Stage
    age_s: float  # time since the stage began
    silence_s: float = 0.0  # time since the last heartbeat
    saves_done: int = 0  # number of the last request for a checkpoint that this rank has served


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What the driver asks of the workers; the answer to a heartbeat.

    Requests for a checkpoint are numbered, so an answer that arrives late does not repeat one.
    """

    stop: bool = False  # stays true once set
    save: int = 0  # number of the newest request for a checkpoint; 0: none yet
    saves_done: int = 0  # number of the newest one that a worker has served
