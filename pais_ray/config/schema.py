"""A JSON schema of config files, for the completion and the checks of an editor."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pais_ray.config.overlays import BASE, PER_SEGMENTOR
from pais_ray.config.tree import Config
from pais_ray.modeling import registry


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file.

    `segmentor` and `method` accept the settings of any plugin of the package."""
    plugins: dict[str, list[type[BaseModel]]] = {
        "segmentor": [registry.segmentor(name).Config for name in registry.segmentor_names()],
        "method": [registry.method(name) for name in registry.method_names()],
    }
    sections = {n: f.annotation for n, f in Config.model_fields.items() if n not in plugins}
    models = {n: a for n, a in sections.items() if isinstance(a, type) and issubclass(a, BaseModel)}
    every = [*models.values(), *(model for choices in plugins.values() for model in choices)]
    refs, schema = models_json_schema([(model, "validation") for model in every])
    properties = {
        name: {"anyOf": [refs[(model, "validation")] for model in plugins[name]]}
        if name in plugins
        else refs[(models[name], "validation")]
        for name in Config.model_fields
    }
    properties["search"] = {"type": "object", "description": "Ranges for `pais-ray tune`, by section and setting."}
    block = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    properties[PER_SEGMENTOR] = {
        "type": "object",
        "description": "Settings that apply only with the named segmentor.",
        "additionalProperties": block,
    }
    properties[BASE] = {"type": "string", "description": "Name of the config file to merge before this one."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pais_ray config file",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": schema["$defs"],
    }
