import re

import numpy as np
import pytest

from metilr.metrics import gap
from metilr.metrics.open_set import precision_recall
from metilr.report.plots import as_svg, confidence_plot, precision_recall_plot, reliability_plot


@pytest.mark.parametrize("n", [40, 6000])
def test_the_area_under_the_drawn_curve_is_gap(n):
    rng = np.random.default_rng(n)
    target = rng.integers(-1, 5, n)
    predicted = np.where(rng.random(n) < 0.4, target, 5)
    case = rng.standard_normal(n), predicted, target
    figure = precision_recall_plot({"val": precision_recall(*case)}, {"val": gap(*case)}, {"val": (0.25, 0.75)})
    [curve, dot] = figure.axes[0].lines
    recall, precision = curve.get_xdata(), curve.get_ydata()
    assert np.trapezoid(precision, recall) == pytest.approx(gap(*case), abs=1e-12)
    assert recall[0] == 0
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.25, 0.75)


def test_the_points_of_a_reliability_curve_have_the_area_of_their_answers():
    bins = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.5, 1.0]), np.array([70, 20, 10])
    axes = reliability_plot({"test": bins}, {"test": 0.09}).axes[0]
    diagonal, curve = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert curve.get_xydata().tolist() == [[0.1, 0.2], [0.5, 0.5], [0.9, 1.0]]
    [points] = axes.collections
    np.testing.assert_allclose(np.diff(points.get_sizes()) / np.diff(bins[2]), points.get_sizes().sum() / 100, rtol=0.2)
    assert axes.get_legend().get_texts()[0].get_text() == "test: error 9.0"


def test_names_that_look_like_formulas_or_hidden_labels_are_drawn_as_they_are():
    kinds = ["met", "cost $5 a_$", "_private", "met"]
    svg = as_svg(confidence_plot(np.array([-0.1, -1.0, -2.0, -0.2]), kinds, None), "confidence")
    assert "cost $5 a_$ (1)" in svg and "_private (1)" in svg


def test_two_plots_on_a_page_share_no_id():
    def ids(name: str) -> set[str]:
        plot = confidence_plot(np.array([-0.1, -1.0]), ["met", "non-art"], -0.5)
        svg = as_svg(plot, name)
        found = re.findall(r'\bid="([^"]+)"', svg)
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert len(found) == len(set(found)) and set(used) <= set(found)
        return set(found)

    assert not ids("a") & ids("b")
