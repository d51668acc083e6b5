"""Words are composed to a Config and written back: precedence, published constants, error messages, the round trip."""

import pickle
import textwrap
from pathlib import Path

import pytest
import yaml

from pais_ray.config.identity import changed_identity, flatten
from pais_ray.config.overlays import ConfigError, config_dirs, resolve
from pais_ray.config.tree import compose, dump, load, run_schedule
from pais_ray.modeling import registry
from tests.support.paper import PAPER

FILES = {p.stem: p for d in config_dirs() for p in d.glob("*.yaml") if not p.stem.startswith("search_")}
METHODS = ["supervised", "supervised_plain", "pais", "pais_wo_daloss", "pais_released", "pais_released_10"]
RUNS = [
    *[("coco", "mask_rcnn", m) for m in METHODS],
    *[("coco", "knet", m) for m in METHODS if m != "pais_released_10"],  # for Mask R-CNN only
    ("synthetic", "knet", "pais"),
    ("cityscapes", "mask_rcnn", "pais"),
    ("cityscapes", "mask_rcnn", "pais_released_cityscapes"),
    ("synthetic", "mask_rcnn", "pais"),
    ("quickstart",),
    ("quickstart", "supervised"),
    ("coco", "mask_rcnn", "pais", "one_gpu"),
    ("coco", "mask_rcnn", "pais", "four_gpus"),
]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def error(*words, search=None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words, search)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the files ---


@pytest.mark.parametrize("words", RUNS, ids="-".join)
def test_a_config_equals_what_is_loaded_from_its_dump(words, tmp_path):
    config = compose(words)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert dump(load(path)) == dump(config)
    assert changed_identity(config, load(path)) == []
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_file_of_configs_is_composed_in_some_run():
    assert {w for run in RUNS for w in run} == set(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_starts_with_its_command_and_source(name):
    head = FILES[name].read_text().split("\n\n")[0]
    assert f" {name}" in next(line for line in head.splitlines() if line.startswith("#   pais-ray train"))
    assert "# Source: " in head


@pytest.mark.parametrize("segmentor", list(PAPER))
def test_pais_has_the_constants_of_the_paper(segmentor):
    settings = flatten(compose(["coco", segmentor, "pais"]))
    assert {name: settings.get(name) for name in PAPER[segmentor]} == PAPER[segmentor]


def test_without_daloss_only_the_exponents_differ():
    ours, without = (
        flatten(compose(["coco", "mask_rcnn", "pais"])),
        flatten(compose(["coco", "mask_rcnn", "pais_wo_daloss"])),
    )
    assert {k for k in ours if ours[k] != without[k]} == {"method.alpha", "method.beta"}
    assert (without["method.alpha"], without["method.beta"]) == (0, 0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("coco", "mask_rcnn", "pais_released"), (0.5, 0.6, 0.01, 180_000, 1, 3)),
        (("coco", "mask_rcnn", "pais_released_10"), (0.7, 1.5, 0.02, 90_000, 2, 2)),
        (("cityscapes", "mask_rcnn", "pais_released_cityscapes"), (0.8, 1.0, 0.01, 27_000, 1, 3)),
    ],
)
def test_constants_of_the_released_mask_rcnn(words, expected):
    config = compose(words)
    method, reference, batch = config.method, config.optim.reference, config.batch
    assert expected == (
        method.tau_cls, method.lambda_unlabeled, reference.lr, reference.steps, batch.labeled, batch.unlabeled
    )  # fmt: skip
    assert (method.tau_iou, method.alpha, method.beta, method.mask_scale) == (0, 0, 4, 2.5)


def test_constants_of_the_released_knet():
    config = compose(["coco", "knet", "pais_released"])
    method = config.method
    assert (method.class_scale, method.class_cap, method.mask_scale) == (12, 0.5, 2.5)
    assert (method.negative_weight, method.normalizer, method.lambda_unlabeled) == (0.1225, "pos", 1.0)
    assert (config.batch.labeled, config.batch.unlabeled, config.views.preset) == (1, 2, "coco_knet")


def test_the_baseline_without_dagger_has_plain_views():
    assert compose(["coco", "mask_rcnn", "supervised"]).views.labeled.color
    plain = compose(["coco", "mask_rcnn", "supervised_plain"])
    assert not plain.views.labeled.color
    assert plain.views.labeled.short_side == (800, 800)


@pytest.mark.parametrize(
    ("words", "lr", "steps"),
    [
        (("coco", "mask_rcnn", "pais"), 0.0025, 880_000),
        (("coco", "mask_rcnn", "pais", "one_gpu"), 0.01, 220_000),
        (("coco", "mask_rcnn", "pais", "four_gpus"), 0.01, 220_000),
        (("coco", "mask_rcnn", "supervised", "four_gpus"), 0.01, 180_000),
        (("coco", "mask_rcnn", "pais", "train.steps=20"), 0.0025, 20),
    ],
)
def test_the_schedule_is_scaled_to_the_run(words, lr, steps):
    schedule = run_schedule(compose(words))
    assert (schedule.lr, schedule.steps) == (pytest.approx(lr), steps)


# --- composition ---


def test_later_files_take_precedence_and_overrides_over_all_files(tmp_path):
    write(
        tmp_path,
        "a",
        "segmentor: {name: mask_rcnn, preset: nano}\ntrain: {seed: 1, steps: 5}\nbatch: {labeled: 7}",
    )
    write(tmp_path, "b", "method: {name: supervised}\ntrain: {seed: 2}\nbatch: {unlabeled: 0}")
    config = compose(["train.steps=9", "a", "b"], [tmp_path])
    assert (config.train.seed, config.train.steps, config.batch.labeled) == (2, 9, 7)
    assert compose(["b", "a"], [tmp_path]).train.seed == 1


def test_a_path_of_a_yaml_file_is_a_word(tmp_path):
    path = write(tmp_path, "mine", "train: {seed: 5}")
    assert compose(["coco", "mask_rcnn", "pais", str(path)]).train.seed == 5


def test_per_segmentor_blocks_follow_their_file_whatever_word_chooses_the_segmentor(tmp_path):
    write(
        tmp_path,
        "first",
        "per_segmentor: {mask_rcnn: {train: {seed: 2}}, other: {train: {seed: 3}}}\ntrain: {seed: 1}",
    )
    write(tmp_path, "last", "segmentor: {name: mask_rcnn}\nmethod: {name: supervised}\nbatch: {unlabeled: 0}")
    assert compose(["first", "last"], [tmp_path]).train.seed == 2
    write(tmp_path, "between", "train: {seed: 4}")
    assert compose(["first", "between", "last"], [tmp_path]).train.seed == 4
    assert resolve(["first", "last", "segmentor.name=other"], [tmp_path])["train"]["seed"] == 3


def test_data_segmentor_and_method_may_come_in_any_order():
    assert compose(["pais", "mask_rcnn", "coco"]) == compose(["coco", "mask_rcnn", "pais"])


def test_another_method_resets_its_section():
    config = compose(["coco", "mask_rcnn", "pais", "supervised"])
    assert config.method == registry.method("supervised")()


def test_another_preset_over_a_dumped_config_resets_its_section(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(compose(["quickstart"])))
    config = compose([str(path), "segmentor.preset=r50", "views.preset=plain"])
    assert (config.segmentor.backbone, config.segmentor.fpn_channels) == ("resnet50", 256)
    assert not config.views.labeled.color


def test_another_preset_keeps_the_settings_given_with_it():
    words = ["quickstart", "segmentor.detections=50", "segmentor.preset=r50"]
    segmentor = compose(words).segmentor
    assert (segmentor.backbone, segmentor.detections) == ("resnet50", 50)


def test_a_base_is_merged_directly_before_its_file(tmp_path):
    write(tmp_path, "below", "train: {seed: 1, steps: 7}\nper_segmentor: {mask_rcnn: {train: {log_every: 3}}}")
    write(tmp_path, "above", "base: below\ntrain: {seed: 2}")
    write(tmp_path, "rest", "segmentor: {name: mask_rcnn}\nmethod: {name: supervised}\nbatch: {unlabeled: 0}")
    assert compose(["rest", "above"], [tmp_path]) == compose(["rest", "below", "train.seed=2"], [tmp_path])


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("nothing", "nothing: no such config"),
        ("[below]", "above: base: expected the name of a file in configs/, got ['below']"),
        ("below.yaml", "above: base: expected the name of a file in configs/, got 'below.yaml'"),
        ("above", "above: base: above has a base itself; name above or copy its settings"),
    ],
)
def test_an_invalid_base_is_reported_in_one_line(base, part, tmp_path):
    write(tmp_path, "above", f"base: {base}")
    assert part in error("above", search=[tmp_path])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2", 2.0),
        ("1_0", None),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_numbers_parse(text, value):
    words = ["coco", "mask_rcnn", "pais", f"optim.lr={text}"]
    if text == "1_0":
        assert resolve(words)["optim"]["lr"] == "1_0"
    else:
        assert compose(words).optim.lr == value


def test_files_follow_yaml_1_2(tmp_path):
    path = write(tmp_path, "mine", "optim: {lr: 1e-4}\nrun: {name: no}")
    config = compose(["coco", "mask_rcnn", "pais", str(path)])
    assert (config.optim.lr, config.run.name) == (1e-4, "no")


@pytest.mark.parametrize("name", ["no", "1e4", "010", "2026-01-01", "true-story", "=", "12", "null-model"])
def test_names_that_look_like_other_types_stay_text(name, tmp_path):
    config = compose(["quickstart", f"run.name='{name}'"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path).run.name == name


def test_lists_and_tables_as_overrides():
    config = compose(["quickstart", "optim.reference.milestones=[10, 20]", "method.labeled_weights.mask=2"])
    assert config.optim.reference.milestones == (10, 20)
    assert config.method.labeled_weights == {"mask": 2.0}


def test_image_size_reaches_the_views():
    config = compose(["coco", "mask_rcnn", "pais", "data.image_size=200"])
    assert config.scaled_views["test"].short_side == (200, 200)
    assert "image_size" not in yaml.safe_load(dump(config))["views"]


# --- errors ---


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method.alhpa=2"], ["method.alhpa: no such setting; did you mean 'alpha'?", "PAIS has", "tau_cls"]),
        (["segmentor.pre=nano"], ["segmentor.pre: no such setting; did you mean 'preset'?"]),
        (["optim.reference.milestone=[1]"], ["optim.reference.milestone: no such", "'milestones'"]),
        (["views.strong.flipp=1"], ["views.strong.flipp: no such setting; did you mean 'flip'?"]),
        (["trian.seed=1"], ["trian: no such section; did you mean 'train'?"]),
        (["train.steps=many"], ["train.steps:", "integer", "'many'"]),
        (["train.precision=bf61"], ["train.precision:", "'bf16'", "'bf61'", "did you mean 'bf16'?"]),
        (["data.labeled=1.5"], ["data.labeled:", "less than or equal to 1", "'1.5'"]),
        (["method.lambda_unlabeled=null"], ["method.lambda_unlabeled:", "number", "'None'"]),
        (["segmentor.name=mask_rnn"], ["no published constants for segmentor 'mask_rnn', only for mask_rc"]),
        (["method.name=piss"], ["method.name: no method is called 'piss'; did you mean 'pais'?"]),
        (["segmentor.weights=coco", "segmentor.norm=group"], ["segmentor.weights: 'coco' has batch norm"]),
        (["segmentor=mask_rcnn"], ["segmentor=mask_rcnn: expected section.setting=value"]),
        (["cocoo"], ["cocoo: no such config; did you mean 'coco'?", "mask_rcnn"]),
        (["nowhere/mine.yaml"], ["nowhere/mine.yaml: cannot be read"]),
        (["train.steps=[1"], ["train.steps: expected a YAML value, got '[1'"]),
        (["batch.unlabeled=0"], ["batch.unlabeled: pais learns from unlabeled images"]),
        (["data.labeled=1"], ["data.labeled: pais needs unlabeled images"]),
        (["views.image_size=200"], ["views.image_size: set data.image_size instead"]),
        (["data.val=null"], ["data.val: expected a COCO JSON because train is set", "data.holdout=0.2"]),
        (["data.holdout=0.2"], ["data.holdout: cannot be combined with val, got 0.2"]),
        (["data.train=null"], ["data.train: expected a COCO JSON because val is set"]),
        (["optim.reference.milestones=[9, 1]"], ["optim.reference.milestones: expected ascending"]),
        (["run.name=a/b"], ["run.name: expected letters"]),
        (["method.alpha=-1", "method.beta=-1"], ["method.alpha: ", "(and 1 more)"]),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(words, parts):
    message = error("coco", "mask_rcnn", "pais", *words)
    for part in parts:
        assert part in message


def test_supervised_refuses_unlabeled_images():
    message = error("coco", "mask_rcnn", "supervised", "batch.unlabeled=3")
    assert "batch.unlabeled: supervised uses none, got 3; set batch.unlabeled=0" in message


def test_an_unknown_segmentor_lists_the_known_ones():
    message = error("coco", "mask_rcnn", "method.name=pais", "segmentor.name=unet")
    assert message.startswith("segmentor.name: no segmentor is called 'unet'")
    assert "available: " + ", ".join(registry.segmentor_names()) in message


def test_a_missing_choice_lists_the_choices():
    assert "segmentor.name: none chosen, and the settings of pais depend on it" in error("coco", "pais")
    assert "method.name: none chosen; add one of pais, supervised" in error("coco", "mask_rcnn")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {seed: 1\n", "not valid YAML"),
        ("train: {seed: 1, seed: 2}\n", "duplicate key 'seed'"),
        ("- 1\n", "expected sections with settings, got list"),
        ("train: 3\n", "train: expected settings, got 3"),
        ("method: pais\n", "write method.name=pais"),
    ],
)
def test_broken_files_are_reported_in_one_line(text, part, tmp_path):
    assert part in error("coco", "mask_rcnn", "pais", str(write(tmp_path, "broken", text)))


# --- identity ---


@pytest.mark.parametrize(
    ("word", "identity"),
    [
        ("train.seed=7", True),
        ("method.alpha=3", True),
        ("segmentor.detections=50", True),
        ("optim.reference.steps=300000", True),
        ("batch.accumulation_steps=2", True),
        ("data.val_images=elsewhere", True),
        ("data.image_size=200", True),
        ("data.pseudo_labels=masks.json", True),
        ("views.strong.flip=0.1", True),
        ("train.steps=7", True),
        ("train.precision=bf16", True),
        ("method.unlabeled_weights.mask=0.5", True),
        ("train.stop_at=7", False),
        ("train.log_every=7", False),
        ("train.keep_checkpoints=7", False),
        ("scaling.num_workers=7", False),
        ("run.max_failures=7", False),
        ("tracking.experiment=other", False),
    ],
)
def test_identity_and_free_settings(word, identity):
    base, changed = compose(["coco", "mask_rcnn", "pais"]), compose(["coco", "mask_rcnn", "pais", word])
    assert flatten(base) != flatten(changed)
    expected = [word.split("=")[0]] if identity else []
    assert changed_identity(base, changed) == expected
    assert changed_identity(changed, base) == expected


def test_another_method_changes_the_identity():
    names = changed_identity(compose(["coco", "mask_rcnn", "pais"]), compose(["coco", "mask_rcnn", "supervised"]))
    assert {"method.name", "method.tau_cls", "batch.unlabeled"} <= set(names)


def test_flat_values_are_scalars():
    flat = flatten(compose(["coco", "mask_rcnn", "pais"]))
    assert all(isinstance(v, str | int | float | bool | None) for v in flat.values())
    assert flat["optim.reference.milestones"] == "[160000, 200000]"


# --- models ---


def test_config_is_immutable():
    config = compose(["quickstart"])
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


def test_plugin_names_are_the_files_of_their_folder():
    assert {"pais", "supervised"} <= set(registry.method_names())
    assert "mask_rcnn" in registry.segmentor_names()
    assert not any(n.startswith("_") for n in registry.segmentor_names() + registry.method_names())


def test_a_dotted_path_loads_a_method_from_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "my_method_for_test.py").write_text(
        "from typing import Literal\n"
        "from pais_ray.modeling.methods.pais import PAIS\n"
        "class Mine(PAIS):\n"
        "    name: Literal['my_pkg.my_method'] = 'my_pkg.my_method'\n"
        "    sharpness: float = 2.0\n"
        "    def pseudo_labels(self, predictions):\n"
        "        return super().pseudo_labels(predictions)\n"
    )
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "my_method_for_test.py").rename(package / "my_method.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose(["coco", "mask_rcnn", "method.name=my_pkg.my_method", "method.sharpness=3"])
    assert config.method.sharpness == 3.0
    assert "no module 'my_pkg.none'" in error("coco", "mask_rcnn", "method.name=my_pkg.none")
