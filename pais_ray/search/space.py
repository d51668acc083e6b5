"""The search space: parses `--over method.tau_cls=0.35,0.5` to domains and checks them against the Config."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pais_ray.config.overlays import ConfigError, Tree, parse, resolve
from pais_ray.config.tree import Config, build
from pais_ray.modeling.registry import did_you_mean

Params = dict[str, Any]  # dotted name -> value
DIGITS = 6  # significant digits of a drawn number: short in tables, and finer than any setting needs
KINDS = ("uniform", "loguniform", "randint", "choice")
NOT_SEARCHABLE = {  # settings that all trials share: dotted name, or its prefix -> reason
    "run.": "each trial has its own name and folder",
    "tracking.": "all trials are tracked in one place",
    "scaling.": "the cluster is divided evenly among trials",
    "train.steps": "trials are compared at the same steps; set it for all, or use --steps",
    "train.stop_at": "trials are compared at the same steps",
    "train.eval_every": "trials are compared at the same steps",
    "train.seed": "use --seeds",
}


@dataclass(frozen=True)
class Choice:
    """One of several values of any type."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"choice({', '.join(json.dumps(v) for v in self.values)})"

    def corners(self) -> tuple[Any, ...]:
        """All values, for checks before the start."""
        return self.values

    def draw(self, random: np.random.Generator) -> Any:
        """A random value."""
        return self.values[int(random.integers(len(self.values)))]

    def __contains__(self, value: Any) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``kind`` is uniform, loguniform or randint."""

    kind: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind}({self.low:g}, {self.high:g})"

    def corners(self) -> tuple[float, ...]:
        """Both ends and, unless only integers are drawn, a fraction: an integer setting must refuse it."""
        if self.kind == "randint":
            return int(self.low), int(self.high)
        return self.low, self.low + (self.high - self.low) / math.e, self.high

    def draw(self, random: np.random.Generator) -> float:
        """A random number."""
        if self.kind == "randint":
            return int(random.integers(int(self.low), int(self.high), endpoint=True))
        if self.kind == "loguniform":
            return self.rounded(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return self.rounded(random.uniform(self.low, self.high))

    def rounded(self, value: float) -> float:
        """``value`` with DIGITS significant digits, within the range."""
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


Domain = Choice | Range
Space = dict[str, Domain]


def read_space(section: Tree, over: Sequence[str]) -> Space:
    """The domains of a config's section ``search:``, overridden by `PATH=VALUES` texts. Raises ConfigError."""
    texts: dict[str, Any] = dict(_leaves(section))
    for text in over:
        path, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise ConfigError(f"--over {text}: expected PATH=VALUES, as in method.tau_cls=0.35,0.5,0.65")
        texts[path] = values if _call(values) else _parsed(f"[{values}]", path)
    if not texts:
        raise ConfigError("nothing to search over; use --over PATH=VALUES, or a config name such as search_pais")
    for path in texts:
        for start, reason in NOT_SEARCHABLE.items():
            if path == start or (start[-1] == "." and path.startswith(start)):
                raise ConfigError(f"--over {path}: cannot be searched over: {reason}")
    return {path: _domain(path, value) for path, value in texts.items()}


def check_space(words: Sequence[str], space: Space) -> None:
    """Raises ConfigError unless each corner of each domain, by itself, is valid with ``words``."""
    for path, domain in space.items():
        for value in domain.corners():
            try:
                compose_with(words, {path: value})
            except ConfigError as error:
                raise ConfigError(f"--over {path}={domain}: {error}") from error


def compose_with(words: Sequence[str], params: Mapping[str, Any]) -> Config:
    """The Config of ``words``, overridden by ``params``. Raises ConfigError."""
    tree = resolve([*words, *(f"{path}={json.dumps(value)}" for path, value in params.items())])
    tree.pop("search", None)
    return build(tree)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Dotted name -> its last part, or the whole name if last parts are equal."""
    last = [path.rpartition(".")[2] for path in paths]
    return {path: name if last.count(name) == 1 else path for path, name in zip(paths, last, strict=True)}


def _domain(path: str, value: Any) -> Domain:
    call = _call(value) if isinstance(value, str) else None
    if call is None:
        values = value if isinstance(value, list) else [value]
        return Choice(_distinct(path, values))
    kind, inside = call.groups()
    arguments = _parsed(f"[{inside}]", path)
    if kind not in KINDS:
        raise ConfigError(
            f"--over {path}: no such domain {kind}(...){did_you_mean(kind, KINDS)} (choose from {', '.join(KINDS)})"
        )
    if kind == "choice":
        return Choice(_distinct(path, arguments))
    numbers = len(arguments) == 2 and all(isinstance(a, int | float) and not isinstance(a, bool) for a in arguments)
    whole = kind != "randint" or all(isinstance(a, int) for a in arguments)
    if not numbers or not whole or not arguments[0] < arguments[1] or (kind == "loguniform" and arguments[0] <= 0):
        what = {"randint": "two ascending integers", "loguniform": "two ascending numbers above 0"}
        raise ConfigError(f"--over {path}: {kind} takes {what.get(kind, 'two ascending numbers')}, got ({inside})")
    return Range(kind, *arguments)


def _distinct(path: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if not values or any(v in values[:i] for i, v in enumerate(values)):
        raise ConfigError(f"--over {path}: expected different values, got {json.dumps(values)}")
    return tuple(values)


def _call(text: str) -> re.Match[str] | None:
    return re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text)


def _parsed(text: str, path: str) -> Any:
    try:
        return parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--over {path}: expected values a,b,c or one of {', '.join(KINDS)}, got {text}") from error


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:  # null removes a setting of an earlier config
            yield f"{prefix}{key}", value
