"""Descriptions of settings: complete, and the same facts that the sections enforce."""

import pytest

from pais_ray.augmentation.presets import AugmentConfig
from pais_ray.config.describe import all_settings, describe, section_descriptions
from pais_ray.config.identity import flatten
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config, compose
from pais_ray.modeling import registry


def one(name):
    [found] = describe(name)
    return found


@pytest.mark.parametrize("setting", all_settings(), ids=lambda s: f"{s.name}-{s.plugin}")
def test_every_description_is_made_of_full_sentences(setting):
    text = setting.description
    complete = len(text.split()) >= 6 and text[0].isupper() and text.endswith(".") and "  " not in text
    assert complete, text
    if setting.section not in ("segmentor", "method", "optim"):  # their descriptions name the source in brackets
        assert "Default: " in text, "the source of the default, or what null means"


def test_every_section_is_described_by_a_full_sentence():
    nested = AugmentConfig.model_fields.items()
    described = {**section_descriptions(), **{name: info.description for name, info in nested}}
    assert [n for n, text in described.items() if not (text[0].isupper() and text.endswith("."))] == []


def test_all_settings_of_all_plugins_are_listed():
    weights = {"method.labeled_weights", "method.unlabeled_weights"}  # mappings, flattened by key
    for segmentor in registry.segmentor_names():
        for method in registry.method_names():
            unlabeled = 0 if method == "supervised" else 1
            words = ["coco", f"segmentor.name={segmentor}", f"method.name={method}", f"batch.unlabeled={unlabeled}"]
            actual = {n for n in flatten(compose(words)) if n.rpartition(".")[0] not in weights}
            listed = {s.name for s in all_settings() if s.plugin in (None, segmentor, method)}
            assert actual - weights == listed - weights


def test_sections_are_those_of_a_config_file():
    assert list(section_descriptions()) == list(Config.model_fields)
    assert list(dict.fromkeys(s.section for s in all_settings())) == list(Config.model_fields)


def test_a_section_lists_its_settings():
    assert {s.name for s in describe("batch")} == {
        f"batch.{n}" for n in Config.model_fields["batch"].annotation.model_fields
    }
    assert {s.name.rpartition(".")[0] for s in describe("views.weak")} == {"views.weak"}


def test_plugins_that_share_a_name_are_listed_separately():
    assert [s.plugin for s in describe("segmentor.preset")] == registry.segmentor_names()


@pytest.mark.parametrize(
    ("name", "type_", "default"),
    [
        ("data.train", "text or null", "null"),
        ("data.labeled", "number, greater than 0, at most 1", "1.0"),
        ("data.max_pixels", "integer, at least 1, at most 178956970", "89478485"),
        ("train.steps", "integer, at least 1, or null", "null"),
        ("train.precision", "one of fp32, bf16, fp16", "fp32"),
        ("train.deterministic", "true or false", "false"),
        ("scaling.num_workers", "integer or list of 2 integers", "1"),
        ("optim.reference.milestones", "list of integers", "[160000, 200000]"),
        ("views.test.erase_holes", "list of lists of 2 integers", "[]"),
    ],
)
def test_type_and_default_in_words(name, type_, default):
    setting = one(name)
    assert (setting.type, setting.default) == (type_, default)


def test_choices_are_the_allowed_values():
    assert one("train.precision").choices == ("fp32", "bf16", "fp16")
    assert one("train.steps").choices == ()


def test_defaults_that_depend_on_the_preset():
    assert one("views.test.short_side").default_by_preset == {"cityscapes": "[1024, 1024]"}
    knet, mask_rcnn = describe("segmentor.backbone")
    assert knet.default_by_preset == mask_rcnn.default_by_preset == {"nano": "resnet18"}


@pytest.mark.parametrize(
    ("name", "may_change"),
    [("train.steps", False), ("train.log_every", True), ("run.max_failures", True), ("method.alpha", False)],
)
def test_what_a_resumed_run_accepts(name, may_change):
    assert one(name).may_change is may_change


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"train\.stepz: no such setting or section; did you mean 'train\.steps'\?"):
        describe("train.stepz")
