"""User-visible text is American English in the field's terms: spellings and phrases that must not come back."""

import re

import pytest

from tests.support.visible_strings import ROOT, all_texts

BRITISH = re.compile(
    r"\b\w*(colour|normalis|optimis|recognis|initialis|serialis|summaris|organis|behaviour|neighbour|favour|honour"
    r"|catalogue|labell|cancell(?!ation)|centre|artefact|grey)\w*\b",
    re.IGNORECASE,
)
DATA_NAMES = '"unlabelled"'  # folders of users have this name too, see data/sources/discover.py
UNCLEAR = re.compile(  # phrases of earlier versions that readers did not understand
    r"\b(images?|rows?|steps?|CPUs?|workers?|threads?|trials?|seconds|instances) an? "
    r"(image|row|step|worker|rank|GPU|node|trial|box|second|epoch|class|checkpoint)\b"
    r"|\bgo(es)? on with\b|\bpassed over\b|\bin the hands of\b|\bwhat there is\b|\blook at it\b"
    r"|\bspelt\b|\bis told\b|\bwish(es|ed)?\b|\bsign of life\b|\bpapers\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("pattern", [BRITISH, UNCLEAR], ids=["British spelling", "unclear phrase"])
def test_text_that_users_see(pattern):
    texts = all_texts()
    assert len(texts) > 500
    assert [f"{place}: {text}" for place, text in texts if pattern.search(text)] == []


def test_names_comments_and_pages_have_american_spelling():
    files = [*(ROOT / "pais_ray").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.yaml")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group(0)}"
        for path in [*files, ROOT / "README.md"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := BRITISH.search(line.replace(DATA_NAMES, "")))
        and "renamed" not in path.name
        and "upgrad" not in path.name.lower()
    ]
    assert found == []
