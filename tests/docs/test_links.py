"""Links of the documentation lead somewhere."""

import re

import pytest
import yaml
from markdown.extensions.toc import slugify

from tests.docs.pages import ROOT, generator, pages, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = {f"docs/{path}" for path in generator().PAGES}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", [name for name in pages() if name not in GENERATED])
def test_links_of_written_pages_resolve(page):
    for target in LINK.findall(prose(pages()[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        name = file.relative_to(ROOT).as_posix()
        assert name in pages() or file.is_file(), f"{page}: {target} does not exist"
        if anchor:
            assert anchor in anchors(pages()[name]), f"{page}: {target}: no such heading"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(
        re.findall(r": ([\w/]+\.md)$", str(yaml.safe_load(text)["nav"]).replace("'", "").replace("}", "\n"), re.M)
    )
    assert listed == {name.removeprefix("docs/") for name in pages() if name.startswith("docs/")}


def test_pages_that_the_code_names_exist():
    named = set()
    for folder, patterns in {
        "pais_ray": ["*.py"],
        "pipelines": ["*.py"],
        "tests": ["*.py"],
        "benchmarks": ["*.py"],
        "infra": ["*.yaml", "*.sh", "*.py"],
        "configs": ["*.yaml"],
    }.items():
        for path in [p for pattern in patterns for p in (ROOT / folder).rglob(pattern)]:
            text = path.read_text(encoding="utf-8")
            named |= {(path.name, name) for name in re.findall(r"\bdocs/[\w/]+\.md", text)}
    assert {name for _, name in named} > {"docs/architecture.md"}
    assert not [(file, name) for file, name in named if name not in pages()]


def test_images_are_used():
    used = {target.rpartition("/")[2] for text in pages().values() for target in LINK.findall(text)}
    assert {path.name for path in (ROOT / "docs" / "images").glob("*.png")} <= used
