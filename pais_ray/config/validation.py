"""Typed models from plain settings, with one clear line for each mistake."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pais_ray.config.overlays import ConfigError
from pais_ray.config.renamed import explain_unknown
from pais_ray.modeling.registry import did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], settings: Mapping[str, object], section: str) -> Model:
    """The ``model`` of ``settings``. ``section`` is the dotted prefix of its fields in messages, empty for the root.

    Raises ConfigError with the first mistake and the number of further ones."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        further = error.error_count() - 1
        suffix = f" (and {further} more)" if further else ""
        raise ConfigError(_to_line(model, error.errors()[0], section) + suffix) from error


def list_choices(name: str, names: Sequence[str], owner: str) -> str:
    """The end of a message about an unknown ``name``: the nearest of ``names``, then all of them."""
    return f"{did_you_mean(name, names)} ({owner} has {', '.join(names)})"


def _to_line(model: type[BaseModel], error: ErrorDetails, section: str) -> str:
    """One error of pydantic as `place: what was expected; what was found`."""
    loc = [str(part) for part in error["loc"]]
    place = ".".join(part for part in [section, *loc] if part)
    if error["type"] == "extra_forbidden":
        owner = _model_at(model, loc[:-1])
        unknown = f"{place}: no such setting{list_choices(loc[-1], list(owner.model_fields), owner.__name__)}"
        return explain_unknown(place) or unknown
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # the message of a validator, which starts with the field if it checks several
        names_field = message.partition(":")[0].partition(".")[0] in _model_at(model, loc).model_fields
        return f"{place}.{message}" if place and names_field else f"{place}: {message}" if place else message
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = did_you_mean(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    return f"{place}: {message[:1].lower()}{message[1:]}; got {str(error['input'])[:80]!r}{hint}"


def _model_at(model: type[BaseModel], loc: Sequence[str]) -> type[BaseModel]:
    """The innermost model on the path ``loc`` below ``model``."""
    for part in loc:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return model
