"""Laws of checkpoints: what is loaded is what was saved, and what is damaged is refused by name."""

import hashlib
import json

import pytest
import torch

from pais_ray.files.json_lines import metric_rows
from pais_ray.modeling.methods.pais import PAIS
from pais_ray.runs.checkpoints import (
    CheckpointError,
    checkpoint_folder,
    delete_old_checkpoints,
    find_resumable_checkpoint,
    find_rollback_target,
    load_segmentor,
    newest_verified,
    verify,
)
from pais_ray.train.step import StepSettings, train_step
from tests.support.tiny import state_of, tiny_batch, tiny_schedule

SETTINGS = StepSettings(schedule=tiny_schedule(), seed=1)


def trained(steps, state=None):
    state = state or state_of()
    while state.step < steps:
        train_step(state, state.student, [tiny_batch(state.g_next)], PAIS(), SETTINGS)
        state.g_next += 1
    return state


def everything(state):
    slots = state.optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": v for i, slot in slots.items() for k, v in slot.items() if isinstance(v, torch.Tensor)}
    return {
        **{f"student.{k}": v for k, v in state.student.state_dict().items()},
        **{f"teacher.{k}": v for k, v in state.teacher.state_dict().items()},
        **{f"optimizer.{k}": v for k, v in moments.items()},
    }


def assert_same(a, b):
    a, b = everything(a), everything(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_train_2n_is_train_n_save_load_train_n(tmp_path):
    whole = trained(4)
    first = trained(2)
    first.best = {"teacher": {"segm_AP": 0.25, "step": 2}}
    first.save(tmp_path / "step_2")
    resumed = state_of(seed=99)  # other initial weights: nothing may be left of them
    resumed.load(tmp_path / "step_2")
    assert (resumed.step, resumed.g_next, resumed.best) == (2, 2, first.best)
    assert_same(resumed, first)
    assert_same(trained(4, resumed), whole)


def test_a_checkpoint_is_safetensors_and_json_and_has_no_leftovers(tmp_path):
    state_of().save(tmp_path / "step_0")
    names = sorted(p.name for p in (tmp_path / "step_0").iterdir())
    assert names == [
        "manifest.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "student.safetensors",
        "teacher.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["step_0"]


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "missing", "no manifest", "no text", "other shape", "other format"]
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    state = state_of()
    for step in (1, 2):
        state.step = step
        state.save(checkpoint_folder(tmp_path, step))
    newest = checkpoint_folder(tmp_path, 2)
    victim = newest / "teacher.safetensors"
    data = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(data[:-1])
    elif damage == "flip":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "no text":  # one bit of it
        manifest = (newest / "manifest.json").read_bytes()
        (newest / "manifest.json").write_bytes(manifest[:9] + bytes([manifest[9] ^ 0x80]) + manifest[10:])
    elif damage == "other shape":
        (newest / "manifest.json").write_text('{"format": 2, "files": []}')
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    folder, refused = newest_verified(tmp_path)
    assert folder == checkpoint_folder(tmp_path, 1)
    assert len(refused) == 1
    assert str(newest) in refused[0]
    with pytest.raises(CheckpointError):
        verify(newest)


def test_a_checkpoint_made_amid_steps_without_a_loss_is_nothing_to_return_to(tmp_path):
    state = state_of()
    for state.step, state.skipped_in_row in ((1, 0), (2, 0), (3, 1), (4, 2)):
        state.save(checkpoint_folder(tmp_path, state.step))
    (checkpoint_folder(tmp_path, 2) / "teacher.safetensors").unlink()
    assert find_rollback_target(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert newest_verified(tmp_path)[0] == checkpoint_folder(tmp_path, 4)


def test_a_checkpoint_of_the_first_format_is_taken_up(tmp_path):
    state = trained(1)
    folder = checkpoint_folder(tmp_path, 1)
    state.save(folder)
    old = json.loads((folder / "state.json").read_text())
    del old["rollbacks"]
    (folder / "state.json").write_text(json.dumps({**old, "format": 1}))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert newest_verified(tmp_path) == (folder, [])
    resumed = state_of(seed=99)
    resumed.load(folder)
    assert resumed.rollbacks == 0
    assert_same(resumed, state)


def test_weights_of_another_model_are_refused(tmp_path):
    state_of().save(tmp_path / "step_0")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_segmentor(torch.nn.Linear(2, 2), tmp_path / "step_0", "teacher")


def test_saving_over_a_leftover_replaces_it(tmp_path):
    state = state_of()
    state.save(tmp_path / "step_0")
    (tmp_path / "step_0" / "manifest.json").write_text("{")
    state.save(tmp_path / "step_0")
    verify(tmp_path / "step_0")
    assert json.loads((tmp_path / "step_0" / "state.json").read_text())["step"] == 0


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step in range(1, 7):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    delete_old_checkpoints(tmp_path, 2, {2, 6}, step=6)
    assert steps_kept(tmp_path) == [2, 5, 6]


def test_retention_after_a_fallback_keeps_what_was_just_written(tmp_path):
    for step in (1, 2, 9):  # 9 was damaged and passed over
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    delete_old_checkpoints(tmp_path, 1, (), step=2)
    assert steps_kept(tmp_path) == [2, 9]


def steps_kept(root):
    return sorted(int(p.name.split("_")[1]) for p in (root / "checkpoints").iterdir())


def test_a_run_without_a_usable_checkpoint_is_not_silently_begun_anew(tmp_path):
    assert find_resumable_checkpoint(tmp_path) == (None, [])
    checkpoint_folder(tmp_path, 1).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_resumable_checkpoint(tmp_path)


def test_the_log_is_read_without_the_half_line_of_a_killed_writer(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [r["step"] for r in metric_rows(tmp_path)] == [1, 2]
    assert [r["step"] for r in metric_rows(tmp_path, up_to=1)] == [1]
