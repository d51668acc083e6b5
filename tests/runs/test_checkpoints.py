"""Checkpoint directories: a damaged one is refused by name, and the newest good one is found."""

import json

import pytest
import torch

from pais_ray.runs.checkpoints import (
    FORMAT,
    CheckpointError,
    Snapshot,
    best_checkpoint,
    checkpoint_folder,
    delete_old_checkpoints,
    find_resumable_checkpoint,
    find_rollback_target,
    newest_verified,
    verify,
    write_checkpoint,
)


def write(root, step, skipped_in_row=0):
    tensors = {name: {"weight": torch.full((8,), float(step))} for name in ("student", "teacher")}
    state = {"step": step, "skipped_in_row": skipped_in_row, "best": {}}
    write_checkpoint(Snapshot(step=step, tensors=tensors, state=state), checkpoint_folder(root, step))


def truncate(folder):
    path = folder / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(folder):
    path = folder / "teacher.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def break_manifest_encoding(folder):
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data[:9] + bytes([data[9] ^ 0x80]) + data[10:])


def change_manifest_structure(folder):
    (folder / "manifest.json").write_text('{"format": 2, "files": []}')


def raise_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}))


DAMAGES = [
    truncate,
    flip_bit,
    lambda folder: (folder / "teacher.safetensors").unlink(),
    lambda folder: (folder / "manifest.json").unlink(),
    break_manifest_encoding,
    change_manifest_structure,
    raise_format,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    for step in (1, 2):
        write(tmp_path, step)
    newest = checkpoint_folder(tmp_path, 2)
    verify(newest)
    damage(newest)
    folder, failures = newest_verified(tmp_path)
    assert folder == checkpoint_folder(tmp_path, 1)
    assert len(failures) == 1
    assert str(newest) in failures[0]
    with pytest.raises(CheckpointError):
        verify(newest)


def test_a_rollback_never_returns_to_a_checkpoint_between_skipped_steps(tmp_path):
    for step, skipped_in_row in ((1, 0), (2, 0), (3, 1), (4, 2)):
        write(tmp_path, step, skipped_in_row)
    truncate(checkpoint_folder(tmp_path, 2))
    assert find_rollback_target(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert newest_verified(tmp_path)[0] == checkpoint_folder(tmp_path, 4)


def test_a_failed_write_leaves_nothing(tmp_path):
    snapshot = Snapshot(step=1, tensors={"student": {"weight": torch.zeros(8)}}, state={"step": object()})
    with pytest.raises(TypeError):
        write_checkpoint(snapshot, checkpoint_folder(tmp_path, 1))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_without_a_usable_checkpoint_does_not_silently_start_from_scratch(tmp_path):
    assert find_resumable_checkpoint(tmp_path) == (None, [])
    checkpoint_folder(tmp_path, 1).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_resumable_checkpoint(tmp_path)


def steps_of(root):
    return sorted(int(p.name.split("_")[1]) for p in (root / "checkpoints").iterdir())


def test_the_last_checkpoints_and_the_protected_ones_are_kept(tmp_path):
    for step in range(1, 7):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    delete_old_checkpoints(tmp_path, 2, {2, 6}, step=6)
    assert steps_of(tmp_path) == [2, 5, 6]


def test_a_later_damaged_checkpoint_does_not_displace_the_one_just_written(tmp_path):
    for step in (1, 2, 9):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    delete_old_checkpoints(tmp_path, 1, (), step=2)
    assert steps_of(tmp_path) == [2, 9]


def test_the_best_checkpoint_considers_scores_that_were_logged_after_the_newest_one(tmp_path):
    newest = checkpoint_folder(tmp_path, 8)
    for step in (4, 8):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    best = {"teacher": {"segm_AP": 0.2, "step": 4}}
    (newest / "state.json").write_text(json.dumps({"format": 2, "step": 8, "best": best}))
    assert best_checkpoint(tmp_path, newest, "teacher") == checkpoint_folder(tmp_path, 4)
    assert best_checkpoint(tmp_path, newest, "student") is None
    rows = [
        {"step": 6, "teacher/segm_AP": 0.9},
        {"step": 8, "teacher/segm_AP": 0.3},
        {"step": 12, "teacher/segm_AP": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert best_checkpoint(tmp_path, newest, "teacher") == newest, "6 has no checkpoint, 12 is later"
