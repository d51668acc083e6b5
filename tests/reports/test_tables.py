"""Tables of runs: cells by method and share, with repetitions in one cell and differing settings in the name."""

import csv
import json

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.tree import compose, dump
from pais_ray.reports.tables import build_cells, read_result


def run(root, name: str, ap: float | None, *words: str, method: str = "pais", batch=16) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(compose(["coco", "mask_rcnn", method, f"run.name={name}", *words])))
    (folder / "schedule.json").write_text(json.dumps({"steps": 10, "images_per_step": batch, "lr": batch / 1600}))
    rows = [{"step": 5, "teacher/segm_AP": 0.9}, {"step": 10, "loss": 1.0}]
    if ap is not None:
        rows.append({"step": 10, "teacher/segm_AP": ap})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_of_a_folder_of_runs(tmp_path):
    runs = tmp_path / "runs"
    for fold, ap in ((1, 0.20), (2, 0.22)):
        run(runs, f"a{fold}", ap, "data.labeled=0.01", f"data.fold={fold}", f"train.seed={fold}")
    run(runs, "ten", 0.31, "data.labeled=0.1", "train.log_every=7")  # a setting that is not part of the identity
    run(runs, "plain", 0.19, "data.labeled=0.01", method="pais_wo_daloss")
    run(runs, "young", None, "data.labeled=0.01", "data.fold=3")
    out = {name: tmp_path / f"table.{name}" for name in ("md", "csv", "json")}
    words = ["tables", str(runs), "--markdown", str(out["md"]), "--csv", str(out["csv"]), "--json", str(out["json"])]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert out["md"].read_text().splitlines() == [
        "| teacher segm_AP | 1 % | 10 % |",
        "|---|---|---|",
        "| mask_rcnn pais method.alpha=0.0 method.beta=0.0 | 19.0 (1) | - |",
        "| mask_rcnn pais method.alpha=4.0 method.beta=4.0 | 21.0 ± 1.4 (2) | 31.0 (1) |",
    ]
    assert "left out because their last step has no teacher/segm_AP: young" in done.output
    rows = list(csv.DictReader(out["csv"].open()))
    assert [(r["labeled"], r["runs"], r["names"]) for r in rows][1] == ("0.01", "2", "a1 a2")
    assert float(rows[1]["spread"]) == pytest.approx(0.0141421356)
    assert len(json.loads(out["json"].read_text())["cells"]) == 3


def test_runs_with_another_batch_size_are_not_repetitions(tmp_path):
    for seed, batch in ((1, 16), (2, 16), (3, 64)):
        run(tmp_path, f"r{seed}", 0.2, "data.labeled=0.01", f"train.seed={seed}", batch=batch)
    cells = build_cells([read_result(tmp_path / f"r{seed}", "teacher", "segm_AP") for seed in (1, 2, 3)])
    assert [(cell.method.split(" ", 2)[2], cell.runs) for cell in cells] == [
        ("schedule.images_per_step=16 schedule.lr=0.01", ("r1", "r2")),
        ("schedule.images_per_step=64 schedule.lr=0.04", ("r3",)),
    ]


def test_a_folder_without_runs_is_refused(tmp_path):
    done = CliRunner().invoke(main, ["tables", str(tmp_path)])
    assert done.exit_code == 2
    assert "expected run directories" in done.stderr
