"""Sound from log-mels: what is heard has the spectrogram that it was made from."""

import numpy as np
import pytest

from av_mae import ConfigError, griffin_lim, spectrogram

RATE = 16000


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def log_mel(sound: np.ndarray, preset: str) -> np.ndarray:
    found = spectrogram.log_mel(sound[None].astype(np.float32), preset)
    return np.asarray(found)[0, :, :, 0]


def chirp() -> np.ndarray:
    """Two moving tones whose loudness changes."""
    t = np.arange(RATE) / RATE
    sound = np.sin(2 * np.pi * (300 * t + 400 * t**2)) * (0.1 + 0.2 * t)
    return (sound + 0.1 * np.sin(2 * np.pi * (3000 - 1000 * t) * t)).astype(np.float32)


@pytest.mark.parametrize("preset", ["mbt", "kaldi"])
def test_the_sound_has_the_spectrogram_that_it_was_made_from(preset):
    wanted = log_mel(chirp(), preset)
    sound = griffin_lim.invert(wanted, preset)
    assert sound.shape == (RATE,) and np.isfinite(sound).all()
    found = log_mel(sound, preset)
    loud = wanted > wanted.max() - 7  # 30 dB below the loudest
    error = np.abs(found - wanted)[5:-5][loud[5:-5]]
    assert np.median(error) < 0.15 and error.mean() < 0.25  # in ln: 1 is 4.3 dB
    # Noise of the same power in each band, without its time course, is far off.
    flat = np.broadcast_to(wanted.mean(axis=0), wanted.shape)
    other = log_mel(griffin_lim.invert(flat, preset), preset)
    assert np.abs(other - wanted)[loud].mean() > 3 * error.mean()


@pytest.mark.parametrize("hertz", [440.0, 2500.0])
def test_a_tone_keeps_its_pitch_and_loudness(hertz):
    sound = griffin_lim.invert(log_mel(tone(hertz), "mbt"))
    middle = sound[2000:6000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(4000)))
    heard = np.argmax(spectrum) * RATE / 4000
    assert abs(heard / hertz - 1) < 0.04  # a mel band is 3 to 6 % wide here
    assert 0.5 < middle.std() / tone(hertz)[2000:6000].std() < 2


def test_masked_places_are_silent():
    values = log_mel(tone(440.0), "mbt").copy()
    values[25:] = np.nan
    sound = griffin_lim.invert(values)
    assert np.abs(sound[4800:]).max() < 1e-6 < 0.05 < np.abs(sound[:3000]).max()
    np.testing.assert_array_equal(griffin_lim.invert(np.full((9, 128), np.nan)), 0)


def test_more_iterations_come_nearer():
    wanted = log_mel(chirp(), "mbt")
    errors = []
    for iterations in (0, 5, 60):
        sound = griffin_lim.invert(wanted, iterations=iterations)
        errors.append(np.abs(log_mel(sound, "mbt") - wanted).mean())
    assert errors[0] > errors[1] > errors[2]


def test_the_seed_decides_the_phases():
    values = log_mel(tone(440.0, 0.2), "mbt")
    first = griffin_lim.invert(values, iterations=2)
    np.testing.assert_array_equal(first, griffin_lim.invert(values, iterations=2))
    other = griffin_lim.invert(values, iterations=2, seed=1)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("preset", ["mbt", "kaldi"])
def test_the_transform_is_undone(preset):
    front_end = spectrogram.PRESETS[preset]
    rng = np.random.default_rng(0)
    sound = rng.normal(size=front_end.window + 20 * front_end.hop)
    back = griffin_lim.inverse(griffin_lim.transform(sound, front_end), front_end)
    inside = slice(front_end.window, -front_end.window)
    np.testing.assert_allclose(back[inside], sound[inside], atol=1e-9)


def test_the_power_has_the_mels():
    front_end = spectrogram.PRESETS["mbt"]
    rng = np.random.default_rng(0)
    true = rng.exponential(size=(3, front_end.fft // 2 + 1))
    filters = spectrogram.mel_matrix(front_end)
    found = griffin_lim.power(true @ filters, front_end)
    assert (found >= 0).all()
    assert np.abs(found @ filters / (true @ filters) - 1).max() < 0.05


@pytest.mark.parametrize("preset", ["mfcc", "precomputed"])
def test_what_is_no_log_mel_is_refused(preset):
    with pytest.raises(ConfigError, match=f"'{preset}', which cannot be made sound"):
        griffin_lim.invert(np.zeros((4, 13)), preset)
