"""One interface for all sources: what they have in common, labels of several kinds."""

import numpy as np
import pytest
import toy
from ml_collections import ConfigDict
from test_pipeline import CONFIG

from data import ConfigError, pipeline, prepare, sources

VERBS, NOUNS = ("cut", "wash"), ("bread", "cup", "knife")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """(CSV of 6 clips with a verb and a noun, the same prepared)."""
    home = tmp_path_factory.mktemp("heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        lines = ["path,split,label_verb,label_noun"]
        for i in range(6):
            toy.write_clip(home / f"{i}.mp4", i, seconds=0.8)
            lines.append(f"{i}.mp4,train,{VERBS[i % 2]},{NOUNS[i % 3]}")
        (home / "clips.csv").write_text("\n".join(lines))
        prepare.prepare(home / "clips.csv", home / "set", jobs=1)
        yield home / "clips.csv", home / "set"


def load(where, label="heads", **fields):
    config = CONFIG | dict(dir=str(where), size=24, short_side=32) | fields
    return pipeline.load(ConfigDict(config), "train", label=label)


@pytest.mark.parametrize("source", ["records", "folder"])
def test_labels_of_several_kinds(heads, source):
    dataset = load(heads[source == "records"], source=source)
    assert dataset.label_names == {"verb": list(VERBS), "noun": list(NOUNS)}
    batch = next(dataset.train(6))
    numbers = [int(dataset.ids[i][0]) for i in batch["index"]]
    assert sorted(numbers) == list(range(6))
    assert batch["label"].keys() == {"verb", "noun"}
    for head, count in (("verb", 2), ("noun", 3)):
        assert batch["label"][head].dtype == np.int32
        assert batch["label"][head].tolist() == [i % count for i in numbers]
    padded = list(dataset.evaluate(4))[-1]
    assert padded["label"]["noun"].shape == (4,) and not padded["valid"][2:].any()
    counts = dataset.info.get("splits", {}).get("train", {}).get("per_class")
    assert source == "folder" or counts == {
        **{f"verb: {x}": 3 for x in VERBS},
        **{f"noun: {x}": 2 for x in NOUNS},
    }


def test_labels_of_the_other_kind_are_told(heads, tmp_path):
    with pytest.raises(ConfigError, match="has verb, noun; set config.model.label_hea"):
        load(heads[1], label="class")
    assert "label" not in next(load(heads[1], label="none").train(2))
    toy.write_folder(tmp_path, 2)
    with pytest.raises(ConfigError, match="has one kind of label; set .* to ()"):
        load(tmp_path, source="folder")


def test_sources_that_do_not_fit_are_told(heads):
    with pytest.raises(ConfigError, match="source='disk' is none of .'records', 'dm"):
        load(heads[1], source="disk")
    with pytest.raises(ConfigError, match="source='disk' is none of"):
        sources.open_records(heads[1], "train", "disk")
    for source in ("records", "folder"):
        with pytest.raises(ConfigError, match="holds waveforms, no log-mels"):
            sources.open_records(heads[source == "records"], "train", source, mels=128)
