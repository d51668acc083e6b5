"""Which settings make a run what it is, and which may change when it resumes."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pais_ray.config.overlays import Tree

Scalar = str | int | float | bool | None


def flatten(config: BaseModel) -> dict[str, Scalar]:
    """Dotted name -> value; lists as JSON text."""
    return dict(_leaves(config.model_dump(mode="json")))


def identity(config: BaseModel) -> dict[str, Scalar]:
    """Dotted name -> value of the settings that make a run what it is."""
    return {name: value for name, value in flatten(config).items() if not _is_free(config, name)}


def changed_identity(old: BaseModel, new: BaseModel) -> list[str]:
    """Dotted names of the settings that make a run what it is and differ."""
    before, after = flatten(old), flatten(new)
    names = [n for n in {**before, **after} if n not in before or n not in after or before[n] != after[n]]
    return [n for n in names if not (_is_free(new, n) or _is_free(old, n))]


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


def _is_free(config: BaseModel, dotted: str) -> bool:
    value: Any = config
    for part in dotted.split("."):
        field = type(value).model_fields.get(part) if isinstance(value, BaseModel) else None
        if field is None:
            return False
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("role") == "free":
            return True
        value = getattr(value, part)
    return False
