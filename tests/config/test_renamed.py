"""Settings that were renamed: refused by their new name in commands and files, translated in recorded runs."""

from pathlib import Path

import pytest
import yaml

from pais_ray.config.describe import all_settings, describe
from pais_ray.config.identity import changed_identity
from pais_ray.config.overlays import ConfigError
from pais_ray.config.renamed import RENAMED
from pais_ray.config.tree import Config, compose, dump, load

WORDS = ["quickstart", "batch.accumulation_steps=2", "method.normalizer=pos", "views.strong.color_level=[2, 3]"]
OLD_VALUES = {
    "batch.accumulation": 2,
    "method.normaliser": "pos",
    "views.strong.colour_level": [2, 3],
}


def set_at(tree: dict, dotted: str, value: object) -> None:
    *path, key = dotted.split(".")
    for part in path:
        tree = tree[part]
    tree[key] = value


def recorded_by_an_earlier_version(config: Config) -> dict:
    """The file of ``config`` with every renamed setting under its old name."""
    tree = yaml.safe_load(dump(config))
    for old, new in RENAMED.items():
        *path, key = new.split(".")
        parent = tree
        for part in path:
            parent = parent[part]
        set_at(tree, old, parent.pop(key))
    return tree


def test_the_table_leads_to_settings_that_exist():
    names = {setting.name for setting in all_settings()}
    assert set(RENAMED.values()) <= names
    assert not set(RENAMED) & names


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_override_with_an_old_name_is_refused_with_the_new_one(old):
    with pytest.raises(ConfigError) as caught:
        compose(["quickstart", f"{old}=1"])
    assert str(caught.value) == f"{old} was renamed to {RENAMED[old]}"
    with pytest.raises(ConfigError, match="was renamed to"):
        describe(old)


def test_a_file_with_an_old_name_is_refused_with_the_new_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("batch: {accumulation: 2}")
    with pytest.raises(ConfigError, match=r"^batch\.accumulation was renamed to batch\.accumulation_steps$"):
        compose(["quickstart", str(path)])


def test_the_file_of_an_earlier_run_loads_under_the_new_names(tmp_path):
    config = compose(WORDS)
    old = recorded_by_an_earlier_version(config)
    for name, value in OLD_VALUES.items():
        section, key = name.split(".")[0], name.split(".")[-1]
        assert (old[section]["strong"] if section == "views" else old[section])[key] == value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(old))
    assert load(path) == config


def test_a_method_outside_the_package_keeps_its_own_setting_of_an_old_name(tmp_path, monkeypatch):
    (tmp_path / "spelled_otherwise.py").write_text(
        "from typing import Literal\n"
        "from pais_ray.modeling.methods.pais import PAIS\n"
        "class Mine(PAIS):\n"
        "    name: Literal['spelled_otherwise.mine'] = 'spelled_otherwise.mine'\n"
        "    normaliser: str = 'own'\n"
        "    def pseudo_labels(self, predictions):\n"
        "        return super().pseudo_labels(predictions)\n"
    )
    package = tmp_path / "package" / "spelled_otherwise"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "spelled_otherwise.py").rename(package / "mine.py")
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    config = compose(["coco", "mask_rcnn", "method.name=spelled_otherwise.mine", "method.normaliser=other"])
    path = Path(tmp_path / "config.yaml")
    path.write_text(dump(config))
    assert load(path).method.normaliser == "other"


def test_the_run_of_version_0_1_has_the_settings_of_its_command():
    run = Path(__file__).resolve().parents[1] / "fixtures" / "run_0_1"
    names = ["segmentor.name=tests.support.small_segmentor", "method.name=pais", "run.name=run_0_1"]
    data = ["train=data/train.json", "val=data/val.json", "images=data/images", "image_size=64", "labeled=0.25"]
    train = ["steps=8", "stop_at=6", "eval_every=4", "checkpoint_every=4", "log_every=1", "threads_per_worker=2"]
    config = compose(
        [
            *names,
            *(f"data.{word}" for word in data),
            *(f"train.{word}" for word in train),
            *("method.tau_cls=0.1", "method.tau_iou=0", "method.burn_in=2", "optim.lr=0.005"),
            *("batch.unlabeled=1", "batch.accumulation_steps=2", "tracking.enabled=false"),
        ]
    )
    assert load(run / "config.yaml") == config
    assert changed_identity(load(run / "config.yaml"), config) == []
