"""The page of av_mae/results.py: its rows, from the numbers of the parts.

`work` is what has `found(name)`, the numbers of a part or None, `scale` and `minutes()`
as results.Work has them.
"""

import itertools
from collections.abc import Iterator

from av_mae import demo, sweep_table

ALL = 0  # labels, as `data.limit` has it
STARTS = ("scratch", "pretrained")
SINGLE = ("sound", "picture")
LONGER = 4  # times the longest of the search


def part_name(start, source, modalities, labels, seed) -> str:
    """The name of a finetuning's part."""
    source = f"_{source}" if source else ""
    return f"{start}{source}_{modalities}_{labels or 'all'}_{seed}"


def longer_name(work, start, modalities) -> str:
    """The name of the part of the longer finetuning."""
    source = "both" if start == "pretrained" else ""
    name = part_name(start, source, modalities, max(work.scale.labels), 0)
    return f"longer_{name}"


def row_name(start: str, source: str) -> str:
    """What the table calls it: scratch, both → , sound → ."""
    return start if start == "scratch" else f"pretrained on {source}"


def cell(values: list[float]) -> str:
    """Mean and 95 % interval in per cent: `45.1 ± 1.2 (5)`; empty without values."""
    if not values:
        return ""
    mean, half = sweep_table.interval(values)
    text = f"{100 * mean:.1f}"
    return text + (
        f" ± {100 * half:.1f} ({len(values)})" if len(values) > 1 else " (1)"
    )


def table(work, seeds: int) -> str:
    """The page, of the parts that are there."""
    lines = [HEAD.format(**facts(work))]
    for labels in (*work.scale.labels, ALL):
        shown = f"{labels:,} labels" if labels else "All labels"
        lines += [
            f"\n## {shown}\n",
            "| | sound | picture | both |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {' | '.join(c)} |" for name, c in rows(work, labels, seeds)
        ]
    lines += [*differences(work, seeds), *wanted(work, seeds)]
    lines += [*longer_table(work), *frozen_table(work, seeds)]
    lines += [*inpainted_table(work), *settings(work)]
    return "\n".join(lines) + "\n"


HEAD = """\
# Does pretraining pay? The built-in digits

Written by `make results`; {clips:,} clips to pretrain on, for {epochs:g} epochs, and
{test:,} to test. Top-1 in per cent: mean ± 95 % interval (t distribution) and in
brackets the number of seeds. A seed has its own labelled clips, initialisation, order
and pretraining, the same for all rows; chance is 10. It took {minutes:.0f} minutes."""

OTHERS = """
The sections below are the files of docs/digits/, each measured by the commands that it
names. These want the data set under the name of the configs:

    python -m data.digits --out clips/digits --train 4000 --test 2000
    python -m data.prepare clips/digits/clips.csv --out datasets/digits \\
        --short-side source
"""


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells: str) -> str:
    """The first two rows of a Markdown table."""
    return line(*cells) + "\n" + "|---" * len(cells) + "|"


def facts(work) -> dict:
    data = work.found("data") or {"train": 0, "test": 0}
    counts = {"clips": data["train"], "test": data["test"]}
    return counts | {"epochs": work.scale.epochs, "minutes": work.minutes()}


def top_1(work, name: str) -> float | None:
    """Top-1 of a finetuning or of late fusion, None before it is done."""
    found = work.found(name)
    return found and found.get("eval/top_1", found.get("top_1"))


def per_seed(work, start, source, modalities, labels, seeds) -> dict[int, float]:
    """{seed: top-1} of what is done; `late` is late fusion of the two single models."""
    names = {
        seed: part_name(start, source, modalities, labels, seed)
        for seed in range(seeds)
    }
    found = {seed: top_1(work, name) for seed, name in names.items()}
    return {seed: x for seed, x in found.items() if x is not None}


def rows(work, labels: int, seeds: int) -> Iterator[tuple[str, list[str]]]:
    """(name, cells for sound, picture, both) at a number of labels."""
    if labels != ALL:
        found = [work.found(f"linear_{labels}_{seed}") for seed in range(seeds)]
        yield "linear", [cell([x[m] for x in found if x]) for m in demo.SETS]
    kinds = [("scratch", "")]
    if labels != ALL:
        kinds += [("pretrained", "both"), ("pretrained", "alone")]
    for start, source in kinds:
        cells = []
        for m in demo.SETS:
            own = m if source == "alone" else source
            values = {}
            if not (source == "alone" and m == "both"):
                values = per_seed(work, start, own, m, labels, seeds)
            cells.append(cell(list(values.values())))
        name = "each pretrained alone" if source == "alone" else row_name(start, source)
        yield name, cells
        late = per_seed(work, start, source, "late", labels, seeds)
        yield f"{name}: late fusion", ["", "", cell(list(late.values()))]


def differences(work, seeds: int) -> list[str]:
    """Paired differences between rows, in points, with their intervals."""
    lines = ["\n## Paired differences, in points\n"]
    lines += [header("", "labels", "difference")]
    both = ("pretrained", "both", "both")
    pairs = [
        ("pretrained − scratch, both", both, ("scratch", "", "both")),
        (
            *("pretrained − scratch, sound", ("pretrained", "both", "sound")),
            ("scratch", "", "sound"),
        ),
        (
            *("pretrained − scratch, picture", ("pretrained", "both", "picture")),
            ("scratch", "", "picture"),
        ),
        ("pretrained, both − late fusion", both, ("pretrained", "both", "late")),
    ]
    for labels, (name, one, other) in itertools.product(work.scale.labels, pairs):
        a = per_seed(work, *one, labels, seeds)
        b = per_seed(work, *other, labels, seeds)
        paired = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
        lines.append(line(name, f"{labels:,}", cell(paired)))
    return lines


def wanted(work, seeds: int) -> list[str]:
    """What was hoped for at the middle number of labels, and what came."""
    labels = work.scale.labels[len(work.scale.labels) // 2]
    row = lambda *names: per_seed(work, *names, labels, seeds)
    linear = {seed: work.found(f"linear_{labels}_{seed}") for seed in range(seeds)}
    both = row("pretrained", "both", "both")
    hopes = [
        ("both, pretrained − scratch", 0.1, both, row("scratch", "", "both")),
        ("both − late fusion", 0.0, both, row("pretrained", "both", "late")),
    ]
    for m in SINGLE:
        baseline = {seed: x[m] for seed, x in linear.items() if x}
        name = f"{m}, pretrained − linear"
        hopes.append((name, 0.0, row("pretrained", "both", m), baseline))
    lines = [f"\n## What was wanted at {labels:,} labels\n"]
    lines.append(
        "Whether more updates would mend a row is in the section after this.\n"
    )
    lines.append(header("", "wanted, points", "found", ""))
    for name, least, a, b in hopes:
        paired = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
        if paired:
            mean, _ = sweep_table.interval(paired)
            met = "met" if mean >= least - 1e-9 else "not met"
            lines.append(line(name, f"≥ {100 * least:.0f}", cell(paired), met))
    return lines


def longer_table(work) -> list[str]:
    """Whether the rows are short of labels or of updates."""
    labels, most = max(work.scale.labels), max(work.scale.steps)
    lines = [f"\n## {LONGER} times the updates\n"]
    lines.append(
        f"The first seed at {labels:,} labels, as in its row above and with "
        f"{LONGER * most:,} updates at the same rate:\n"
    )
    lines.append(header("", *demo.SETS))
    for start in STARTS:
        source = "both" if start == "pretrained" else ""
        name = row_name(start, source)
        short = [part_name(start, source, m, labels, 0) for m in demo.SETS]
        long = [longer_name(work, start, m) for m in demo.SETS]
        for text, names in ((name, short), (f"{name}, {LONGER * most:,}", long)):
            found = [top_1(work, x) for x in names]
            lines.append(line(text, *(cell([x]) if x else "" for x in found)))
    return lines


def frozen_table(work, seeds: int) -> list[str]:
    """Frozen features: the pretrained model's beside a random one's."""
    found = [work.found(f"frozen_{seed}") for seed in range(seeds)]
    found = [x for x in found if x]
    lines = ["\n## Frozen features\n"]
    lines += [
        "| model | classifier | sound | picture | both |",
        "|---|---|---|---|---|",
    ]
    labels = work.scale.labels[len(work.scale.labels) // 2]
    names = {"linear": f"linear, {labels:,} labels", "k-NN": "k-NN, all labels"}
    for model, kind in itertools.product(("pretrained", "random"), names):
        cells = [
            cell([x[model][kind]["+".join(demo.SETS[m])] for x in found])
            for m in demo.SETS
        ]
        lines.append(line(model, names[kind], *cells))
    return lines


def inpainted_table(work) -> list[str]:
    """Pictures made of sound, read by a classifier of real ones."""
    lines = ["\n## The picture that a sound makes it see\n"]
    heard = f"{1 - work.scale.sound_masked:.0%}"
    lines.append(
        "Pretrained with `objective.kind='inpaint'` and `model.fusion='separate'`, "
        f"{heard} of the sound heard: every place of the picture "
        "predicted from sound alone, and given to the classifier of pictures that was "
        "trained from scratch on all labels of real ones. Top-1, one seed; chance is "
        "10.\n"
    )
    found = work.found("inpainted")
    lines.append(header("pictures", "top-1"))
    names = {
        "generated": "made of the clip's own sound",
        "shuffled": "made of another clip's",
        "real": "real ones",
    }
    lines += [
        line(text, cell([found[k]] if found else [])) for k, text in names.items()
    ]
    lines.append(
        "\nWhere the first two are alike, what is drawn does not depend on what is "
        "heard; at chance it is the mean picture."
    )
    return lines


def settings(work) -> list[str]:
    """What the search found for each start."""
    lines = ["\n## Learning rates and lengths\n"]
    scale = work.scale
    first, *others = scale.steps
    longer = f", the best of them at {' and '.join(map(str, others))}" if others else ""
    lines.append(
        "Found on clips held out of training, with as many tries for each start: the "
        f"rates {', '.join(f'{x:g}' for x in scale.rates)} per 256 clips at {first} "
        f"updates{longer}. With all labels an update has four times the clips, and "
        f"{scale.epochs_of_all:g} passes over them are made. Rates and lengths "
        f"found at {scale.labels[len(scale.labels) // 2]:,} labels serve the other "
        "numbers too: with more labels the same updates pass over each fewer times, "
        "which is why rows may fall as labels grow. A choice at the edge of what was "
        "tried may have a better one beyond it. What is pretrained learns with the "
        "config's layer decay, scratch with none:\n"
    )
    lines.append(header("start", "", "rate per 256", "updates", "top-1 there"))
    for start, modalities in itertools.product(STARTS, demo.SETS):
        tried = {
            (rate, steps): top_1(work, f"search_{start}_{modalities}_{rate:g}_{steps}")
            for rate, steps in itertools.product(scale.rates, scale.steps)
        }
        done = {k: x for k, x in tried.items() if x is not None}
        if done:
            best = max(done, key=done.get)
            lines.append(
                line(start, modalities, f"{best[0]:g}", best[1], cell([done[best]]))
            )
    return lines
