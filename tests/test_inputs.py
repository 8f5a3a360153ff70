"""From a host batch to patches: views, values, and which clips have what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenic import quick
from synthetic import config

from av_mae import ConfigError, inputs, spectrogram, tokens
from av_mae.mixing import Mix

KEY = jax.random.key(0)


def small():
    """4 frames of 16 by 16 and 0.32 s of sound; patches of 8, tubes of 2."""
    settings = config("audioset/pretrain", "smoke")
    settings.data.update(num_frames=4, size=16, audio_seconds=0.32)
    settings.model.variant = "Ti/8x2"
    return settings


def batch_of(v=1):
    rng = np.random.default_rng(0)
    batch = {
        "rgb": rng.integers(0, 256, (3, v, 4, 16, 16, 3)).astype(np.uint8),
        "waveform": rng.integers(-9000, 9000, (3, v, 5120)).astype(np.int16),
        "has_rgb": np.array([True, False, True]),
        "has_audio": np.array([True, True, False]),
    }
    return jax.tree.map(jnp.asarray, batch)


def test_layouts_of_the_published_input():
    found = inputs.layouts(config("audioset/pretrain", ""))
    assert found["rgb"] == inputs.Layout((8, 14, 14), (2, 16, 16), 3)
    assert (found["rgb"].n, found["rgb"].f) == (1568, 1536)
    assert found["spectrogram"] == inputs.Layout((62, 8), (16, 16), 1)
    assert (found["spectrogram"].n, found["spectrogram"].f) == (496, 256)
    assert list(found) == ["rgb", "spectrogram"]


def test_one_modality_alone():
    settings = small()
    settings.modalities = ("spectrogram",)
    assert list(inputs.layouts(settings)) == ["spectrogram"]
    batch = batch_of()
    del batch["rgb"], batch["has_rgb"]
    patches, present = inputs.make(settings, True)(batch, KEY, False)
    assert list(patches) == list(present) == ["spectrogram"]


@pytest.mark.parametrize(
    "data, name", [(dict(size=8), "rgb"), (dict(audio_seconds=0.1), "spectrogram")]
)
def test_a_patch_larger_than_the_input_is_named(data, name):
    settings = small()
    settings.data.update(data)
    settings.model.variant = "Ti/16x2"
    with pytest.raises(ConfigError, match=f"'Ti/16x2' cuts {name} .* do not fit"):
        inputs.layouts(settings)


def test_a_row_of_cepstral_coefficients_is_a_patch():
    settings, batch = small(), batch_of()
    settings.spectrogram.preset = "mfcc"
    assert inputs.layouts(settings)["spectrogram"] == inputs.Layout((32, 1), (1, 13), 1)
    patches, _ = inputs.make(settings, False)(batch, KEY, False)
    np.testing.assert_array_equal(
        patches["spectrogram"], spectrogram.mfcc(batch["waveform"][:, 0])
    )


def test_an_unknown_preset_is_named():
    settings = small()
    settings.spectrogram.preset = "mtb"
    with pytest.raises(ConfigError, match="spectrogram.preset is 'mtb': .*'mbt'"):
        inputs.layouts(settings)


def test_pixels_are_normalised_and_cut():
    settings, batch = small(), batch_of()
    settings.picture = dict(
        normalise="fixed", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)
    )
    patches, present = quick(
        lambda batch: inputs.make(settings, False)(batch, KEY, False)
    )(batch)
    assert present is None
    assert patches["rgb"].shape == (3, 8, 384) and patches["rgb"].dtype == jnp.float32
    back = tokens.unpatchify(patches["rgb"], (2, 2, 2), (2, 8, 8))
    wanted = (np.asarray(batch["rgb"])[:, 0] / 255 - np.array([0.4, 0.5, 0.6])) / [
        0.1,
        0.2,
        0.3,
    ]
    np.testing.assert_allclose(back, wanted, rtol=1e-5, atol=1e-5)


def test_sound_is_the_normalised_log_mel():
    settings, batch = small(), batch_of()
    rows = spectrogram.log_mel(jnp.asarray(batch["waveform"][:, 0]), "mbt")
    for normalise, mean, std in (("none", 0.0, 1.0), ("fixed", 1.5, 2.0)):
        settings.spectrogram.update(normalise=normalise, mean=mean, std=std)
        patches = inputs.make(settings, False)(batch, KEY, False)[0]["spectrogram"]
        assert patches.shape == (3, 4 * 16, 64)
        back = tokens.unpatchify(patches, (4, 16), (8, 8))
        np.testing.assert_allclose(back, (rows - mean) / std, rtol=1e-5, atol=1e-5)


def test_precomputed_log_mels_are_taken_as_they_are():
    settings, batch = small(), batch_of(v=2)
    del batch["waveform"]
    rows = np.random.default_rng(0).normal(size=(3, 2, 32, 128, 1)).astype(np.float32)
    batch["spectrogram"] = jnp.asarray(rows)
    settings.spectrogram.update(
        preset="precomputed", normalise="fixed", mean=1.5, std=2.0
    )
    assert inputs.layouts(settings)["spectrogram"].grid == (4, 16)
    patches = inputs.make(settings, False)(batch, KEY, False)[0]["spectrogram"]
    back = tokens.unpatchify(patches, (4, 16), (8, 8))
    wanted = (rows.reshape(6, 32, 128, 1) - 1.5) / 2
    np.testing.assert_allclose(back, wanted, rtol=1e-6, atol=1e-6)
    settings.spectrogram.normalise = "dataset"
    with pytest.raises(ConfigError, match="'dataset', which is measured on the sound"):
        inputs.layouts(settings)


def test_views_are_rows_in_clip_order():
    settings, batch = small(), batch_of(v=2)
    prepare = quick(lambda batch: inputs.make(settings, True)(batch, KEY, False))
    patches, present = prepare(batch)
    assert len(patches["rgb"]) == len(patches["spectrogram"]) == 6
    np.testing.assert_array_equal(present["rgb"], [1, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(present["spectrogram"], [1, 1, 1, 1, 0, 0])
    for view in range(2):
        alone = {
            k: x[:, view : view + 1] if x.ndim > 1 else x for k, x in batch.items()
        }
        single = quick(lambda batch: inputs.make(settings, True)(batch, KEY, False))
        for m, x in single(alone)[0].items():
            np.testing.assert_allclose(patches[m][view::2], x, rtol=1e-5, atol=1e-5)


def test_flips_happen_in_training_alone():
    settings, batch = small(), batch_of()
    settings.augment.flip = 1.0
    prepare = inputs.make(settings, False)
    still, turned = (prepare(batch, KEY, train)[0]["rgb"] for train in (False, True))
    back = lambda x: tokens.unpatchify(x, (2, 2, 2), (2, 8, 8))
    np.testing.assert_array_equal(back(turned), back(still)[:, :, :, ::-1])


@pytest.mark.parametrize("missing", [False, True])
def test_rows_are_mixed_once_they_are_normalised(missing):
    """The first and the last of three clips; of these the last has no sound."""
    settings, batch = small(), batch_of()
    prepare = inputs.make(settings, missing)
    none = (jnp.array(False), jnp.zeros(4, int))
    mixes = {m: Mix(jnp.float32(0.25), *none) for m in ("rgb", "spectrogram")}
    plain, mixed = (prepare(batch, KEY, True, x)[0] for x in (None, mixes))
    for m, kept in (("rgb", 0.25), ("spectrogram", 1.0 if missing else 0.25)):
        wanted = kept * plain[m][0] + (1 - kept) * plain[m][2]
        np.testing.assert_allclose(mixed[m][0], wanted, rtol=1e-5, atol=1e-5)


def test_rows_repeat_each_clip_for_its_views():
    np.testing.assert_array_equal(inputs.rows(jnp.array([3, 5]), 4), [3, 3, 5, 5])
    labels = jnp.array([[1.0, 0], [0, 1]])
    wanted = [[1, 0]] * 3 + [[0, 1]] * 3
    np.testing.assert_array_equal(inputs.rows(labels, 6), wanted)


def test_pixels_are_the_picture_before_it_was_normalised():
    settings, batch = small(), batch_of()
    settings.picture.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    patches = inputs.make(settings, False)(batch, KEY, False)[0]["rgb"]
    picture = jnp.asarray(batch["rgb"]).reshape(-1, *batch["rgb"].shape[2:]) / 255
    wanted = tokens.patchify(picture, (2, 8, 8))
    np.testing.assert_allclose(inputs.pixels(settings, patches), wanted, atol=1e-6)
    back = inputs.from_pixels(settings, inputs.pixels(settings, patches))
    np.testing.assert_allclose(back, patches, rtol=1e-5, atol=1e-5)


def test_a_layout_knows_the_frames_of_its_tubes():
    cuts = inputs.layouts(small())
    assert (cuts["rgb"].frames, cuts["spectrogram"].frames) == (2, 1)


def test_sound_is_shifted_in_training_alone():
    settings, batch = small(), batch_of()
    settings.augment.time_shift = True
    plain = small()
    make = lambda c, train: quick(
        lambda batch: inputs.make(c, False)(batch, KEY, train)[0]["spectrogram"]
    )(batch)
    np.testing.assert_array_equal(make(settings, False), make(plain, False))
    assert not np.allclose(make(settings, True), make(plain, True))
    # Nothing is lost: the same values in another order.
    both = [np.sort(make(c, True), axis=None) for c in (settings, plain)]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


PUBLISHED = dict(colour=0.8, grey=0.1, flip=0.5, erase=0.25, time_shift=True)
PUBLISHED |= dict(frequency_masks=2, frequency_width=36, time_masks=4, time_width=8)


def numbers(settings, batch, train, rng=KEY):
    """The patches of a batch."""
    made = quick(lambda batch, rng: inputs.make(settings, False)(batch, rng, train)[0])
    return jax.tree.map(np.asarray, made(batch, rng))


def test_augmentation_happens_in_training_alone_and_costs_nothing_where_it_is_off():
    settings, batch = small(), batch_of()
    plain = small()
    settings.augment.update(PUBLISHED)
    plain.augment.flip = 0.0
    text = lambda config, train: str(
        jax.make_jaxpr(lambda batch: inputs.make(config, False)(batch, KEY, train))(
            batch
        )
    )
    evaluated = text(plain, False)
    assert text(settings, False) == evaluated == text(plain, True)
    assert "random_bits" not in evaluated and "random_bits" in text(settings, True)
    still, moving = (numbers(settings, batch, train) for train in (False, True))
    assert all(not np.allclose(still[m], moving[m]) for m in still)


def test_erased_boxes_and_bands_lie_in_the_normalised_values():
    """A box of noise whatever the statistics; bands at the data set's mean."""
    settings, batch = small(), batch_of()
    settings.picture.update(mean=(9.0, 9.0, 9.0), std=(1.0, 1.0, 1.0))
    settings.spectrogram.update(normalise="fixed", mean=99.0, std=1.0)
    settings.augment.update(flip=0.0, erase=1.0, time_masks=3, time_width=20)
    found = numbers(settings, batch, True)
    for m, values in numbers(settings, batch, False).items():
        changed = np.abs(found[m] - values) > 0.5
        assert changed.any((1, 2)).sum() >= 2 and values.max() < -7
        assert np.abs(found[m][changed]).max() < 6


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("colour", 1.2, "augment.colour is 1.2, but it is a probability"),
        ("erase", -0.1, "augment.erase is -0.1, but it is a probability"),
        ("frequency_masks", 2, "frequency_masks is 2 and augment.frequency_width 0"),
        ("time_width", 48, "augment.time_masks is 0 and augment.time_width 48"),
    ],
)
def test_an_impossible_augmentation_is_named(field, value, words):
    settings = small()
    settings.augment[field] = value
    with pytest.raises(ConfigError, match=words):
        inputs.make(settings, False)


def test_evaluation_is_degraded_by_the_clips_number_in_the_data_set():
    """Whatever the batch, its order and size, and the random key; not in training."""
    settings, batch = config("audioset/finetune", "smoke"), batch_of(v=2)
    settings.data.update(small().data)
    settings.model.variant = "Ti/8x2"
    settings.augment.update({name: type(x)() for name, x in PUBLISHED.items()})  # off
    batch["index"] = jnp.array([7, 900, 31])
    settings.eval.corruption = "mute:1"
    silent = numbers(settings, batch, False)
    assert len(np.unique(silent["spectrogram"])) == 1
    settings.modalities, settings.eval.corruption = ("rgb",), "noise:30"
    found = numbers(settings, batch, False)
    assert np.abs(found["rgb"] - silent["rgb"]).mean() > 0.1
    own = {key: x for key, x in batch.items() if key != "index"}  # of no data set
    np.testing.assert_array_equal(numbers(settings, own, False)["rgb"], silent["rgb"])
    order = jnp.array([2, 0])
    fewer = {k: x[order] for k, x in batch.items()}
    again = numbers(settings, fewer, False, jax.random.key(5))
    both = found["rgb"].reshape(3, 2, *found["rgb"].shape[1:])[np.asarray(order)]
    np.testing.assert_allclose(again["rgb"], both.reshape(again["rgb"].shape))
    np.testing.assert_array_equal(numbers(settings, batch, True)["rgb"], silent["rgb"])


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_training_on_degraded_input_draws_anew_at_every_step(name):
    settings, batch = config(f"folder/{name}", "smoke"), batch_of()
    settings.data.update(small().data)
    settings.model.variant, settings.augment.flip = "Ti/8x2", 0.0
    settings.modalities = ("rgb",)
    batch["index"] = jnp.arange(3)
    usual = numbers(settings, batch, True)
    settings.augment.corruption = "noise:30"
    found, other = (numbers(settings, batch, True, jax.random.key(i)) for i in range(2))
    for values in (usual["rgb"], other["rgb"]):
        assert np.abs(found["rgb"] - values).mean() > 0.1
    np.testing.assert_array_equal(numbers(settings, batch, False)["rgb"], usual["rgb"])


@pytest.mark.parametrize("field", ["eval", "augment"])
def test_a_wrong_corruption_names_its_field(field):
    settings = config("audioset/finetune", "smoke")
    settings[field].corruption = "blurred:2"
    with pytest.raises(ConfigError, match=f"{field}.corruption is 'blurred': did you"):
        inputs.make(settings, False)
    settings[field].corruption = "mute:0.5"
    settings.spectrogram.preset = "precomputed"
    with pytest.raises(ConfigError, match=f"{field}.corruption .* needs waveforms"):
        inputs.make(settings, False)
