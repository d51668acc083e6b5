"""Settings that were renamed: the one table behind error messages and behind reading runs of earlier versions."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

VIEWS = ("labeled", "weak", "strong", "test")
RENAMED: dict[str, str] = {  # old name -> new name, both dotted
    "batch.accumulation": "batch.accumulation_steps",
    "guards.evaluate_s": "guards.evaluate_timeout_s",
    "guards.first_batch_s": "guards.first_batch_timeout_s",
    "guards.kept_high": "guards.max_kept_per_image",
    "guards.kept_low": "guards.min_kept_per_image",
    "guards.kept_steps": "guards.kept_alarm_steps",
    "guards.save_s": "guards.save_timeout_s",
    "guards.step_s": "guards.step_timeout_s",
    "method.normaliser": "method.normalizer",
    "tracking.system_every": "tracking.system_metrics_interval_s",
    "train.max_skipped": "train.max_consecutive_skips",
    **{f"views.{view}.colour": f"views.{view}.color" for view in VIEWS},
    **{f"views.{view}.colour_level": f"views.{view}.color_level" for view in VIEWS},
}
HINTS = {"views.image_size": "views.image_size: set data.image_size instead, which scales all views"}


def explain_unknown(dotted: str) -> str | None:
    """The message for a setting ``dotted`` that does not exist, if its replacement is known."""
    return f"{dotted} was renamed to {RENAMED[dotted]}" if dotted in RENAMED else HINTS.get(dotted)


def present_name(dotted: str, known: Collection[str]) -> str:
    """The present name of a setting that an earlier version recorded as ``dotted``; a name in ``known`` is kept."""
    return dotted if dotted in known else RENAMED.get(dotted, dotted)


def translate(tree: dict[str, Any], models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The settings ``tree`` of an earlier version under their present names.

    ``models`` has the model of each section. A plugin that has a setting by the old name keeps it."""
    result = tree
    for old, new in RENAMED.items():
        section, *path = old.split(".")
        if section in models and not _has_field(models[section], path):
            result = _moved(result, old.split("."), new.rpartition(".")[2])
    return result


def _has_field(model: type[BaseModel], path: list[str]) -> bool:
    if path[0] not in model.model_fields:
        return False
    inner = model.model_fields[path[0]].annotation
    return len(path) == 1 or (isinstance(inner, type) and issubclass(inner, BaseModel) and _has_field(inner, path[1:]))


def _moved(tree: dict[str, Any], path: list[str], name: str) -> dict[str, Any]:
    """A copy of ``tree`` in which the key at the end of ``path``, if it exists, is called ``name``."""
    key = path[0]
    if key not in tree:
        return tree
    if len(path) == 1:
        return {name if k == key else k: v for k, v in tree.items()}
    return {**tree, key: _moved(tree[key], path[1:], name)} if isinstance(tree[key], dict) else tree
