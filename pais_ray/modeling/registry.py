"""Find a segmentor or a method by name. The folders are the registry: a new method is a new file with one class.

torch is not imported before a class is loaded.
"""

import difflib
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pais_ray.modeling.protocols import Segmentor

HERE = Path(__file__).parent
MARKS = {"segmentor": "Config", "method": "pseudo_labels"}  # an attribute that only classes of that kind define


def segmentor_names() -> list[str]:
    """The names of the built-in segmentors: the files of the folder."""
    return _names("segmentors")


def method_names() -> list[str]:
    """The names of the built-in methods: the files of the folder."""
    return _names("methods")


def segmentor(name: str) -> "type[Segmentor]":
    """The segmentor class called ``name``; its ``Config`` is the pydantic model of the section `segmentor:`.

    ``name`` is a file of pais_ray/modeling/segmentors or a dotted module path. Raises ValueError for any other."""
    return cast("type[Segmentor]", _load("segmentor", name))


def method(name: str) -> "type[BaseModel]":
    """The method class called ``name``: a pydantic model of the section `method:` that follows `protocols.Method`.

    ``name`` is a file of pais_ray/modeling/methods or a dotted module path. Raises ValueError for any other."""
    return cast("type[BaseModel]", _load("method", name))


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """``; did you mean 'alpha'?`` with the most similar of ``names``, or an empty string if none is similar."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _names(folder: str) -> list[str]:
    return sorted(p.stem for p in (HERE / folder).glob("[!_]*.py"))


def _load(kind: str, name: str) -> type:
    names = _names(f"{kind}s")
    if name not in names and "." not in name:
        raise ValueError(
            f"{kind}.name: no {kind} is called {name!r}{did_you_mean(name, names)} (available: {', '.join(names)})"
        )
    path = f"pais_ray.modeling.{kind}s.{name}" if name in names else name
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not path.startswith(error.name or path):  # an import inside the module failed
            raise
        raise ValueError(
            f"{kind}.name: no module {name!r} to import; put it on PYTHONPATH, or use one of {', '.join(names)}"
        ) from error
    return _only_class(kind, module)


def _only_class(kind: str, module: ModuleType) -> type:
    own = [c for n, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__ and n[0] != "_"]
    found = [c for c in own if MARKS[kind] in vars(c)]
    if len(found) != 1:
        raise ValueError(
            f"{kind}.name: expected {module.__name__} to define one public class with `{MARKS[kind]}`, "
            f"it defines {', '.join(c.__name__ for c in found) or 'none'}"
        )
    return found[0]
