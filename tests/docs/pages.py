"""The pages of the documentation, and the parts of them that the tests check."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_EXECUTED = "# not executed: "  # first line of a Python block that needs what a test does not have


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def generator() -> ModuleType:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def pages() -> dict[str, str]:
    """Path from the root of the repository -> text, of written and generated pages."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    written = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}
    return written | {f"docs/{path}": page() for path, page in generator().PAGES.items()}


def blocks(language: str | None = None) -> list[Block]:
    """The fenced blocks of all pages, or those of one language."""
    found = [
        Block(page, text[: match.start()].count("\n") + 2, match["language"], match["text"])
        for page, text in pages().items()
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if language is None or block.language == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words after `pais-ray`) of every command line in a block, a configuration file or inline code."""
    for block in blocks():
        if block.language in ("", "bash", "shell"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _command(str(block), line)
    for page, text in pages().items():
        if page.removeprefix("docs/") not in generator().PAGES:
            for code in re.findall(r"`(pais-ray [^`]+)`", prose(text)):
                yield from _command(page, code)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#   pais-ray "):
                yield from _command(path.name, line.removeprefix("#"))


def _command(place: str, line: str) -> Iterator[tuple[str, list[str]]]:
    line = re.sub(r"^\s*\$ ", "", line).strip()
    if re.match(r"pais-ray(\s|$)", line):
        words = shlex.split(re.sub(r"\s\s+\(.*", "", line), comments=True)  # without a remark
        yield place, [word for word in words[1:] if word != "..."]
