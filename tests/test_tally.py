"""The report: what was lost is counted, flagged, and said where nobody misses it."""

import io

import numpy as np
import pytest
import rich.console

from data import prepare, tally
from data.records import Records
from tests.test_prepare import make_file, noise


def shown(report, width=200) -> str:
    text = io.StringIO()
    tally.show(report, rich.console.Console(file=text, width=width))
    return text.getvalue()


def report(clips=1000, **lost):
    keys = "clips failed hours without_audio without_rgb silent short_sound".split()
    counts = dict.fromkeys(keys, 0) | dict(clips=clips, per_class={}) | lost
    return dict(clips=clips, splits=dict(train=counts), folder="out/set/1.0.0")


def test_lost_sound_is_counted_and_flagged(tmp_path):
    make_file(tmp_path / "in" / "good.mkv", sound=noise(0))
    make_file(tmp_path / "in" / "silent.mkv", sound=np.zeros(6400, np.int16))
    make_file(tmp_path / "in" / "short.mkv", sound=noise(1, 3000))  # of 7680
    made = prepare.prepare(tmp_path / "in", tmp_path / "out", split=dict(train=1.0))
    assert made["silent"] == ["silent.mkv"] and made["short_sound"] == ["short.mkv"]
    data = Records(tmp_path / "out", "train")
    facts = {entry["id"]: data.record(i).facts for i, entry in enumerate(data.index)}
    flags = {id: (known["silent"], known["short_sound"]) for id, known in facts.items()}
    assert flags == {
        "good.mkv": (False, False),
        "silent.mkv": (True, False),
        "short.mkv": (False, True),
    }
    text = shown(made)
    assert "WARNING: 1 of 3 clips have sound that is all zeros." in text
    assert "WARNING: 1 of 3 clips have sound that ends before half of their" in text


@pytest.mark.parametrize(
    "lost, warned",
    [
        (dict(without_audio=10), False),
        (dict(without_audio=11), True),
        (dict(without_audio=5, silent=4, short_sound=2), True),
        (dict(without_rgb=10), False),
        (dict(without_rgb=11), True),
        (dict(silent=11), True),
    ],
)
def test_more_than_one_percent_prints_a_warning_at_the_end(lost, warned):
    text = shown(report(**lost))
    assert ("WARNING" in text) == warned
    if warned:  # in a frame, behind everything else
        assert text.index("The data set is") < text.index("╭") < text.index("WARNING")
        assert text.rstrip().endswith("╯")


def test_what_is_present_of_what_is_listed():
    some = report(clips=3) | dict(listed=dict(train=4, test=2))
    assert (
        "3 of 6 listed clips are present: train 3 of 4, test 0 of 2 (missing.csv names "
        "the others)." in shown(some)
    )
    whole = report(clips=3) | dict(listed=dict(train=3))
    assert "3 of 3 listed clips are present: train 3 of 3." in shown(whole)
    assert "listed" not in shown(report())
