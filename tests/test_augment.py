"""What the step does with a batch before the model sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae import ConfigError, augment

HALF = (0.5, 0.5, 0.5)


def frames(batch=1, seed=0):
    shape = (batch, 2, 3, 4, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_bytes_become_normalised_values():
    ends = jnp.array([0, 255], jnp.uint8)[None, :, None, None, None].repeat(3, -1)
    found = augment.prepare_rgb(ends, HALF, HALF)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0, :, 0, 0], [[-1, -1, -1], [1, 1, 1]])


def test_each_channel_has_its_own_statistics():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = frames()
    found = augment.prepare_rgb(jnp.asarray(clip), mean, std)
    wanted = (clip / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_flip_is_of_whole_clips_and_half_of_them():
    clips = frames(400)
    plain = augment.prepare_rgb(jnp.asarray(clips), HALF, HALF)
    prepare = lambda flip, train=True: np.asarray(
        augment.prepare_rgb(
            jnp.asarray(clips),
            HALF,
            HALF,
            flip=flip,
            rng=jax.random.key(1),
            train=train,
        )
    )
    found = prepare(0.5)
    mirrored = plain[:, :, :, ::-1]
    same = (found == plain).all((1, 2, 3, 4))
    turned = (found == mirrored).all((1, 2, 3, 4))
    assert (same ^ turned).all()  # never some of a clip's frames only
    assert 160 <= turned.sum() <= 240  # 4 deviations of 10
    assert 60 <= (prepare(0.25) == mirrored).all((1, 2, 3, 4)).sum() <= 135
    np.testing.assert_array_equal(found, prepare(0.5))  # the key decides
    np.testing.assert_array_equal(prepare(1.0), mirrored)
    np.testing.assert_array_equal(prepare(0.0), plain)
    np.testing.assert_array_equal(prepare(0.5, train=False), plain)


def test_log_mels_are_normalised_by_name():
    log_mel = jnp.linspace(-13, 5, 24).reshape(1, 4, 6, 1)
    same = augment.prepare_spectrogram(log_mel, "none", 1.102, 2.762)
    np.testing.assert_array_equal(same, log_mel)
    for normalise in ("fixed", "dataset"):
        found = augment.prepare_spectrogram(log_mel, normalise, 1.102, 2.762)
        wanted = (np.asarray(log_mel) - 1.102) / 2.762
        np.testing.assert_allclose(found, wanted, 1e-5)


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ConfigError, match="spectrogram.normalise is 'mean': choose"):
        augment.prepare_spectrogram(jnp.zeros((1, 1, 1, 1)), "mean")


def test_a_clip_is_normalised_by_its_own_colour_and_contrast():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 120, (2, 2, 4, 4, 3), np.uint8)
    brighter = frames + np.array([100, 20, 0], np.uint8)
    mean, std = (0.5,) * 3, (0.5,) * 3
    one = augment.prepare_rgb(jnp.array(frames), mean, std, normalise="clip")
    other = augment.prepare_rgb(jnp.array(brighter), mean, std, normalise="clip")
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(one.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(one.std((1, 2, 3, 4)), 1, atol=1e-4)


def test_a_clip_without_contrast_is_zero():
    same = jnp.full((1, 2, 4, 4, 3), 7, jnp.uint8)
    out = augment.prepare_rgb(same, (0.5,) * 3, (0.5,) * 3, normalise="clip")
    np.testing.assert_allclose(out, 0, atol=0.01)


def test_a_sound_loses_its_level_in_each_mel_bin():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 50, 8, 1)).astype(np.float32)
    louder = 3 * x + np.arange(8, dtype=np.float32)[None, None, :, None]
    one = augment.prepare_spectrogram(jnp.array(x), "clip")
    other = augment.prepare_spectrogram(jnp.array(louder), "clip")
    np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(one.mean(1), 0, atol=1e-5)


def test_a_time_shift_turns_each_sound_by_its_own_number_of_rows():
    x = jnp.tile(jnp.arange(10.0)[None, :, None, None], (20, 1, 3, 1))
    out = np.asarray(augment.time_shift(x, jax.random.key(0)))
    first = out[:, 0, 0, 0]
    assert len(set(first)) > 4
    wanted = (first[:, None] + np.arange(10)) % 10
    np.testing.assert_array_equal(out[..., 0], np.repeat(wanted[..., None], 3, 2))
