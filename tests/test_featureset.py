"""Features of a set are those of each clip; a modality alone hears nothing else."""

import functools

import jax
import numpy as np
import pytest
import toy_models
from synthetic import Dataset, quick, tiny
from synthetic import config as config_of

from av_mae import UserError, api, extract, featureset, pretrain


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def model():
    config = tiny("digits/pretrain", model__fusion="early")
    params = pretrain.init(config, pretrain.build(config), jax.random.key(0))
    return api.Model(config, jax.tree.map(np.asarray, params), [])


def clips(config, **settings) -> Dataset:
    data = Dataset(config, num_clips=6, **settings)
    data.without = {"has_rgb": {1}, "has_audio": {2}}
    return data


@pytest.fixture(scope="module")
def found(model):
    return featureset.compute(model, clips(model.config), 4)


def test_order_labels_and_what_clips_have(found):
    assert list(found.features) == ["rgb", "spectrogram", "rgb+spectrogram"]
    assert found.ids == [f"clip {i}" for i in range(6)]
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(found.has["rgb"], np.arange(6) != 1)
    np.testing.assert_array_equal(found.has["spectrogram"], np.arange(6) != 2)
    assert found.has["rgb+spectrogram"].all()
    assert all(x.shape == (6, 16) for x in found.features.values())


def test_what_is_only_heard_has_features_of_the_last_layer():
    """AV-MaskEnhancer: its sound goes through no layer of the encoder."""
    config = config_of("ucf101/avmaskenhancer_pretrain", "concat,smoke")
    init = functools.partial(pretrain.init, config, pretrain.build(config))
    model = api.Model(config, toy_models.random_params(init), [])
    last = featureset.compute(model, Dataset(config, num_clips=2), 2)
    assert list(last.features) == ["rgb", "spectrogram", "rgb+spectrogram"]
    first = featureset.compute(model, Dataset(config, num_clips=2), 2, layer=0)
    assert list(first.features) == ["rgb"]


def test_a_modality_alone_does_not_know_the_other(model, found):
    """Where the joint encoder would tell the picture's tokens of the sound."""
    other = clips(model.config)
    original = other.clip

    def silent(i):
        row = original(i)
        return row | {"waveform": np.zeros_like(row["waveform"])}

    other.clip = silent
    again = featureset.compute(model, other, 4)
    np.testing.assert_allclose(again.features["rgb"], found.features["rgb"], atol=1e-5)
    both = "rgb+spectrogram"
    heard = [0, 1, 3, 4, 5]
    difference = np.abs(again.features[both] - found.features[both]).max(axis=1)
    assert (difference[heard] > 1e-3).all() and difference[2] < 1e-5


def test_features_are_those_of_clips_as_files(model, found):
    """What `model.features` says of the same arrays, one modality at a time."""
    batch = next(clips(model.config).evaluate(1))
    row = {k: v for k, v in batch.items() if k not in ("label", "index", "valid")}
    encode = model._encode(model.config.model.depth - 1, "mean")
    row["has_audio"] = np.zeros_like(row["has_audio"])
    expected = np.asarray(encode(model.params, row)["rgb"])
    np.testing.assert_allclose(found.features["rgb"][:1], expected, atol=1e-5)


def test_tokens_are_no_features_of_a_clip(model):
    with pytest.raises(UserError, match="--pool none gives tokens"):
        featureset.compute(model, clips(model.config), 4, pool="none")


def test_unit_and_chunks():
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(featureset.unit(x), [[0.6, 0.8], [0, 0]])
    parts = [np.arange(5)[part].tolist() for part in featureset.chunks(5, 2)]
    assert parts == [[0, 1], [2, 3], [4]]


def table(ids, labels, **arrays) -> extract.Table:
    zeros = np.zeros(len(ids))
    return extract.Table(ids, labels, zeros, zeros, arrays)


def test_files_of_extract_are_read(tmp_path):
    """Two files: classes of both in one order, NaN is what a clip does not have."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    lacking = x.copy()
    lacking[1] = np.nan
    one = table(["a", "b", "c"], ["dog", "cat", "dog"], rgb=x, spectrogram=lacking)
    one.arrays["joint"] = x + 1
    two = table(["c", "a"], ["cow", "cat"], spectrogram=x[:2], joint=x[:2])
    for name, found in (("one.npz", one), ("two.safetensors", two)):
        extract.writer_of(tmp_path / name)(tmp_path / name, found)
    one, two = featureset.read(tmp_path / "one.npz", tmp_path / "two.safetensors")
    assert one.classes == two.classes == ["cat", "cow", "dog"]
    assert one.labels.tolist() == [2, 0, 2] and two.labels.tolist() == [1, 0]
    assert list(one.features) == ["rgb", "spectrogram", "rgb+spectrogram"]
    assert list(two.features) == ["spectrogram"]
    assert one.has["spectrogram"].tolist() == [True, False, True]
    np.testing.assert_array_equal(one.features["rgb+spectrogram"], x + 1)

    both = featureset.paired(one, two)  # c lies elsewhere in the second file
    assert both.ids == ["a", "c"]
    np.testing.assert_array_equal(both.features["rgb"], x[[0, 2]])
    np.testing.assert_array_equal(both.features["spectrogram"], x[[1, 0]])
    with pytest.raises(UserError, match="no features of rgb"):
        featureset.paired(two, one)


def test_a_file_of_tokens_is_refused(tmp_path):
    tokens = table(["a"], [""], rgb=np.zeros((1, 4, 2), np.float32))
    extract.writer_of(tmp_path / "x.npz")(tmp_path / "x.npz", tokens)
    with pytest.raises(UserError, match="x.npz holds tokens: extract with --pool mean"):
        featureset.read(tmp_path / "x.npz")
