"""Charts draw the values they are given; checked in the figures that are written."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from pais_ray.figures import charts
from pais_ray.figures.charts import TrialPoint


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, in order."""
    written = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: written.append(figure))
    return written


def lines(axes):
    """Label -> (x, y) of the lines of the axes."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_curves_have_one_axes_per_first_part_of_the_name(figures):
    rows = [
        {"step": 10, "labeled/mask": 1.0, "pseudo/kept": 2, "lr": 0.1, "unlabeled/class": float("nan")},
        {"step": 20, "labeled/mask": 0.5, "teacher/segm_AP": 0.2, "student/segm_AP": 0.1, "note": "text"},
        {"step": 20, "teacher/segm_AP_class/cat": 0.9, "teacher/segm_APs": None, "teacher/bbox_AP50": 0.3},
        {"labeled/mask": 7.0},
    ]
    charts.curves(rows, "curves.png")
    [figure] = figures
    assert [axes.get_title() for axes in figure.axes] == ["labeled", "AP", "pseudo", "other"]
    labeled, ap, pseudo, other = map(lines, figure.axes)
    assert labeled == {"mask": ([10, 20], [1.0, 0.5])}
    assert ap == {"teacher/segm_AP": ([20], [0.2]), "student/segm_AP": ([20], [0.1])}
    assert pseudo == {"kept": ([10], [2.0])}
    assert other == {"lr": ([10], [0.1])}
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["teacher/segm_AP", "student/segm_AP"]


def test_curves_without_metrics_say_so(figures):
    charts.curves([], "curves.png")
    [figure] = figures
    assert figure.axes == []
    assert [text.get_text() for text in figure.texts] == ["no metrics yet"]


@pytest.mark.parametrize("rows", [[], [{"step": i, "labeled/mask": 1 / (i + 1)} for i in range(5)]])
def test_the_file_is_an_image_with_content(tmp_path, rows):
    charts.curves(rows, tmp_path / "figures" / "curves.png")
    with Image.open(io.BytesIO((tmp_path / "figures" / "curves.png").read_bytes())) as image:
        assert min(image.size) > 200
        assert (np.asarray(image.convert("L")) < 128).sum() > 100, "dark lines or text on white"


POINTS = [
    TrialPoint(params={"lr": 0.001, "name": "a"}, ap=0.1, spread=None, finished=True),
    TrialPoint(params={"lr": 0.1, "name": "b"}, ap=0.3, spread=0.05, finished=True),
    TrialPoint(params={"lr": 0.01, "name": "a"}, ap=0.4, spread=None, finished=False),
]


def test_parallel_coordinates_emphasize_the_best_finished_configuration(figures):
    charts.parallel_coordinates(POINTS, ["lr"], "parallel.png")
    [axes] = figures[0].axes
    first, best, stopped = axes.get_lines()[:3]
    assert list(first.get_ydata()) == pytest.approx([0.0, 0.25, 0.0])
    assert list(best.get_ydata()) == pytest.approx([1.0, 0.75, 2 / 3])
    assert list(stopped.get_ydata()) == pytest.approx([0.5, 0.25, 1.0]), "lr is logarithmic"
    assert best.get_linewidth() > first.get_linewidth() > stopped.get_linewidth()
    assert [line.get_linestyle() for line in (first, best, stopped)] == ["-", "-", "--"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["lr", "name", "segm AP"]
    assert {"0.001", "0.01", "0.1", "a", "b", "0.4"} <= {text.get_text() for text in axes.texts}


def test_the_scatter_has_one_axes_per_setting(figures):
    charts.parameter_scatter(POINTS, ["lr"], "scatter.png")
    lr, name = figures[0].axes
    assert (lr.get_xlabel(), name.get_xlabel()) == ("lr", "name")
    drawn = [container.lines[0] for container in lr.containers]
    assert [float(line.get_ydata()[0]) for line in drawn] == [0.1, 0.3, 0.4]
    assert [float(line.get_xdata()[0]) for line in drawn] == pytest.approx([0.0, 1.0, 0.5])
    assert [line.get_markerfacecolor() for line in drawn] == ["tab:blue", "tab:blue", "none"]


def test_axes_with_many_values_have_ticks_at_the_ends_and_the_middle(figures):
    points = [TrialPoint(params={"x": i}, ap=i / 10, spread=None, finished=True) for i in range(9)]
    charts.parameter_scatter(points, [], "scatter.png")
    assert [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()] == ["0", "4", "8"]
    assert math.isclose(figures[0].axes[0].get_xticks()[1], 0.5)
