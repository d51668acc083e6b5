"""What a search came to: a table, the best settings as an overlay, plots and files for other programs."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import yaml

from pais_ray.config.overlays import Dumper, Tree
from pais_ray.figures import charts
from pais_ray.files.atomic import replace_text
from pais_ray.search.plan import Plan
from pais_ray.search.space import Params, Range, short_names
from pais_ray.search.trials import Standing, TrialStore

FIGURES = ("parallel.png", "parameters.png")


def table(standings: Sequence[Standing], seeds: int, most: int | None = None) -> str:
    """Configurations, best first. Those stopped early come after the finished ones: their AP is of an earlier step."""
    if not standings:
        return "no trials yet"
    names = short_names(list(standings[0].params))
    head = ["", "segm AP", *(["+-"] if seeds > 1 else []), "step", "state", *names.values()]
    rows = [head]
    for s in standings[:most]:
        spread = ["-" if s.spread is None else f"{s.spread:.3f}"] if seeds > 1 else []
        ap = "-" if s.ap is None else f"{s.ap:.3f}"
        rows.append([f"{s.point:03d}", ap, *spread, str(s.step), s.state, *(_short(s.params[p]) for p in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if most is not None and len(standings) > most:
        lines.append(f"... and {len(standings) - most} more")
    return "\n".join(lines)


def best_of(standings: Sequence[Standing]) -> Standing | None:
    """The first one that finished."""
    return next((s for s in standings if s.state == "finished" and s.ap is not None), None)


def describe(params: Params) -> str:
    """`tau_cls 0.5, alpha 4`."""
    return ", ".join(f"{name} {_short(params[path])}" for path, name in short_names(list(params)).items())


def overlay_of(best: Standing, plan: Plan, configurations: int) -> str:
    """The best settings, and only those searched, as a YAML word."""
    tree: Tree = {}
    for path, value in best.params.items():
        *sections, last = path.split(".")
        part = tree
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    spread = "" if best.spread is None else f" +- {best.spread:.4f} over {len(best.trials)} seeds"
    trials = ", ".join(t.id for t in best.trials)
    return (
        f"# Best of {configurations} configurations of the search {plan.root.name} ({plan.kind}).\n"
        f"# Teacher's segm AP {best.ap:.4f}{spread} at step {best.step}; trials {trials}.\n"
        + yaml.dump(tree, Dumper=Dumper, sort_keys=False)
    )


def to_json(plan: Plan, ledger: TrialStore, stopped: str | None) -> dict[str, Any]:
    """The content of results.json and ``--json``."""
    standings = ledger.standings()
    best = best_of(standings)
    return {
        "search": plan.root.name,
        "folder": str(plan.root),
        "kind": plan.kind,
        "space": {path: str(domain) for path, domain in plan.space.items()},
        "steps": plan.steps,
        "stopped": stopped,  # why it ended before all was tried
        "best": None if best is None else {**_row(best), "overlay": str(plan.root / "best.yaml")},
        "configurations": [_row(s) for s in standings],
        "rungs": {str(step): ledger.rung(step) for step in plan.rungs},
    }


def write(plan: Plan, ledger: TrialStore, result: dict[str, Any]) -> None:
    """table.txt, results.json, results.csv (a row a trial), and as soon as there is a score best.yaml and figures/."""
    standings = ledger.standings()
    files = {
        "table.txt": table(standings, len(plan.seeds)) + "\n",
        "results.json": json.dumps(result, indent=1) + "\n",
        "results.csv": _csv(plan, ledger),
    }
    best = best_of(standings)
    if best is not None:
        files["best.yaml"] = overlay_of(best, plan, len(standings))
    for name, text in files.items():
        replace_text(plan.root / name, text)
    names = short_names(list(plan.space))
    log = {names[path] for path, d in plan.space.items() if isinstance(d, Range) and d.kind == "loguniform"}
    tried = [
        charts.TrialPoint(
            params={names[path]: value for path, value in s.params.items()},
            ap=s.ap,
            spread=s.spread,
            finished=s.state == "finished",
        )
        for s in standings
        if s.ap is not None
    ]
    figures = [plan.root / "figures" / name for name in FIGURES] if tried else []
    for draw, path in zip((charts.parallel_coordinates, charts.parameter_scatter), figures, strict=False):
        draw(tried, log, path)


def _row(standing: Standing) -> dict[str, Any]:
    return {
        "configuration": standing.point,
        "params": standing.params,
        "state": standing.state,
        "step": standing.step,
        "teacher/segm_AP": standing.ap,
        "spread": standing.spread,
        "trials": [{"id": t.id, "seed": t.seed, "state": t.state, "why": t.why} for t in standing.trials],
    }


def _csv(plan: Plan, ledger: TrialStore) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "configuration", "seed", "state", "step", "teacher/segm_AP", *plan.space])
    for t in ledger.trials:
        step = max(t.scores, default=0)
        values = [json.dumps(v) if isinstance(v, list | dict) else v for v in (t.params[path] for path in plan.space)]
        writer.writerow([t.id, t.point, t.seed, t.state, step, t.scores.get(step, ""), *values])
    return text.getvalue()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
