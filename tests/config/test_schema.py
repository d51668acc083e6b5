"""The JSON schema of config files accepts the files of configs/ and refuses misspelled settings."""

import json

import jsonschema
import pytest
import yaml

from pais_ray.config.overlays import config_dirs, parse
from pais_ray.config.schema import json_schema
from pais_ray.config.tree import Config, compose, dump

FILES = sorted(path for folder in config_dirs() for path in folder.glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_is_valid(validator, path):
    validator.validate(parse(path.read_text()))


def test_the_recorded_settings_of_a_run_are_valid(validator):
    validator.validate(yaml.safe_load(dump(compose(["quickstart"]))))


@pytest.mark.parametrize(
    "tree",
    [
        {"trian": {}},
        {"train": {"stepz": 3}},
        {"train": {"steps": "many"}},
        {"method": {"name": "pais", "alhpa": 1}},
        {"segmentor": {"num_kernel": 1}},
        {"per_segmentor": {"knet": {"method": {"alhpa": 1}}}},
        {"base": ["pais"]},
    ],
    ids=str,
)
def test_mistakes_are_refused(validator, tree):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree)


def test_every_section_and_setting_has_its_description(validator):
    sections = validator.schema["properties"]
    assert set(sections) == {*Config.model_fields, "base", "per_segmentor", "search"}
    train = validator.schema["$defs"]["TrainConfig"]["properties"]
    assert all(setting["description"] for setting in train.values())
