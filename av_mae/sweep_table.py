"""The table of a sweep: means, paired differences and main effects, with intervals.

A point is one setting of the grid's fields; each is trained with the same seeds. The
first point, of all first values, is what the others are compared with.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Settings = tuple[tuple[str, str], ...]  # (field, value as it is typed)
Results = Mapping[tuple[Settings, int], Mapping]  # {(point, seed): {metric: number}}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t), NaN for one value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def summary(results: Results, notes: Sequence[str] = ()) -> dict:
    """The table, for JSON: `rows`, `effects` and `notes`.

    results: {"failed": sentence} stands for a cell that its config refused.

    A row has its `point`, the `seeds` that are done, `metrics`, of each the `mean`, the
    `half_width` of its interval (None for one seed) and the `values`, in the order of
    the seeds; `differences`, the same of the differences to the first point, paired by
    seed; `failed`, the first sentence, and `failed_seeds`. An effect, where more than
    one field has several values, is such a difference between a `value` of a `field`
    and its `first`, the mean over the settings of the other fields.
    """
    points: dict[Settings, dict[int, Mapping]] = {}
    for (point, seed), result in results.items():
        points.setdefault(point, {})[seed] = result
    good = {
        point: {seed: x for seed, x in found.items() if "failed" not in x}
        for point, found in points.items()
    }
    rows, first = [], next(iter(points))
    for point, found in points.items():
        row = {"point": dict(point), "seeds": list(good[point])}
        row["metrics"] = _statistics(list(good[point].values()))
        if point != first and (pairs := _paired(good[point], good[first])):
            row["differences"] = _statistics(list(pairs.values()))
        if failed := {s: x["failed"] for s, x in found.items() if "failed" in x}:
            row |= {"failed": next(iter(failed.values())), "failed_seeds": [*failed]}
        rows.append(row)
    return {"rows": rows, "effects": _effects(good), "notes": list(notes)}


def _paired(one: Mapping[int, Mapping], other: Mapping[int, Mapping]) -> dict:
    """{seed: {metric: one − other}} of what both have."""
    return {
        seed: {k: one[seed][k] - v for k, v in other[seed].items() if k in one[seed]}
        for seed in sorted(one.keys() & other.keys())
    }


def _effects(good: Mapping[Settings, Mapping[int, Mapping]]) -> list[dict]:
    values: dict[str, dict[str, None]] = {}
    for point in good:
        for field, value in point:
            values.setdefault(field, {})[value] = None
    values = {field: list(x) for field, x in values.items() if len(x) > 1}
    if len(values) < 2:
        return []  # the differences of the rows say it all
    found = []
    for field, (first, *others) in values.items():
        for value in others:
            numbers = _statistics(_means(good, field, value, first))
            effect = {"field": field, "value": value, "first": first}
            found.append(effect | {"differences": numbers})
    return found


def _means(good, field: str, value: str, first: str) -> list[dict]:
    """For each seed the mean difference over the other fields' settings."""
    seeds: dict[int, list[dict]] = {}
    for point, found in good.items():
        if dict(point)[field] == value:
            other = tuple((f, first if f == field else v) for f, v in point)
            for seed, numbers in _paired(found, good.get(other, {})).items():
                seeds.setdefault(seed, []).append(numbers)
    mean = lambda each, k: float(np.mean([x[k] for x in each if k in x]))
    return [
        {k: mean(each, k) for k in dict.fromkeys(k for x in each for k in x)}
        for each in seeds.values()
    ]


def _statistics(found: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    """{metric: mean, half_width, values} over the seeds that have it (are finite)."""
    numbers = {}
    for metric in dict.fromkeys(metric for result in found for metric in result):
        values = [result[metric] for result in found if metric in result]
        mean, half = interval(values)
        half = None if math.isnan(half) else half
        numbers[metric] = {"mean": mean, "half_width": half, "values": values}
    return numbers


def markdown(table: Mapping) -> str:
    """The table of `summary`: a line for each point, mean ± half of the interval.

    Under it the paired differences and main effects, where there are some, and notes.
    """
    rows = table["rows"]
    fields = list(rows[0]["point"])
    named = lambda row: [str(row["point"][field]) for field in fields]
    lines, metrics = [], _metrics(rows, "metrics") or [""]
    for row in rows:
        line = _line(named(row), row["metrics"], metrics)
        if "failed" in row and not row["seeds"]:
            line[len(fields) + 1] = f"failed: {row['failed']}".replace("|", "\\|")
        elif "failed" in row:
            line[len(fields)] += f" ({len(row['failed_seeds'])} failed)"
        lines.append(line)
    text = _table([*fields, "seeds", *metrics], lines)
    for row in rows:
        if row["seeds"] and "failed" in row:
            seeds = ", ".join(map(str, row["failed_seeds"]))
            where = ", ".join(f"{k}={v}" for k, v in row["point"].items())
            text += f"\nFailed, and in no mean: {where} seed {seeds}: {row['failed']}\n"
    if differ := [row for row in rows if row.get("differences")]:
        metrics = _metrics(differ, "differences")
        where = ", ".join(f"{k}={v}" for k, v in rows[0]["point"].items())
        text += f"\nDifference to {where}, paired by seed:\n\n"
        lines = [_line(named(row), row["differences"], metrics) for row in differ]
        text += _table([*fields, "seeds", *metrics], lines)
    if effects := table["effects"]:
        metrics = _metrics(effects, "differences")
        text += "\nOf one field, the mean over the others, paired by seed:\n\n"
        lines = [
            _line(
                [effect["field"], f"{effect['value']} − {effect['first']}"],
                effect["differences"],
                metrics,
            )
            for effect in effects
        ]
        text += _table(["field", "difference", "seeds", *metrics], lines)
    lines = [f"- NOTE (of some or all): {note}\n" for note in table["notes"]]
    return text + "\n" * bool(lines) + "".join(lines)


def _metrics(rows: Sequence[Mapping], kind: str) -> list[str]:
    return list(dict.fromkeys(metric for row in rows for metric in row[kind]))


def _line(names: Sequence[str], numbers: Mapping, metrics: Sequence[str]) -> list[str]:
    """The names, how many seeds there are, and each metric."""
    n = max((len(x["values"]) for x in numbers.values()), default=0)
    return [*names, str(n), *(_cell(numbers.get(metric)) for metric in metrics)]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    rows = [f"| {' | '.join(row)} |" for row in rows]
    rows[1] = "|---" * len(head) + "|"
    return "\n".join(rows) + "\n"


def _cell(numbers: Mapping | None) -> str:
    if numbers is None:
        return ""
    if numbers["half_width"] is None:
        return f"{numbers['mean']:.4g}"
    return f"{numbers['mean']:.4g} ± {numbers['half_width']:.2g}"
