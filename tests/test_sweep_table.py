"""Means, intervals, paired differences and main effects of a sweep."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from av_mae import sweep_table


def test_the_interval_is_that_of_the_t_test():
    values = np.random.default_rng(0).normal(0.8, 0.1, 7).tolist()
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = sweep_table.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    mean, half = sweep_table.interval([0.5])
    assert mean == 0.5 and math.isnan(half)


def test_the_table_has_means_and_failures():
    point = lambda value: (("probe", value),)
    table = sweep_table.summary(
        {
            (point("full"), 0): {"top_1": 0.5, "loss": 1.0},
            (point("full"), 1): {"top_1": 0.7, "loss": 1.0},
            (point("odd"), 0): {"failed": "a | b does not exist."},
        },
        ["half of the clips are missing"],
    )
    rows = table["rows"]
    assert rows[0]["metrics"]["top_1"]["values"] == [0.5, 0.7]
    assert rows[0]["seeds"] == [0, 1] and rows[1]["seeds"] == []
    assert "differences" not in rows[1] and table["effects"] == []
    assert sweep_table.markdown(table).splitlines() == [
        "| probe | seeds | top_1 | loss |",
        "|---|---|---|---|",
        "| full | 2 | 0.6 ± 1.3 | 1 ± 0 |",
        "| odd | 0 | failed: a \\| b does not exist. |  |",
        "",
        "- NOTE (of some or all): half of the clips are missing",
    ]


def test_a_table_of_failures_alone():
    table = sweep_table.summary({((("probe", "odd"),), 0): {"failed": "no."}})
    assert sweep_table.markdown(table).splitlines() == [
        "| probe | seeds |  |",
        "|---|---|---|",
        "| odd | 0 | failed: no. |",
    ]


def test_seeds_that_failed_stand_beside_those_that_did_not():
    point = (("lr", "1e-1"),)
    bad = {"failed": "loss is nan."}
    results = {(point, 0): {"top_1": 0.9}, (point, 1): bad, (point, 2): bad}
    text = sweep_table.markdown(sweep_table.summary(results))
    assert "\n| 1e-1 | 1 (2 failed) | 0.9 |\n" in text
    assert "Failed, and in no mean: lr=1e-1 seed 1, 2: loss is nan.\n" in text


def grid_results(values, probes=("full", "linear"), pools=("mean", "cls")) -> dict:
    """{(point, seed): result} of values [probe pool seed]; NaN: not done."""
    named = itertools.product(enumerate(probes), enumerate(pools))
    return {
        ((("probe", probe), ("model.pool", pool)), seed): {"top_1": float(value)}
        for (i, probe), (j, pool) in named
        for seed, value in enumerate(values[i, j])
        if not math.isnan(value)
    }


def around(numbers) -> tuple[float, float]:
    mean, half = numbers["mean"], numbers["half_width"]
    return mean - half, mean + half


def test_differences_are_paired_by_seed_with_the_first_point():
    """Of the seeds that both points have."""
    values = np.random.default_rng(0).random((2, 2, 5))
    values[1, 0] = values[0, 0] + [0.1, 0.2, 0.3, 0.2, 0.2]
    values[1, 0, 4] = math.nan
    table = sweep_table.summary(grid_results(values))
    first, *rows = table["rows"]
    assert "differences" not in first
    for row, (i, j), n in zip(rows, ((0, 1), (1, 0), (1, 1)), (5, 4, 5), strict=True):
        found = row["differences"]["top_1"]
        pair = values[i, j, :n], values[0, 0, :n]
        assert found["values"] == pytest.approx(pair[0] - pair[1])
        assert around(found) == pytest.approx(ttest_rel(*pair).confidence_interval())
    text = sweep_table.markdown(table)
    below = text.split("Difference to probe=full, model.pool=mean, paired by seed:")[1]
    assert "\n| linear | mean | 4 | 0.2 ± 0.13 |\n" in below


def test_the_effect_of_a_field_is_the_mean_over_the_others():
    values = np.random.default_rng(1).random((2, 3, 4))
    table = sweep_table.summary(grid_results(values, pools=("mean", "cls", "max")))
    pools, probes = values.mean(0), values.mean(1)
    wanted = {
        ("probe", "linear", "full"): (probes[1], probes[0]),
        ("model.pool", "cls", "mean"): (pools[1], pools[0]),
        ("model.pool", "max", "mean"): (pools[2], pools[0]),
    }
    found = {
        (effect["field"], effect["value"], effect["first"]): effect["differences"]
        for effect in table["effects"]
    }
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        numbers = found[name]["top_1"]
        assert numbers["values"] == pytest.approx(pair[0] - pair[1])
        assert around(numbers) == pytest.approx(ttest_rel(*pair).confidence_interval())
    text = sweep_table.markdown(table)
    assert "\n| model.pool | max − mean | 4 |" in text.split("Of one field, ")[1]


def test_a_point_that_does_not_exist_is_left_out_of_the_effects():
    values = np.random.default_rng(2).random((2, 2, 3))
    results = grid_results(values)
    lost = [key for key in results if dict(key[0]).items() >= {("probe", "linear")}]
    for key in lost[:3]:  # one pool's
        results[key] = {"failed": "no."}
    effect = sweep_table.summary(results)["effects"][0]
    assert effect["differences"]["top_1"]["values"] == pytest.approx(
        values[1, 1] - values[0, 1]
    )


def test_a_number_that_one_seed_lacks_is_of_the_others():
    """What is not finite is not written: d' of a perfect ranking."""
    results = {
        ((("probe", p),), seed): {"top_1": 0.5} | more
        for p in ("full", "linear")
        for seed, more in enumerate([{}, {"d_prime": 2.0}, {"d_prime": 4.0}])
    }
    one, other = sweep_table.summary(results)["rows"]
    assert one["metrics"]["d_prime"]["values"] == [2.0, 4.0]
    assert other["differences"]["d_prime"]["values"] == [0.0, 0.0]
    assert len(other["differences"]["top_1"]["values"]) == 3
