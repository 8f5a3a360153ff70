"""Which splits a config opens, and with which labels (test_main trains on them)."""

import pytest
from synthetic import config

from av_mae import ConfigError, datasets


@pytest.fixture
def opened(monkeypatch):
    """What the pipeline is asked for, as (split, label, modalities)."""
    calls = []

    def load(settings, split, *, label, modalities, **more):
        calls.append((split, label, modalities))
        dataset = object.__new__(datasets.pipeline.Dataset)
        dataset.notes = []
        return dataset

    monkeypatch.setattr(datasets.pipeline, "load", load)
    return calls


def test_both_splits_with_the_labels_that_the_loss_wants(opened):
    settings = config("digits/finetune")
    both = ("rgb", "spectrogram")
    assert list(datasets.load(settings)) == ["train", "eval"]
    assert opened == [("train", "class", both), ("test", "class", both)]
    settings.mode = "eval"  # needs no training split
    assert list(datasets.load(settings)) == ["eval"] and opened.pop() == opened[1]
    settings.objective.kind = "sigmoid"
    datasets.split(settings, "test")
    settings.model.label_heads = (("verb", 0), ("noun", 0))
    datasets.split(settings, "test")
    datasets.split(config("digits/pretrain"), "test")
    datasets.split(config("digits/pretrain"), "test", "class")
    assert [label for _, label, _ in opened[2:]] == [
        *("multilabel", "heads", "none", "class")
    ]
    settings.model.label_heads, settings.objective.kind = (), "softmx"
    with pytest.raises(ConfigError, match="objective.kind.*did you mean 'softmax'"):
        datasets.split(settings, "test")


def test_statistics_of_the_data_set_are_filled_in(opened, monkeypatch):
    sound = lambda *where, keep: seen.append((where[2], keep)) or (-1.5, 2.5, False)
    seen = []
    monkeypatch.setattr(datasets.stats, "sound", sound)
    settings = config("digits/finetune")
    settings.spectrogram.normalise = "dataset"
    assert datasets.load(settings)["eval"].notes == []
    assert (settings.spectrogram.mean, settings.spectrogram.std) == (-1.5, 2.5)
    settings.mode = "eval"  # the training split need not be there
    (note,) = datasets.load(settings)["eval"].notes
    assert "are those of test, since none of the training's are stored" in note
    assert seen == [("train", True), ("test", False)]
    settings.modalities, settings.spectrogram.mean = ("rgb",), 0.0
    datasets.load(settings)
    assert settings.spectrogram.mean == 0.0


def test_fixed_statistics_are_looked_over(opened, monkeypatch):
    seen = []

    def check(settings, split):
        seen.append((settings, split))
        return "they are not those of the data"

    monkeypatch.setattr(datasets.stats, "check_fixed", check)
    settings = config("digits/finetune")
    assert datasets.load(settings)["eval"].notes == []
    settings.spectrogram.normalise = "fixed"
    found = datasets.load(settings)
    assert seen == [(settings, "train")]
    settings.mode = "eval"  # the training split need not be there
    datasets.load(settings)
    assert seen[1:] == [(settings, "test")]
    for dataset in found.values():  # told beside the numbers too
        assert dataset.notes == ["they are not those of the data"]
