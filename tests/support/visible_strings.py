"""Every string that a user can see, listed from the code: CLI help, settings, event types, messages and errors.

Run `python -m tests.support.visible_strings` to print them all with their place.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).resolve().parents[2]
PRINTING = {"echo", "print", "print_line", "secho", "notify", "event", "tell"}  # functions that show text to a person
LOGGING = {"debug", "info", "warning", "error", "exception"}


class Text(NamedTuple):
    """A string and the place that it comes from."""

    place: str
    text: str


def cli_texts() -> Iterator[Text]:
    """The help of every command and option."""
    from pais_ray.cli import main

    def walk(command: click.Command, name: str) -> Iterator[Text]:
        yield Text(name, command.help or "")
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield Text(f"{name} {parameter.opts[-1]}", parameter.help or "")
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from walk(inner, f"{name} {inner.name}")

    yield from walk(main, "pais-ray")


def setting_texts() -> Iterator[Text]:
    """The description of every setting."""
    from pais_ray.config.describe import all_settings

    for setting in all_settings():
        yield Text(f"setting {setting.name}", setting.description)


def literal(node: ast.AST) -> str:
    """The text of a string literal, with ``{}`` for what an f-string inserts; empty for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def strings_in(node: ast.AST) -> Iterator[str]:
    """The outermost string literals below ``node``."""
    if text := literal(node):
        yield text
        return
    for child in ast.iter_child_nodes(node):
        yield from strings_in(child)


def called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def code_texts() -> Iterator[Text]:
    """Errors that are raised, lines that are printed or logged, texts of messages, and event types."""
    for path in sorted((ROOT / "pais_ray").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            shown: list[ast.AST] = []
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                shown = [*node.exc.args]
            elif isinstance(node, ast.Call) and called(node) in PRINTING | LOGGING:
                shown = [*node.args]
            elif isinstance(node, ast.Call):
                shown = [k.value for k in node.keywords if k.arg in ("text", "message", "remedy")]
            elif isinstance(node, ast.Dict):
                named = zip(node.keys, node.values, strict=True)
                shown = [value for key, value in named if key is not None and literal(key) in ("event", "text")]
            for part in shown:
                for text in strings_in(part):
                    yield Text(f"{place}:{getattr(node, 'lineno', 0)}", text)


def all_texts() -> list[Text]:
    """All of them, without empty ones."""
    texts = [*cli_texts(), *setting_texts(), *code_texts()]
    return [text for text in texts if any(c.isalpha() for c in text.text)]


if __name__ == "__main__":
    for place, text in all_texts():
        print(f"{place}: {' '.join(text.split())}")
