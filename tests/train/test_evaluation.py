"""Scores of evaluations: collected at fixed steps, never fatal before the last step."""

import pytest

from pais_ray.config.tree import compose
from pais_ray.runs.checkpoints import checkpoint_folder
from pais_ray.train.errors import TrainingEnded
from pais_ray.train.worker import evaluation
from pais_ray.train.worker.evaluation import PendingScores, note_scores
from tests.support.tiny import state_of
from tests.support.worker import Rank

WORDS = ["synthetic", "mask_rcnn", "pais", "train.steps=20"]


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """At step 9; a pending task is its own AP, or the error that it raises."""

    def get(task):
        if isinstance(task, Exception):
            raise task
        return {"segm_AP": task}

    monkeypatch.setattr(evaluation.ray, "get", get)
    rank = Rank(tmp_path, compose(WORDS), state_of())
    rank.state.step = 9
    return rank


def test_scores_without_a_checkpoint_are_not_the_best(rank):
    checkpoint_folder(rank.root, 4).mkdir(parents=True)
    rows = [{"step": 4, "teacher/segm_AP": 0.2}, {"step": 8, "teacher/segm_AP": 0.9}]
    note_scores(rank.state, rank.root, rows)
    assert rank.state.best == {"teacher": {"segm_AP": 0.2, "step": 4}}


def test_scores_are_collected_up_to_a_step_and_the_best_is_noted(rank):
    for step in (4, 8):
        checkpoint_folder(rank.root, step).mkdir(parents=True)
    rank.evaluator.pending = [
        PendingScores(4, "teacher", 0.3),
        PendingScores(4, "student", 0.5),
        PendingScores(8, "teacher", 0.4),
    ]
    assert rank.evaluator.unscored_steps == {4, 8}
    rank.evaluator.collect_scores(up_to=7)
    assert rank.logger.scored == [(4, "teacher"), (4, "student")]
    assert rank.evaluator.unscored_steps == {8}
    assert rank.state.best == {"teacher": {"segm_AP": 0.3, "step": 4}, "student": {"segm_AP": 0.5, "step": 4}}
    assert [(e["event"], e["at"]) for e in rank.logger.events] == [("teacher_below_student", 4)]
    assert set(rank.heartbeat.stages) == {"save"}, "waiting for scores has the limit of that stage"


def test_scores_that_cannot_be_computed_end_a_run_only_at_its_last_step(rank):
    """If storage does not answer the scoring task, for example; the same command then repeats the last evaluation."""
    stale = OSError(116, "Stale file handle")
    rank.evaluator.pending = [PendingScores(8, "teacher", stale), PendingScores(8, "student", stale)]
    rank.evaluator.collect_scores(up_to=9)
    assert [(event["event"], event["at"]) for event in rank.logger.events] == [("scoring_failed", 8)] * 2
    assert rank.evaluator.pending == []
    rank.evaluator.pending = [PendingScores(20, "teacher", stale)]
    with pytest.raises(TrainingEnded, match="Stale file handle; repeat the command"):
        rank.evaluator.collect_scores(up_to=20)
