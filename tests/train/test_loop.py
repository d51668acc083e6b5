"""What is saved and evaluated after a step, and in which order."""

import pytest

from pais_ray.config.tree import compose
from pais_ray.train.step import StepSettings
from pais_ray.train.worker.loop import TrainingLoop
from pais_ray.train.worker.resume import ResumePoint
from tests.support.tiny import state_of
from tests.support.worker import Rank

STEPS = 8
WORDS = ["synthetic", "mask_rcnn", "pais", f"train.steps={STEPS}", "train.eval_every=4", "train.checkpoint_every=2"]


class Calls:
    """Stands for the evaluator and for the checkpointer, and records what is called on them."""

    def __init__(self) -> None:
        self.made = []
        self.unscored_steps = set()
        self.evaluate = lambda: self.made.append("evaluate")
        self.save = lambda unscored_steps: self.made.append("save")
        self.save_and_wait = lambda unscored_steps: self.made.append("save and wait")

    def collect_scores(self, up_to: int) -> None:
        self.made.append(f"collect {up_to}")


@pytest.mark.parametrize(
    ("step", "stopped", "save_requested", "skipped_in_row", "expected"),
    [
        (4, False, False, 0, ["collect 3", "save", "evaluate"]),
        (2, False, False, 0, ["collect 1", "save"]),
        (3, False, False, 0, []),
        (2, False, False, 1, ["collect 1"]),  # the weights may be the reason for the skipped steps
        (3, False, True, 0, ["save", "collect 2"]),
        (4, False, True, 0, ["save", "collect 3", "collect 3", "save", "evaluate"]),
        (4, True, False, 0, ["save and wait", "collect 4"]),  # the next start evaluates
        (8, False, False, 0, ["collect 7", "save and wait", "evaluate", "collect 8"]),
        (8, True, False, 0, ["collect 7", "save and wait", "evaluate", "collect 8"]),
    ],
)
def test_order_of_checkpoint_and_evaluation_after_a_step(
    tmp_path, step, stopped, save_requested, skipped_in_row, expected
):
    rank, calls = Rank(tmp_path, compose(WORDS), state_of()), Calls()
    rank.state.step, rank.state.skipped_in_row = step, skipped_in_row
    rank.heartbeat.save = save_requested
    loop = loop_of(rank, evaluator=calls, checkpointer=calls)
    loop.checkpoint_and_evaluate(stopped)
    assert calls.made == expected
    assert rank.heartbeat.save is False, "a request is served once"


def test_a_run_ends_at_stop_at_and_at_the_end_of_the_schedule(tmp_path):
    for stop_at, last in ((None, STEPS), (6, 6), (99, STEPS)):
        config = compose([*WORDS, f"train.stop_at={'null' if stop_at is None else stop_at}"])
        assert loop_of(Rank(tmp_path, config, state_of())).last_step == last


def test_the_start_reports_what_the_run_resumes_from(tmp_path):
    rank = Rank(tmp_path, compose(WORDS), state_of())
    loop_of(rank, skipped=["step_00000009: damaged"]).report_start()
    assert [event["event"] for event in rank.logger.events] == ["start", "checkpoint_passed_over"]
    assert rank.logger.events[0]["text"] == "1 workers, 3 rows per step, 3 per worker"
    assert rank.logger.events[1]["text"] == "checkpoint skipped: step_00000009: damaged"


def loop_of(rank, skipped=(), **parts) -> TrainingLoop:
    resume = ResumePoint(checkpoint=None, skipped=list(skipped), unscored=None, metrics=[], attempt=1.0)
    present = {"evaluator": rank.evaluator, "checkpointer": rank.checkpointer, **parts}
    return TrainingLoop(
        job=rank.job,
        resume=resume,
        state=rank.state,
        network=rank.state.student,
        settings=StepSettings(schedule=rank.job.schedule, rows=3),
        group=rank.group,
        heartbeat=rank.heartbeat,
        logger=rank.logger,
        recovery=rank.recovery,
        **present,
    )
