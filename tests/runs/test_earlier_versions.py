"""A run directory that an earlier version wrote loads: tests/fixtures/run_0_1, trained by version 0.1 before settings,
metrics and checkpoints were renamed. See tests/fixtures/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pais_ray.config.tree import load, run_schedule
from pais_ray.data.annotations.splits import SplitManifest
from pais_ray.modeling import registry
from pais_ray.runs.checkpoints import checkpoint_folder, load_segmentor, newest_verified
from pais_ray.train.state import build_state

RUN = Path(__file__).resolve().parents[1] / "fixtures" / "run_0_1"
STEP = 6


@pytest.fixture
def config():
    return load(RUN / "config.yaml")


def num_classes() -> int:
    return len(SplitManifest.from_json((RUN / "split.json").read_text()).classes)


def test_settings_have_their_recorded_values_under_their_present_names(config):
    assert (config.method.normalizer, config.batch.accumulation_steps) == ("pos_neg", 2)
    assert (config.views.strong.color, config.views.strong.color_level, config.views.weak.color) == (
        True,
        (1, 9),
        False,
    )
    assert config.train.max_consecutive_skips == 20
    assert run_schedule(config).lr == 0.005


def test_the_state_has_every_tensor_and_counter_of_the_checkpoint(config):
    folder = checkpoint_folder(RUN, STEP)
    assert newest_verified(RUN) == (folder, [])
    state = build_state(config, run_schedule(config), num_classes(), "cpu")
    state.load(folder)
    for role, module in (("student", state.student), ("teacher", state.teacher.segmentor)):
        saved, loaded = load_file(folder / f"{role}.safetensors"), module.state_dict()
        assert saved.keys() == loaded.keys()
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    saved = load_file(folder / "optimizer.safetensors")
    slots = state.optimizer.state_dict()["state"]
    assert saved.keys() == {f"{index}.{name}" for index, slot in slots.items() for name in slot}
    for key, value in saved.items():
        index, name = key.split(".")
        assert torch.equal(slots[int(index)][name], value)
    assert torch.equal(torch.get_rng_state(), load_file(folder / "rng.safetensors")["cpu"])
    counters = json.loads((folder / "state.json").read_text())
    for name in ("step", "g_next", "skipped", "skipped_in_row", "rollbacks", "best"):
        assert getattr(state, name) == counters[name]
    assert (state.step, state.g_next) == (STEP, 2 * STEP)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_weights_of_either_role_load_alone(config, role):
    segmentor = registry.segmentor(config.segmentor.name)(num_classes(), config.segmentor, pretrained=False)
    folder = checkpoint_folder(RUN, STEP)
    load_segmentor(segmentor, folder, role)
    saved = load_file(folder / f"{role}.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in segmentor.state_dict().items())


@pytest.mark.parametrize("name", ["mask_rcnn", "knet"])
def test_segmentors_have_the_tensors_of_version_0_1_in_the_same_order(name):
    """Names and shapes are what a checkpoint must match; the optimizer's state is addressed by their order."""
    recorded = json.loads((RUN / "parameters.json").read_text())[name]
    cls = registry.segmentor(name)
    present = cls(2, cls.Config(preset="nano", weights=None)).state_dict()
    assert [(key, list(value.shape)) for key, value in present.items()] == [*map(tuple, recorded.items())]
