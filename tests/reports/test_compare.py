"""Comparison of runs: differing settings, mean and spread of repetitions, and warnings about comparability."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pais_ray.cli import main
from pais_ray.config.tree import compose, dump
from pais_ray.reports.compare import BEST, compare
from tests.support.mlflow_runs import write_row


def run(
    folder: Path, name: str, *aps: float, words: tuple[str, ...] = (), split: str = "s", val: str = "v", batch=8
) -> Path:
    """The directory of a run of two steps with the given APs of the teacher."""
    root = folder / name
    root.mkdir()
    config = compose(["synthetic", "mask_rcnn", "supervised", f"run.name={name}", *words])
    (root / "config.yaml").write_text(dump(config))
    (root / "split.json").write_text(json.dumps({"sha256": split}))
    (root / "data.json").write_text(json.dumps({"validation": {"sha256": val}}))
    (root / "schedule.json").write_text(json.dumps({"steps": 2, "images_per_step": batch, "lr": batch / 800}))
    for step, ap in enumerate(aps, 1):
        write_row(root, step, **{"teacher/segm_AP": ap, "teacher/bbox_AP": None})
    return root


PAIS = ("pais",)


def test_differing_settings_and_metrics(tmp_path):
    found = compare([run(tmp_path, "a", 0.30, 0.20), run(tmp_path, "b", 0.1, 0.25, words=(*PAIS, "optim.lr=0.5"))])
    assert found.titles == ["a", "b"]
    assert found.settings["method.name"] == ["supervised", "pais"]
    assert found.settings["method.alpha"] == [None, 4.0]
    assert found.settings["optim.lr"] == [0.001, 0.5]
    assert not [name for name in found.settings if name.startswith(("run.", "tracking.", "data.train"))]
    assert found.metrics.keys() == {BEST, "teacher/segm_AP"}
    assert found.metrics[BEST][1].values == (0.25,)
    assert found.metrics["teacher/segm_AP"][1].delta == pytest.approx((0.05,))
    assert found.warnings == []


def test_repetitions_share_a_column_and_are_paired(tmp_path):
    def part(name: str, aps: list[float], words: tuple[str, ...] = ()) -> list[Path]:
        """Three runs, each with another seed and fold."""
        return [
            run(tmp_path, f"{name}{i}", 0.0, ap, words=(*words, f"train.seed={i}", f"data.fold={i}"), split=f"s{i}")
            for i, ap in enumerate(aps)
        ]

    roots = part("a", [0.10, 0.20, 0.30]) + part("b", [0.12, 0.22, 0.35], PAIS)
    found = compare(roots)
    assert found.titles == ["a0 (3 runs)", "b0 (3 runs)"]
    assert found.warnings == []
    assert found.metrics["teacher/segm_AP"][1].delta == pytest.approx((0.02, 0.02, 0.05))
    assert "0.200 ± 0.100" in found.table()
    assert "0.230 ± 0.115  +0.030 ± 0.017" in found.table()
    assert "train.seed" not in found.settings
    unpaired = compare(roots[:5])
    assert unpaired.metrics["teacher/segm_AP"][1].delta == pytest.approx((-0.03,))
    assert any("other labeled images" in text for text in unpaired.warnings)


def test_runs_with_another_batch_size_are_not_repetitions(tmp_path):
    """The number of workers is not part of the identity, but the batch size of a new run follows from it."""
    words = ("scaling.num_workers=4", "train.seed=1")
    found = compare([run(tmp_path, "a", 0.1, 0.2), run(tmp_path, "b", 0.1, 0.3, words=words, batch=32)])
    assert found.titles == ["a", "b"]
    assert found.settings["schedule.images_per_step"] == [8, 32]
    assert found.settings["schedule.lr"] == [0.01, 0.04]
    same = compare([tmp_path / "a", run(tmp_path, "c", 0.1, 0.3, words=words)])
    assert same.titles == ["a (2 runs)"], "the same batch size on more workers"


def test_warnings_about_runs_that_are_not_comparable(tmp_path):
    a = run(tmp_path, "a", 0.1, 0.2)
    assert compare([a, run(tmp_path, "b", 0.1, 0.2, words=PAIS, val="w")]).warnings == [
        "b was evaluated on other validation annotations than a: not comparable"
    ]
    [labels] = compare([a, run(tmp_path, "c", 0.1, 0.2, words=PAIS, split="t")]).warnings
    assert "c was trained on other labeled images than a" in labels
    assert compare([a, run(tmp_path, "d", 0.1, words=PAIS)]).warnings == ["d is at step 1 of 2"]


def test_the_verb_prints_the_table_and_writes_json(tmp_path):
    a, b = run(tmp_path, "a", 0.1, 0.2), run(tmp_path, "b", 0.1, 0.25, words=PAIS, val="w")
    done = CliRunner().invoke(main, ["compare", str(a), str(b), "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "warning: b was evaluated on other validation annotations" in done.output
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["metrics"]["teacher/segm_AP"][1]["delta_mean"] == pytest.approx(0.05)
    assert content["settings"]["method.name"] == ["supervised", "pais"]
    (a / "data.json").unlink()
    wrong = CliRunner().invoke(main, ["compare", str(a), str(b)])
    assert wrong.exit_code == 2
    assert f"{a}: expected a run directory with data.json" in wrong.output
