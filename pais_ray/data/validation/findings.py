"""The findings of a validation, as a table and as JSON."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pais_ray.data.validation.rules import RULES, DataError, severity
from pais_ray.files import atomic

EXAMPLES = 3  # findings per rule in the table

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule at one place."""

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
    """All findings, and how many entries and files were checked."""

    findings: list[Finding] = field(default_factory=list)
    images: int = 0
    annotations: int = 0
    pictures: int = 0  # image files decoded
    broken: dict[int, str] = field(default_factory=dict)  # id of an image whose file is broken -> rule

    def add(self, error: DataError) -> None:
        """Adds a finding."""
        self.findings.append(Finding(error.rule, error.where, error.message, error.remedy))

    def add_and_skip(self, error: DataError, value: object) -> None:
        """Adds a finding about an entry and leaves the entry out: a policy of ``walk``."""
        self.add(error)

    def add_and_keep(self, error: DataError, value: object) -> dict[str, Any] | None:
        """Adds a finding about an entry and continues with the entry if it is an object: a policy of ``walk``."""
        self.add(error)
        return value if isinstance(value, dict) else None

    def check(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Calls a check and returns its result; on DataError adds the finding and returns None."""
        try:
            return function(*arguments)
        except DataError as error:
            self.add(error)
            return None

    def counts(self) -> dict[str, int]:
        """Returns the number of findings per rule: errors first, then in the order of ``RULES``."""
        found = Counter(finding.rule for finding in self.findings)
        order = {rule: i for i, rule in enumerate(RULES)}
        return dict(sorted(found.items(), key=lambda item: (severity(item[0]), order[item[0]])))

    def number(self, kind: str) -> int:
        """Returns the number of findings of severity ``kind``, "error" or "warning"."""
        return sum(count for rule, count in self.counts().items() if severity(rule) == kind)

    def table(self) -> str:
        """Formats the counts per rule, each with its remedy and first findings, and the totals."""
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
        checked = f"{self.images} images ({self.pictures} decoded), {self.annotations} annotations"
        totals = f"{_plural(self.number('error'), 'error')}, {_plural(self.number('warning'), 'warning')}"
        lines.append(f"{totals}: {checked}")
        # file names and category names are untrusted: they must not send escape sequences to the terminal
        return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)

    def write(self, path: str, **more: Any) -> None:
        """Atomically writes every finding as JSON, one per line, with ``more`` as additional keys."""
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
