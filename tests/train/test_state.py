"""The state of a run: what is loaded is what was saved."""

import hashlib
import json

import pytest
import torch

from pais_ray.modeling.methods.pais import PAIS
from pais_ray.runs.checkpoints import CheckpointError, checkpoint_folder, load_segmentor, newest_verified, verify
from pais_ray.train.step import StepSettings, train_step
from tests.support.tiny import state_of, tiny_batch, tiny_schedule

SETTINGS = StepSettings(schedule=tiny_schedule(), seed=1)


def trained(steps, state=None):
    state = state or state_of()
    while state.step < steps:
        train_step(state, state.student, [tiny_batch(state.g_next)], PAIS(), SETTINGS)
        state.g_next += 1
    return state


def tensors_of(state):
    slots = state.optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": v for i, slot in slots.items() for k, v in slot.items() if isinstance(v, torch.Tensor)}
    return {
        **{f"student.{k}": v for k, v in state.student.state_dict().items()},
        **{f"teacher.{k}": v for k, v in state.teacher.state_dict().items()},
        **{f"optimizer.{k}": v for k, v in moments.items()},
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_saving_and_loading_half_way_does_not_change_training(tmp_path):
    whole = trained(4)
    first = trained(2)
    first.best = {"teacher": {"segm_AP": 0.25, "step": 2}}
    first.skipped, first.skipped_in_row, first.rollbacks = 5, 1, 2
    first.save(tmp_path / "step_2")
    resumed = state_of(seed=99)  # other initial weights, all of which must be replaced
    resumed.load(tmp_path / "step_2")
    for name in ("step", "g_next", "skipped", "skipped_in_row", "rollbacks", "best"):
        assert getattr(resumed, name) == getattr(first, name)
    assert_same(tensors_of(resumed), tensors_of(first))
    assert_same(tensors_of(trained(4, resumed)), tensors_of(whole))


def test_a_snapshot_does_not_change_with_the_state(tmp_path):
    state = trained(1)
    before = {name: value.clone() for name, value in tensors_of(state).items()}
    snapshot = state.snapshot()
    state.best["teacher"] = {"segm_AP": 0.5, "step": 1}
    with torch.no_grad():
        for value in tensors_of(state).values():
            value.zero_()
    state.optimizer.param_groups[0]["weight_decay"] = 7.0
    saved = snapshot.tensors
    roles = {f"student.{k}": v for k, v in saved["student"].items()}
    roles |= {f"teacher.segmentor.{k}": v for k, v in saved["teacher"].items()}
    assert_same({**roles, **{f"optimizer.{k}": v for k, v in saved["optimizer"].items()}}, before)
    assert snapshot.state["best"] == {}


def test_a_checkpoint_consists_of_safetensors_and_json(tmp_path):
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
    assert [p.name for p in tmp_path.iterdir()] == ["step_0"], "no partial directory remains"


def test_a_checkpoint_of_the_first_format_loads(tmp_path):
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
    assert_same(tensors_of(resumed), tensors_of(state))


def test_weights_and_optimizers_of_another_model_are_refused(tmp_path):
    state = trained(1)
    state.save(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_segmentor(torch.nn.Linear(2, 2), tmp_path / "step_1", "teacher")
    state.optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1} for p in state.student.parameters()])
    with pytest.raises(CheckpointError, match="parameter groups"):
        state.load(tmp_path / "step_1")


def test_saving_replaces_an_existing_directory(tmp_path):
    state = state_of()
    state.save(tmp_path / "step_0")
    (tmp_path / "step_0" / "manifest.json").write_text("{")
    state.save(tmp_path / "step_0")
    verify(tmp_path / "step_0")
    assert json.loads((tmp_path / "step_0" / "state.json").read_text())["step"] == 0
