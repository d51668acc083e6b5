"""Findings of a data set, as table and as JSON."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pais_ray.data.validation.rules import RULES, DataError, severity
from pais_ray.files import atomic

EXAMPLES = 3  # findings of each rule that the table shows

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule."""

    rule: str
    where: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        return {
            "rule": self.rule,
            "severity": severity(self.rule),
            "where": self.where,
            "message": self.message,
            "remedy": self.remedy,
        }


@dataclass
class Report:
    """All findings, and how much was looked at."""

    findings: list[Finding] = field(default_factory=list)
    images: int = 0
    annotations: int = 0
    pictures: int = 0  # image files decoded
    broken: dict[int, str] = field(default_factory=dict)  # images of the first COCO file -> rule their file breaks

    def add(self, error: DataError) -> None:
        self.findings.append(Finding(error.rule, error.where, error.message, error.remedy))

    def check(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """What a check returns, or None with its finding added."""
        try:
            return function(*arguments)
        except DataError as error:
            self.add(error)
            return None

    def counts(self) -> dict[str, int]:
        """rule -> findings, errors first, then by the order of the rules."""
        found = Counter(finding.rule for finding in self.findings)
        order = {rule: i for i, rule in enumerate(RULES)}
        return dict(sorted(found.items(), key=lambda item: (severity(item[0]), order[item[0]])))

    def number(self, kind: str) -> int:
        """Findings of severity ``kind``."""
        return sum(count for rule, count in self.counts().items() if severity(rule) == kind)

    def table(self) -> str:
        """Counts per rule with the first findings of each and the remedy, then the sums."""
        examples: dict[str, list[Finding]] = {}
        for finding in self.findings:
            shown = examples.setdefault(finding.rule, [])
            if len(shown) < EXAMPLES:
                shown.append(finding)
        lines = []
        for rule, count in self.counts().items():
            lines.append(f"{severity(rule):<8} {rule:<18} {count:>8}   {examples[rule][0].remedy}")
            lines += [f"         {f.where}: {f.message}" for f in examples[rule]]
            if count > EXAMPLES:
                lines.append(f"         ... and {count - EXAMPLES} more")
        looked = f"{self.images} images ({self.pictures} decoded), {self.annotations} annotations"
        sums = f"{_plural(self.number('error'), 'error')}, {_plural(self.number('warning'), 'warning')}"
        lines.append(f"{sums}: {looked}")
        # names come from outside: no escape sequences on the terminal
        return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)

    def write(self, path: str, **more: Any) -> None:
        """JSON with every finding, one a line; written aside and renamed."""
        head = {
            "errors": self.number("error"),
            "warnings": self.number("warning"),
            "images": self.images,
            "pictures": self.pictures,
            "annotations": self.annotations,
            "counts": self.counts(),
            **more,
        }
        with atomic.create_text(path) as file:
            file.write("{\n")
            for key, value in head.items():
                file.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
            file.write('"findings": [')
            for i, finding in enumerate(self.findings):
                file.write(("," if i else "") + "\n" + json.dumps(finding.to_json()))
            file.write("\n]\n}\n")


def _plural(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")
