"""The settings that define a run, as opposed to those that may change when it resumes."""

import json
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

Scalar = str | int | float | bool | None


def flatten(config: BaseModel) -> dict[str, Scalar]:
    """Dotted name -> value of every setting; lists as JSON text."""
    return dict(_leaves(config.model_dump(mode="json")))


def identity(config: BaseModel) -> dict[str, Scalar]:
    """Dotted name -> value of the settings that define the run."""
    return {name: value for name, value in flatten(config).items() if not _is_free(config, name)}


def changed_identity(old: BaseModel, new: BaseModel) -> list[str]:
    """Dotted names of the settings that define the run and differ between ``old`` and ``new``."""
    before, after = flatten(old), flatten(new)
    names = [n for n in {**before, **after} if n not in before or n not in after or before[n] != after[n]]
    return [n for n in names if not (_is_free(new, n) or _is_free(old, n))]


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", json.dumps(value)
        else:
            assert isinstance(value, Scalar)
            yield f"{prefix}{key}", value


def _is_free(config: BaseModel, dotted: str) -> bool:
    """Whether a resumed run may change the setting, because it or a section around it is marked as free."""
    value: object = config
    for part in dotted.split("."):
        field = type(value).model_fields.get(part) if isinstance(value, BaseModel) else None
        if field is None:
            return False
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("role") == "free":
            return True
        value = getattr(value, part)
    return False
