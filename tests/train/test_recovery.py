"""A run returns to a good checkpoint, or ends with a reason."""

import json

import pytest
import torch

from pais_ray.config.tree import compose
from pais_ray.runs import directory
from pais_ray.runs.checkpoints import checkpoint_folder, checkpoints
from pais_ray.train.errors import TrainingEnded
from pais_ray.train.step import BackwardOutOfMemoryError, StepResult
from pais_ray.train.worker import recovery
from pais_ray.train.worker.evaluation import PendingScores
from tests.support.tiny import state_of, tiny_batch
from tests.support.worker import Rank

WORDS = ["synthetic", "mask_rcnn", "pais", "train.steps=20", "guards.max_rollbacks=2", "train.max_consecutive_skips=3"]
SKIPPED = StepResult(
    metrics={"loss": torch.tensor(2.0), "labeled/mask": torch.tensor(torch.nan)},
    skipped=True,
    stop=False,
    grad_norm=float("nan"),
)


@pytest.fixture
def rank(tmp_path):
    """At step 9 after three skipped steps, with a good checkpoint of step 4 and one of step 8 amid those steps."""
    rank = Rank(tmp_path, compose(WORDS), state_of())
    state = rank.state
    for state.step, state.g_next, state.skipped, state.skipped_in_row in ((4, 8, 0, 0), (8, 16, 2, 2)):
        state.save(checkpoint_folder(tmp_path, state.step))
    state.step, state.g_next, state.skipped, state.skipped_in_row = 9, 18, 3, 3
    rows = ({"step": step, "teacher/segm_AP": step / 10} for step in (4, 8))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rank


def test_a_rollback_restores_the_weights_and_continues_with_the_next_data(rank):
    good = {name: value.clone() for name, value in rank.state.student.state_dict().items()}
    for parameter in rank.state.student.parameters():
        parameter.data.fill_(torch.nan)
    rank.evaluator.pending = [PendingScores(step, "teacher", None) for step in (4, 8)]
    assert rank.recovery.check_step(SKIPPED, [tiny_batch()])
    state = rank.state
    assert all(torch.equal(value, good[name]) for name, value in state.student.state_dict().items())
    assert (state.step, state.g_next, state.skipped, state.skipped_in_row, state.rollbacks) == (4, 18, 3, 0, 1)
    assert state.best["teacher"] == {"segm_AP": 0.4, "step": 4}, "of the steps that will be repeated nothing counts"
    assert checkpoints(rank.root) == [checkpoint_folder(rank.root, 4)], "a restart would resume from a newer one"
    assert rank.evaluator.unscored_steps == {4}
    assert rank.logger.rewound == [4]
    (event,) = rank.logger.events
    assert (event["event"], event["from"], event["step"]) == ("rollback", 9, 4)
    assert "'losses': {'labeled/mask': nan}, 'image_ids': [0, 100, 100]" in event["text"]


def test_too_few_skipped_steps_change_nothing(rank):
    rank.state.skipped_in_row = 2
    assert not rank.recovery.check_step(SKIPPED, [tiny_batch()])
    assert rank.state.step == 9


@pytest.mark.parametrize(("rollbacks", "reason"), [(2, "All 2 rollbacks"), (0, "no checkpoint to return to")])
def test_without_a_rollback_the_run_ends_with_a_remedy(rank, rollbacks, reason):
    rank.state.rollbacks = rollbacks
    if rollbacks == 0:
        (checkpoint_folder(rank.root, 4) / "student.safetensors").unlink()
    with pytest.raises(TrainingEnded, match=rf"labeled/mask.*{reason}.*lower optim\.lr"):
        rank.recovery.check_step(SKIPPED, [tiny_batch()])
    assert rank.state.step == 9


def test_metrics_that_show_a_failing_run_are_reported_or_end_it(rank):
    config = rank.config.guards
    rank.recovery.check_metrics({"pseudo/kept_per_image": 0.0, "labeled/mask": 1.0}, config.kept_alarm_steps)
    assert [event["event"] for event in rank.logger.events] == ["teacher_collapse"]
    with pytest.raises(TrainingEnded, match="zero_loss_steps"):
        rank.recovery.check_metrics({"labeled/mask": 0.0}, config.zero_loss_steps)


@pytest.mark.parametrize(("pseudo_labels", "limit"), [(9, 4), (1, 100)])
def test_a_lack_of_memory_halves_the_limit_for_later_starts(rank, monkeypatch, pseudo_labels, limit):
    reported = []
    monkeypatch.setattr(recovery, "report_last_event", lambda *event: reported.append(event))
    rank.recovery.lower_pseudo_label_limit(BackwardOutOfMemoryError(pseudo_labels, "asked for 7 GiB"))
    assert directory.read_pseudo_label_limit(rank.root, 100) == limit
    ((_, step, text, fields),) = reported
    assert (step, fields["event"], fields.get("cap", 100)) == (9, "out_of_memory", limit)
    assert "asked for 7 GiB" in text
