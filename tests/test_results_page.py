"""The page of results: means, intervals and pairs of what the parts say."""

from test_results import made

from av_mae import results_page, sweep_table


def test_cells():
    assert results_page.cell([]) == ""
    assert results_page.cell([0.5]) == "50.0 (1)"
    mean, half = sweep_table.interval([0.1, 0.2, 0.4])
    want = f"{100 * mean:.1f} ± {100 * half:.1f} (3)"
    assert results_page.cell([0.1, 0.2, 0.4]) == want


def test_pairs_are_of_one_seed(tmp_path):
    """A difference takes the seeds that both have; the interval is of differences."""
    found = {}
    for seed, (a, b) in enumerate([(0.5, 0.3), (0.7, 0.5), (0.9, None)]):
        found[f"pretrained_both_both_20_{seed}"] = {"eval/top_1": a}
        if b is not None:
            found[f"scratch_both_20_{seed}"] = {"eval/top_1": b}
    text = results_page.table(made(tmp_path, found), 3)
    assert "| pretrained − scratch, both | 20 | 20.0 ± 0.0 (2) |" in text
    assert "| pretrained on both |  |  | 70.0 ± 49.7 (3) |" in text
    assert "It took 2 minutes" in text


def test_what_sound_was_made_into_has_its_rows(tmp_path):
    part = {"generated": 0.2, "shuffled": 0.1, "real": 0.9}
    text = results_page.table(made(tmp_path, {"inpainted": part}), 1)
    assert "| made of the clip's own sound | 20.0 (1) |" in text
    assert "| made of another clip's | 10.0 (1) |" in text
    assert "| real ones | 90.0 (1) |" in text


def test_what_was_wanted_is_said_as_it_falls(tmp_path):
    """By the mean of the paired differences: ten points, and none."""
    found = {}
    for seed, (a, b) in enumerate([(0.5, 0.45), (0.7, 0.54)]):
        found[f"pretrained_both_both_20_{seed}"] = {"eval/top_1": a}
        found[f"scratch_both_20_{seed}"] = {"eval/top_1": b}
        found[f"pretrained_both_late_20_{seed}"] = {"top_1": a + 0.01}
        found[f"pretrained_both_sound_20_{seed}"] = {"eval/top_1": 0.3}
        found[f"linear_20_{seed}"] = {"sound": 0.3, "picture": 0.4, "both": 0.5}
    text = results_page.table(made(tmp_path, found), 3)
    rows = [x for x in text.split("## What was wanted at 20 labels")[1].splitlines()]
    rows = [x for x in rows if x.startswith("| ") and "wanted" not in x][:3]
    assert rows[0].startswith("| both, pretrained − scratch | ≥ 10 | 10.5 ±")
    assert rows[0].endswith("| met |")
    assert rows[1] == "| both − late fusion | ≥ 0 | -1.0 ± 0.0 (2) | not met |"
    assert rows[2] == "| sound, pretrained − linear | ≥ 0 | 0.0 ± 0.0 (2) | met |"
    assert "picture, pretrained − linear" not in text  # of it nothing is known


def test_longer_training_stands_beside_the_row(tmp_path):
    found = {
        "scratch_sound_20_0": {"eval/top_1": 0.2},
        "longer_scratch_sound_20_0": {"eval/top_1": 0.4},
        "longer_pretrained_both_both_20_0": {"eval/top_1": 0.6},
    }
    text = results_page.table(made(tmp_path, found), 1)
    assert "| scratch, 16 | 40.0 (1) |  |  |" in text
    assert "| scratch | 20.0 (1) |  |  |\n| scratch, 16 |" in text
    assert "| pretrained on both, 16 |  |  | 60.0 (1) |" in text
