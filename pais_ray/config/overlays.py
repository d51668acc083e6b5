"""Words -> one tree of settings, merged but not yet typed. Overlays are one deep: files, then `a.b=value`.

Torch-free.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pais_ray.data.sources.discover import detect
from pais_ray.modeling.registry import did_you_mean

Tree = dict[str, Any]
PER_SEGMENTOR = "per_segmentor"
DATA = "data="  # a folder to look into, in the place of settings
# With data=FOLDER and without words that name others: the paper's method with its faster segmentor.
DEFAULTS = {"segmentor": "mask_rcnn", "method": "pais"}


class ConfigError(ValueError):
    """Wrong settings, in one line: where, what was expected, what came, the nearest valid choice."""


def config_dirs() -> list[Path]:
    """Where words are looked up: `configs/` of the checkout, or of the installed package."""
    here = Path(__file__).parents[1]
    return [d for d in (here.parent / "configs", here / "configs") if d.is_dir()]


class ResolvedWords(NamedTuple):
    """Words without data=FOLDER, and what to tell people of it."""

    words: list[str]
    found: list[str]  # lines on the data
    chosen: list[str]  # a line on segmentor and method, where they are the DEFAULTS


def expand_words(words: Sequence[str], search: Sequence[Path] | None = None) -> ResolvedWords:
    """``words`` with data=FOLDER replaced by the settings that it stands for. What other words say of data wins,
    wherever they stand. Raises ConfigError, and DataError where the folder is not recognized."""
    sources = [word.removeprefix(DATA) for word in words if word.startswith(DATA)]
    rest = [word for word in words if not word.startswith(DATA)]
    if not sources:
        return ResolvedWords(rest, [], [])
    if len(sources) > 1:
        raise ConfigError(f"data: expected one folder, got {', '.join(sources)}; name parts as data.train and so on")
    folders = config_dirs() if search is None else list(search)
    said: Tree = {}
    for word in rest:
        if "=" in word:
            _merge(said, _override(word))
    found = detect(sources[0], said.get("data", {}))
    trees = [said, *(_read(word, folders) for word in rest if "=" not in word)]
    missing = [name for section, name in DEFAULTS.items() if not any(_name_of(tree, section) for tree in trees)]
    settings = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in found.settings.items()]
    chosen = [f"no other words, so these: {' '.join(missing)}"] if missing else []
    return ResolvedWords([*missing, *settings, *rest], found.lines, chosen)


def resolve(words: Sequence[str], search: Sequence[Path] | None = None) -> Tree:
    """The settings that ``words`` spell, merged but not yet typed. Raises ConfigError, see also ``spell_out``."""
    folders = config_dirs() if search is None else list(search)
    words = expand_words(words, folders).words
    overrides = [w for w in words if "=" in w]
    files = [(w, _read(w, folders)) for w in words if "=" not in w]
    last: Tree = {}
    for word in overrides:
        _merge(last, _override(word))
    names = [_name_of(tree, "segmentor") for tree in [*(t for _, t in files), last]]
    chosen = next((n for n in reversed(names) if n is not None), None)
    merged: Tree = {}
    for word, tree in files:
        blocks = tree.pop(PER_SEGMENTOR, None)
        _overlay(merged, tree)
        if blocks is not None:
            _overlay(merged, _block(word, blocks, chosen))
    return _overlay(merged, last)


def _read(word: str, folders: Sequence[Path]) -> Tree:
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        found = [f / f"{word}.yaml" for f in folders if (f / f"{word}.yaml").is_file()]
        if not found:
            names = sorted({p.stem for f in folders for p in f.glob("*.yaml")})
            raise ConfigError(
                f"{word}: no such config{did_you_mean(word, names)} (there are: {', '.join(names)}; "
                "or a path to a .yaml, or section.setting=value)"
            )
        path = found[0]
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{word}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected sections with settings, got {type(tree).__name__}")
    return tree or {}


def _override(word: str) -> Tree:
    """`a.b=value` as a tree."""
    dotted, _, text = word.partition("=")
    keys = dotted.split(".")
    if len(keys) < 2 or not all(keys):
        raise ConfigError(f"{word}: expected section.setting=value, as in train.steps=100")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{dotted}: expected a YAML value, got {text!r}; quote it") from error
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    result: Tree = tree
    return result


def _block(word: str, blocks: Any, segmentor: str | None) -> Tree:
    """What a file says for the chosen segmentor."""
    if not isinstance(blocks, dict):
        raise ConfigError(f"{word}: {PER_SEGMENTOR}: expected one block a segmentor, got {blocks!r}")
    if segmentor is None:
        raise ConfigError(
            f"segmentor.name: none chosen, and {word} differs by segmentor; add one of {', '.join(blocks)} as a word"
        )
    if segmentor not in blocks:
        raise ConfigError(
            f"{word}: no published constants for segmentor {segmentor!r}, only for {', '.join(blocks)}; "
            f"write a .yaml of your own with its method and optim.reference"
        )
    return blocks[segmentor] or {}


def _name_of(tree: Tree, section: str) -> str | None:
    part = tree.get(section)
    return part.get("name") if isinstance(part, dict) else None


def _overlay(base: Tree, top: Tree) -> Tree:
    """Merges one overlay into ``base``. Another plugin, or another preset, starts its section anew: what was
    said of the old one does not fit it."""
    for section, new in top.items():
        old = base.get(section)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            continue
        if "name" in new and section in ("segmentor", "method") and old.get("name", new["name"]) != new["name"]:
            base[section] = {}
        elif "preset" in new and old.get("preset", new["preset"]) != new["preset"]:
            base[section] = {k: v for k, v in old.items() if k == "name"}
    return _merge(base, top)


def _merge(base: Tree, top: Tree) -> Tree:
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


# YAML 1.2's core scalars (tag, pattern, first characters): `1e-4` is a number; `no`, `010`, dates are text.
CORE_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


def _core_scalars(kind: Any) -> Any:
    for tag, pattern, first in CORE_SCALARS:
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^({pattern})$"), first)
    return kind


def parse(text: str) -> Any:
    """What YAML ``text`` says: plain values only, numbers as YAML 1.2 reads them."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@_core_scalars
class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Tree = {}  # noqa: RUF012 - PyYAML declares it so

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


@_core_scalars
class Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: Tree = {}  # noqa: RUF012 - PyYAML declares it so

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)  # lists here are short: one line each
