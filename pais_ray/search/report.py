"""The results of a search: a table, the best settings as an overlay, figures, and files for other programs."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import yaml

from pais_ray.config.overlays import Dumper, Tree
from pais_ray.figures import charts
from pais_ray.files.atomic import replace_text
from pais_ray.search.plan import SearchPlan
from pais_ray.search.space import Params, Range, short_names
from pais_ray.search.trials import RankedConfiguration, TrialStore

FIGURES = ("parallel.png", "parameters.png")


def table(ranking: Sequence[RankedConfiguration], seeds: int, most: int | None = None) -> str:
    """Configurations, best first; those that were stopped early follow, since their AP is that of an earlier step."""
    if not ranking:
        return "no trials yet"
    names = short_names(list(ranking[0].params))
    head = ["", "segm AP", *(["+-"] if seeds > 1 else []), "step", "state", *names.values()]
    rows = [head]
    for s in ranking[:most]:
        spread = ["-" if s.spread is None else f"{s.spread:.3f}"] if seeds > 1 else []
        ap = "-" if s.ap is None else f"{s.ap:.3f}"
        rows.append([f"{s.point:03d}", ap, *spread, str(s.step), s.state, *(_short(s.params[p]) for p in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if most is not None and len(ranking) > most:
        lines.append(f"... and {len(ranking) - most} more")
    return "\n".join(lines)


def best_of(ranking: Sequence[RankedConfiguration]) -> RankedConfiguration | None:
    """The first configuration that finished."""
    return next((s for s in ranking if s.state == "finished" and s.ap is not None), None)


def describe(params: Params) -> str:
    """A short text such as `tau_cls 0.5, alpha 4`."""
    return ", ".join(f"{name} {_short(params[path])}" for path, name in short_names(list(params)).items())


def overlay_of(best: RankedConfiguration, plan: SearchPlan, configurations: int) -> str:
    """The best values of the searched settings as a YAML config."""
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
        f"# Best of {configurations} configurations of the search {plan.root.name} ({plan.sampler}).\n"
        f"# Teacher's segm AP {best.ap:.4f}{spread} at step {best.step}; trials {trials}.\n"
        + yaml.dump(tree, Dumper=Dumper, sort_keys=False)
    )


def to_json(plan: SearchPlan, store: TrialStore, stopped: str | None) -> dict[str, Any]:
    """The content of results.json and ``--json``."""
    ranking = store.ranking()
    best = best_of(ranking)
    return {
        "search": plan.root.name,
        "folder": str(plan.root),
        "kind": plan.sampler,
        "space": {path: str(domain) for path, domain in plan.space.items()},
        "steps": plan.steps,
        "stopped": stopped,  # why the search ended early
        "best": None if best is None else {**_row(best), "overlay": str(plan.root / "best.yaml")},
        "configurations": [_row(s) for s in ranking],
        "rungs": {str(step): store.rung(step) for step in plan.rungs},
    }


def write(plan: SearchPlan, store: TrialStore, result: dict[str, Any]) -> None:
    """Writes table.txt, results.json and results.csv (one row per trial); with a score also best.yaml and figures/."""
    ranking = store.ranking()
    files = {
        "table.txt": table(ranking, len(plan.seeds)) + "\n",
        "results.json": json.dumps(result, indent=1) + "\n",
        "results.csv": _csv(plan, store),
    }
    best = best_of(ranking)
    if best is not None:
        files["best.yaml"] = overlay_of(best, plan, len(ranking))
    for name, text in files.items():
        replace_text(plan.root / name, text)
    names = short_names(list(plan.space))
    log = {names[path] for path, d in plan.space.items() if isinstance(d, Range) and d.kind == "loguniform"}
    points = [
        charts.TrialPoint(
            params={names[path]: value for path, value in s.params.items()},
            ap=s.ap,
            spread=s.spread,
            finished=s.state == "finished",
        )
        for s in ranking
        if s.ap is not None
    ]
    figures = [plan.root / "figures" / name for name in FIGURES] if points else []
    for draw, path in zip((charts.parallel_coordinates, charts.parameter_scatter), figures, strict=False):
        draw(points, log, path)


def _row(configuration: RankedConfiguration) -> dict[str, Any]:
    return {
        "configuration": configuration.point,
        "params": configuration.params,
        "state": configuration.state,
        "step": configuration.step,
        "teacher/segm_AP": configuration.ap,
        "spread": configuration.spread,
        "trials": [{"id": t.id, "seed": t.seed, "state": t.state, "why": t.why} for t in configuration.trials],
    }


def _csv(plan: SearchPlan, store: TrialStore) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "configuration", "seed", "state", "step", "teacher/segm_AP", *plan.space])
    for t in store.trials:
        step = max(t.scores, default=0)
        values = [json.dumps(v) if isinstance(v, list | dict) else v for v in (t.params[path] for path in plan.space)]
        writer.writerow([t.id, t.point, t.seed, t.state, step, t.scores.get(step, ""), *values])
    return text.getvalue()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
