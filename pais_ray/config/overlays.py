"""Config names and overrides -> one tree of settings, merged but not yet typed.

The command line is a list of words. A word is the name of a file in configs/, the path of a YAML file, an override
`section.setting=value`, or `data=FOLDER`. Files are merged from left to right, then overrides. A file may begin with
`base: NAME`: the file NAME of configs/ is then merged directly before it. A base has no base itself, so every value is
found in at most two files.

This module does not import torch.
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
BASE = "base"
PER_SEGMENTOR = "per_segmentor"
DATA_FOLDER = "data="  # prefix of the word that names a folder to inspect
# Chosen for data=FOLDER if no other word names a segmentor or a method: the paper's method, its faster segmentor.
DEFAULTS = {"segmentor": "mask_rcnn", "method": "pais"}


class ConfigError(ValueError):
    """Invalid settings, in one line: the place, what was expected, what was found, the nearest valid choice."""


class ResolvedWords(NamedTuple):
    """The words of a command without `data=FOLDER`, and messages about what it was replaced by."""

    words: list[str]
    found: list[str]  # one line per data set part
    chosen: list[str]  # one line if DEFAULTS were used


def config_dirs() -> list[Path]:
    """The folders that config names are looked up in: `configs/` of the checkout, or of the installed package."""
    package = Path(__file__).parents[1]
    return [d for d in (package.parent / "configs", package / "configs") if d.is_dir()]


def expand_words(words: Sequence[str], search: Sequence[Path] | None = None) -> ResolvedWords:
    """Replace `data=FOLDER` in ``words`` by the settings that the layout of the folder implies.

    Other words about `data:` take precedence, wherever they stand. Config names are looked up in ``search``, by default
    in config_dirs(). Raises ConfigError for more than one folder, and DataError if the layout is not recognized."""
    sources = [word.removeprefix(DATA_FOLDER) for word in words if word.startswith(DATA_FOLDER)]
    rest = [word for word in words if not word.startswith(DATA_FOLDER)]
    if not sources:
        return ResolvedWords(rest, [], [])
    if len(sources) > 1:
        raise ConfigError(f"data: expected one folder, got {', '.join(sources)}; set data.train and so on instead")
    folders = config_dirs() if search is None else list(search)
    overrides = _merged_overrides(rest)
    found = detect(sources[0], overrides.get("data", {}))
    trees = [overrides, *(tree for _, tree in _read_files(rest, folders))]
    missing = [section for section in DEFAULTS if not any(_name_of(tree, section) for tree in trees)]
    defaults = [DEFAULTS[section] for section in missing]
    settings = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in found.settings.items()]
    chosen = [f"Defaults: {' '.join(defaults)} (no other word names a {' or a '.join(missing)})"] if missing else []
    return ResolvedWords([*defaults, *settings, *rest], found.lines, chosen)


def resolve(words: Sequence[str], search: Sequence[Path] | None = None) -> Tree:
    """Merge the settings that ``words`` name, without checking types.

    Raises ConfigError for an unknown or unreadable file and a malformed override; see also ``expand_words``."""
    folders = config_dirs() if search is None else list(search)
    words = expand_words(words, folders).words
    files, overrides = _read_files(words, folders), _merged_overrides(words)
    names = [_name_of(tree, "segmentor") for tree in [*(tree for _, tree in files), overrides]]
    segmentor = next((name for name in reversed(names) if name is not None), None)
    merged: Tree = {}
    for word, tree in files:
        blocks = tree.pop(PER_SEGMENTOR, None)
        _overlay(merged, tree)
        if blocks is not None:
            _overlay(merged, _segmentor_block(word, blocks, segmentor))
    return _overlay(merged, overrides)


def _read_files(words: Sequence[str], folders: Sequence[Path]) -> list[tuple[str, Tree]]:
    """(word, settings) of every file that ``words`` name, each preceded by its base."""
    files = []
    for word in words:
        if "=" in word:
            continue
        tree = _read(word, folders)
        base = tree.pop(BASE, None)
        if base is not None:
            if not isinstance(base, str) or Path(base).suffix or "/" in base:
                raise ConfigError(f"{word}: {BASE}: expected the name of a file in configs/, got {base!r}")
            below = _read(base, folders)
            if BASE in below:
                raise ConfigError(f"{word}: {BASE}: {base} has a base itself; name {below[BASE]} or copy its settings")
            files.append((base, below))
        files.append((word, tree))
    return files


def _read(word: str, folders: Sequence[Path]) -> Tree:
    """The content of a file: of a path, or of a config name in one of ``folders``."""
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        found = [f / f"{word}.yaml" for f in folders if (f / f"{word}.yaml").is_file()]
        if not found:
            names = sorted({p.stem for f in folders for p in f.glob("*.yaml")})
            raise ConfigError(
                f"{word}: no such config{did_you_mean(word, names)} (the configs are {', '.join(names)}; "
                "also accepted: the path of a .yaml file, section.setting=value)"
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


def _merged_overrides(words: Sequence[str]) -> Tree:
    """All overrides among ``words`` as one tree."""
    merged: Tree = {}
    for word in words:
        if "=" in word:
            _merge(merged, _parse_override(word))
    return merged


def _parse_override(word: str) -> Tree:
    """`a.b=value` as a tree."""
    dotted, _, text = word.partition("=")
    keys = dotted.split(".")
    if len(keys) < 2 or not all(keys):
        raise ConfigError(f"{word}: expected section.setting=value, as in train.steps=100")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{dotted}: expected a YAML value, got {text!r}; quote it") from error
    tree: Tree = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        tree = {key: tree}
    return tree


def _segmentor_block(word: str, blocks: Any, segmentor: str | None) -> Tree:
    """The block under `per_segmentor:` of the file ``word`` for the chosen segmentor."""
    if not isinstance(blocks, dict):
        raise ConfigError(f"{word}: {PER_SEGMENTOR}: expected one block per segmentor, got {blocks!r}")
    if segmentor is None:
        raise ConfigError(
            f"segmentor.name: none chosen, and the settings of {word} depend on it; add one of {', '.join(blocks)}"
        )
    if segmentor not in blocks:
        raise ConfigError(
            f"{word}: no published constants for segmentor {segmentor!r}, only for {', '.join(blocks)}; "
            "write your own .yaml file with the sections method and optim.reference"
        )
    block: Tree = blocks[segmentor] or {}
    return block


def _name_of(tree: Tree, section: str) -> str | None:
    part = tree.get(section)
    return part.get("name") if isinstance(part, dict) else None


def _overlay(base: Tree, top: Tree) -> Tree:
    """Merge one file, or the overrides, into ``base``. Another plugin or preset resets its section first, because
    settings that were chosen for the previous one do not fit it."""
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


# The scalars of the YAML 1.2 core schema (tag, pattern, first characters). `1e-4` is a number, whereas `no`, `010` and
# dates are text. PyYAML follows YAML 1.1, which reads them the other way round.
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
    """Parse YAML ``text`` with plain values only and the scalars of YAML 1.2. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@_core_scalars
class Loader(yaml.SafeLoader):
    """Reads the scalars of YAML 1.2 and refuses duplicate keys."""

    yaml_implicit_resolvers: Tree = {}  # noqa: RUF012 - declared like this by PyYAML

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicate = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if duplicate is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicate!r}", node.start_mark)
        return super().construct_mapping(node, deep)


@_core_scalars
class Dumper(yaml.SafeDumper):
    """Writes what ``Loader`` reads, with each list on one line."""

    yaml_implicit_resolvers: Tree = {}  # noqa: RUF012 - declared like this by PyYAML

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)
