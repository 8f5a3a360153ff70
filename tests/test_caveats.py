"""What is said beside a number, and when nothing is."""

import synthetic

from av_mae import caveats


class Data:
    """A data set that knows how many clips were listed, and what else is to be said."""

    num_clips = 9

    def __init__(self, *notes, having=None, **counts):
        self.info, self.notes = {"splits": {"test": counts}}, list(notes)
        self.having = having or {}


def pair():
    return synthetic.config("audioset/finetune", ""), synthetic.config(
        "audioset/pretrain", ""
    )


def test_a_part_of_a_list_is_told():
    config, _ = pair()
    config.data.dir, config.eval.split = "datasets/x", "test"
    (said,) = caveats.of_data(config, Data(clips=40, listed=50), "test")
    assert said.startswith("40 of 50 listed clips present in test of datasets/x")
    for whole in (Data(clips=50, listed=50), Data(clips=50), Data()):
        assert caveats.of_data(config, whole, "test") == []
    assert caveats.of_data(config, Data("2 files failed"), "test") == ["2 files failed"]


def test_an_evaluation_that_is_cut_is_told():
    """data.limit is of the training split; where that is evaluated too, it is told."""
    config, _ = pair()
    config.data.limit, config.data.split, config.eval.split = 20, "train", "test"
    assert caveats.of_data(config, Data(), "train") == []
    config.eval.split = "train"
    (said,) = caveats.of_data(config, Data(), "train")
    assert said.startswith("train is cut to 20 clips (data.limit)")


def test_what_a_source_has_too_much_is_told():
    assert caveats.of_unused([], 9) == []
    (said,) = caveats.of_unused([f"decoder/{i}" for i in range(5)], 9)
    assert said.startswith("5 of 9 parameters of the source are left out: decoder/0, ")
    assert said.endswith("decoder/3, …")


def test_degraded_input_is_told_of_the_evaluation():
    config, _ = pair()
    config.eval.split, config.eval.corruption = "test", "noise:3"
    degraded = "evaluated on degraded input: noise:3"
    part = Data(clips=40, listed=50)
    (listed,) = caveats.of_data(config, part, "test")
    assert caveats.of_evaluation(config, part, []) == [listed, degraded]
    assert caveats.of_evaluation(config, part, ["a", listed]) == [degraded]
    config.eval.corruption = ""
    assert caveats.of_evaluation(config, part, [listed]) == []


def test_records_that_an_evaluation_left_out_are_told():
    assert caveats.of_left_out(0, "test") == []
    (said,) = caveats.of_left_out(2, "test")
    assert said == "2 damaged records of test were left out of the evaluation"


def test_subsets_that_not_all_clips_have_are_told():
    config, _ = pair()
    config.eval.split, config.eval.modalities = "test", ("rgb", "spectrogram")
    data = Data(having={"rgb": 9, "spectrogram": 7})
    told = "numbers of spectrogram are of the 7 of 9 clips of test that have it"
    assert caveats.of_evaluation(config, data, []) == [told]
    config.eval.modalities = ("rgb",)
    assert caveats.of_evaluation(config, data, []) == []


def test_other_settings_are_told_the_first_of_many():
    assert caveats.of_changes({}, "other") == []
    few = caveats.of_changes({"steps": (6, 12), "eval.split": ("a", "b")}, "other")
    assert few == ["other: steps is 12, not 6, eval.split is 'b', not 'a'"]
    (many,) = caveats.of_changes({f"x{i}": (0, 1) for i in range(9)}, "other")
    assert many.endswith("x3 is 1, not 0, 5 more")


def test_parameters_without_a_source_are_told():
    fresh = ["head/kernel", *(f"encoder/rgb/block_{i}/x" for i in range(6))]
    (said,) = caveats.of_fresh(fresh, 20, ["head/.*"])
    assert said.startswith("6 of 20 parameters are not from the source: encoder/rgb/")
    assert said.endswith("block_3/x, …")
    assert caveats.of_fresh(["head/kernel"], 20, ["head/.*"]) == []


def test_other_inputs_than_the_source_s_are_told():
    config, theirs = pair()
    config.picture.update(normalise="fixed", mean=(0.5,) * 3, std=(0.5,) * 3)
    theirs.picture.update(normalise="fixed", mean=(0.5,) * 3, std=(0.5,) * 3)
    for sound in (config.spectrogram, theirs.spectrogram):
        sound.update(preset="mbt", normalise="fixed", mean=1.0, std=2.0)
    assert caveats.of_inputs(theirs, config) == []
    config.spectrogram.mean = 1.01  # half a hundredth of the deviation
    config.spectrogram.normalise = "dataset"  # a number by now, wherever it is from
    assert caveats.of_inputs(theirs, config) == []
    config.spectrogram.mean = 1.1
    (said,) = caveats.of_inputs(theirs, config)
    assert said.startswith("spectrogram.mean and .std are 1.1 and 2, but the source")
    theirs.spectrogram.normalise = "none"
    (said,) = caveats.of_inputs(theirs, config)
    assert said.endswith("was trained with 0 and 1")
    theirs.spectrogram.normalise = "clip"
    (said,) = caveats.of_inputs(theirs, config)
    assert said.startswith("spectrogram.normalise is 'dataset', but the source")
    theirs.modalities = ("rgb",)  # it never heard anything
    assert caveats.of_inputs(theirs, config) == []
    config.picture.std = (0.5, 0.5, 0.25)
    (said,) = caveats.of_inputs(theirs, config)
    assert said.startswith("picture.mean and .std are 0.5, 0.5, 0.5 and 0.5, 0.5, 0.25")


def test_another_preset_is_told_with_its_rate():
    config, theirs = pair()
    theirs.picture = config.picture
    theirs.spectrogram.update(**config.spectrogram.to_dict())
    theirs.spectrogram.preset = "kaldi"
    (said,) = caveats.of_inputs(theirs, config)
    assert said == (
        "spectrogram.preset is 'mbt' (16000 Hz), but the source was trained with "
        "'kaldi' (16000 Hz)"
    )


def test_other_class_names_are_told():
    meta = {"labels": ["bell", "drum"]}
    assert caveats.of_labels(meta, ("bell", "drum")) == []
    assert caveats.of_labels(meta, None) == caveats.of_labels({}, ["a"]) == []
    assert len(caveats.of_labels(meta, ["drum", "bell"])) == 1
    heads = {"labels": {"verb": ["a"], "noun": ["b"]}}
    assert caveats.of_labels(heads, {"verb": ("a",), "noun": ("b",)}) == []
    assert len(caveats.of_labels(heads, {"verb": ("a",), "noun": ("c",)})) == 1


def test_a_line_for_each():
    assert caveats.text([]) == ""
    assert caveats.text(["a", "b"]) == "\n  NOTE: a.\n  NOTE: b."
    assert caveats.of_meta({}) == [] and caveats.of_meta({"caveats": ["a"]}) == ["a"]
