"""Charts: round ticks, points where they belong, names that stay names."""

import math
import re
from xml.etree import ElementTree

import pytest

from av_mae import charts


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3, 17), (0.693, 0.6932), (1e-6, 3e-6), (5, 5), (0, 0)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6
    labels = [charts._tick(x, ticks) for x in ticks]
    assert len(set(labels)) == len(labels)
    shown = [float(label.replace("k", "e3")) for label in labels]
    assert shown == pytest.approx(ticks, abs=step / 100)


def places(svg: str) -> dict[str, list[tuple[float, float]]]:
    """{run: points} of a chart's paths."""
    tree, space = ElementTree.fromstring(svg), "{http://www.w3.org/2000/svg}"
    return {
        g.get("data-run"): [
            (float(x), float(y))
            for x, y in re.findall(
                r"([\d.]+) ([\d.]+)", g.find(f"{space}path").get("d")
            )
        ]
        for g in tree.iter(f"{space}g")
    }


def test_points_stand_to_one_another_as_their_numbers_do():
    svg = charts.lines("t", {"a": [(0, 0), (50, 0.5), (100, 1)], "b": [(100, 0)]})
    found = places(svg)
    (x0, y0), (x1, y1), (x2, y2) = found["a"]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x2 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y2 < y0  # up is more
    assert found["b"] == [(x2, y0)] and svg.count("<circle") == 1


def test_what_is_not_finite_is_a_gap():
    svg = charts.lines("t", {"a": [(0, 0.0), (1, math.nan), (2, 1.0)]})
    assert len(places(svg)["a"]) == 2 and re.search(r'd="M\S+ \S+ M', svg)
    assert "a ends at 1" in svg
    assert charts.lines("t", {"a": [(0, math.nan)]})  # nothing to draw


def test_names_are_escaped_and_alone_it_has_style_and_legend():
    evil = '<script>alert(1)</script>"&'
    for alone in (False, True):
        svg = charts.lines(evil, {evil: [(0, 1)]}, evil, standalone=alone)
        ElementTree.fromstring(svg)  # well formed
        assert "<script" not in svg and ("<style>" in svg) == alone
        assert list(places(svg)) == [evil]


def test_more_series_than_colours_are_dashed():
    assert charts.series_class(1) == "series-1"
    assert charts.series_class(9) == "series-1 dashed"
    assert charts.number(0.00012) == "1.2e-4" and charts.number(25000) == "25k"
