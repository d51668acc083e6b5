"""Descriptions of every setting, read from the typed sections: for `pais-ray show --describe` and the reference."""

import json
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pais_ray.config.overlays import ConfigError
from pais_ray.config.renamed import explain_unknown
from pais_ray.config.tree import Config
from pais_ray.modeling import registry
from pais_ray.modeling.registry import did_you_mean

SCALARS = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = {Ge: ("at least", "ge"), Gt: ("greater than", "gt"), Le: ("at most", "le"), Lt: ("less than", "lt")}


@dataclass(frozen=True, kw_only=True)
class FieldDescription:
    """One setting as people read it."""

    name: str  # dotted: train.steps
    plugin: str | None  # the segmentor or method that has this setting, None for the other sections
    description: str  # full sentences: meaning, unit, source of the default
    type: str  # "integer, at least 1, or null"
    default: str  # as YAML text
    default_by_preset: dict[str, str] = field(default_factory=dict)  # only the presets with another value
    choices: tuple[str, ...] = ()  # the allowed values, if they are a fixed list
    may_change: bool = False  # whether a resumed run accepts another value

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    def to_text(self) -> str:
        """The setting as a paragraph for a terminal."""
        owner = "" if self.plugin is None else f" ({self.section} {self.plugin})"
        presets = "".join(f"; preset {name}: {value}" for name, value in self.default_by_preset.items())
        lines = [
            *textwrap.wrap(self.description, 96),
            f"Type: {self.type}",
            f"Default value: {self.default}{presets}",
            f"On resume: {'may change' if self.may_change else 'must stay the same (unless --force is given)'}",
        ]
        return "\n".join([f"{self.name}{owner}", *(f"    {line}" for line in lines)])


def section_descriptions() -> dict[str, str]:
    """Section name -> its description, in the order of a config file."""
    return {name: info.description or "" for name, info in Config.model_fields.items()}


def all_settings() -> list[FieldDescription]:
    """Every setting of every section, of every segmentor and of every method, in the order of a config file.

    ``segmentor.*`` and ``method.*`` list one plugin after the other, so a name can occur several times."""
    return [setting for section in Config.model_fields for setting in _section(section)]


def describe(dotted: str) -> list[FieldDescription]:
    """The settings called ``dotted``, or below it if it names a section; several if plugins share the name.

    Raises ConfigError with the nearest name if there is no such setting or section."""
    settings = all_settings()
    found = [s for s in settings if s.name == dotted or s.name.startswith(f"{dotted}.")]
    if not found:
        hint = explain_unknown(dotted)
        if hint is not None:
            raise ConfigError(hint)
        names = [*Config.model_fields, *dict.fromkeys(s.name for s in settings)]
        raise ConfigError(
            f"{dotted}: no such setting or section{did_you_mean(dotted, names)} "
            f"(the sections are {', '.join(Config.model_fields)})"
        )
    return found


def _section(name: str) -> Iterator[FieldDescription]:
    info = Config.model_fields[name]
    if name == "segmentor":
        for plugin in registry.segmentor_names():
            yield from _settings(registry.segmentor(plugin).Config, name, plugin, False)
    elif name == "method":
        for plugin in registry.method_names():
            yield from _settings(registry.method(plugin), name, plugin, False)
    else:
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, BaseModel)
        yield from _settings(info.annotation, name, None, _is_free(info))


def _settings(model: type[BaseModel], prefix: str, plugin: str | None, free: bool) -> Iterator[FieldDescription]:
    """The settings of one section; its presets are compared by building the section with each of them."""
    section = model()
    preset = model.model_fields.get("preset")
    names = get_args(preset.annotation) if preset is not None else ()
    by_preset = {name: model.model_validate({"preset": name}) for name in names}
    yield from _leaves(section, by_preset, prefix, plugin, free)


def _leaves(
    section: BaseModel, by_preset: dict[str, Any], prefix: str, plugin: str | None, free: bool
) -> Iterator[FieldDescription]:
    for key, info in type(section).model_fields.items():
        name, value = f"{prefix}.{key}", getattr(section, key)
        values = {preset: getattr(other, key) for preset, other in by_preset.items()}
        if isinstance(value, BaseModel):
            yield from _leaves(value, values, name, plugin, free or _is_free(info))
            continue
        differing = {preset: _text(other) for preset, other in values.items() if other != value}
        yield FieldDescription(
            name=name,
            plugin=plugin,
            description=info.description or "",
            type=_type_text(info),
            default=_text(value),
            default_by_preset={} if key == "preset" else differing,
            choices=_choices(info.annotation),
            may_change=free or _is_free(info),
        )


def _is_free(info: FieldInfo) -> bool:
    return isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("role") == "free"


def _text(value: Any) -> str:
    """A value as YAML accepts it on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type_text(info: FieldInfo) -> str:
    """The type in words, with its bounds: "integer, at least 1, or null"."""
    found = _alternatives(info.annotation)
    parts = [" or ".join(_annotation(a) for a in found if a is not type(None))]
    parts += [f"{BOUNDS[type(m)][0]} {getattr(m, BOUNDS[type(m)][1])}" for m in info.metadata if type(m) in BOUNDS]
    parts += ["not empty" for m in info.metadata if isinstance(m, MinLen)]
    text = ", ".join(parts)
    if type(None) in found:
        text += ", or null" if len(parts) > 1 else " or null"
    return text


def _annotation(annotation: Any) -> str:
    if annotation in SCALARS:
        return SCALARS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(_text(a) for a in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_plural(_annotation(arguments[0]))}"
    if origin is tuple:
        return f"list of {len(arguments)} {_plural(_annotation(arguments[0]))}"
    if origin is dict:
        return f"mapping from names to {_plural(_annotation(arguments[1]))}"
    raise TypeError(f"describe: no wording for settings of type {annotation}; add one to _annotation")


def _plural(text: str) -> str:
    noun, _, rest = text.partition(" ")
    return f"{noun}s {rest}".rstrip()


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _choices(annotation: Any) -> tuple[str, ...]:
    found = [a for a in _alternatives(annotation) if get_origin(a) is Literal]
    return tuple(_text(choice) for literal in found for choice in get_args(literal))
