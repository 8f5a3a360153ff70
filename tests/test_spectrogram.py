"""The log-mel front end against a plain float64 one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from av_mae import spectrogram

RATE = 16000


def reference(waveform):
    """The preset `mbt` in float64, one frame and one filter at a time."""
    points = 700 * (
        10
        ** (
            np.linspace(
                2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 8000 / 700), 130
            )
            / 2595
        )
        - 1
    )
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    padded = np.concatenate([np.zeros(120), waveform.astype(np.float64), np.zeros(400)])
    rows = []
    for row in range(len(waveform) // 160):
        segment = padded[row * 160 : row * 160 + 400] * window
        power = np.abs(np.fft.rfft(segment, 1024)) ** 2
        values = []
        for left, centre, right in zip(
            points[:-2], points[1:-1], points[2:], strict=True
        ):
            total = 0.0
            for bin in range(int(left / 15.625), int(right / 15.625) + 2):
                hertz = bin * 15.625
                if left < hertz <= centre:
                    slope = (mel(hertz) - mel(left)) / (mel(centre) - mel(left))
                elif centre < hertz < right:
                    slope = (mel(right) - mel(hertz)) / (mel(right) - mel(centre))
                else:
                    continue
                total += slope * power[bin]
            values.append(np.log(total + 1e-6))
        rows.append(values)
    return np.array(rows)


def sounds():
    """Half a second each (a little more where the end does not fill a hop)."""
    rng = np.random.default_rng(0)
    time = np.arange(RATE // 2) / RATE
    tone = np.sin(2 * np.pi * 440 * time)
    return {
        "noise": 0.1 * rng.standard_normal(RATE // 2 + 77),
        "quiet noise": 1e-4 * rng.standard_normal(RATE // 2),
        "tone": 0.3 * tone,
        "loud tone": 0.999 * np.sin(2 * np.pi * 3000 * time),
        "chirp": 0.5 * np.sin(2 * np.pi * (50 + 7000 * time) * time),
        "clipped": np.clip(4 * tone, -1, 1),
        "loud noise": np.sign(rng.standard_normal(RATE // 2)),
        "silence": np.zeros(RATE // 2),
        "click": np.eye(1, RATE // 2, 4000)[0],
        "bass and hiss": 0.9 * np.sin(2 * np.pi * 60 * time)
        + 1e-3 * rng.standard_normal(RATE // 2),
    }


@pytest.mark.parametrize("name", sounds())
def test_meets_an_independent_float64_front_end(name):
    sound = np.float32(sounds()[name])
    found = jax.jit(spectrogram.log_mel)(jnp.asarray(sound)[None])
    assert found.shape == (1, 50, 128, 1) and found.dtype == jnp.float32
    error = np.abs(np.asarray(found)[0, ..., 0] - reference(sound)).max()
    assert error < 2e-3, error


def test_int16_is_full_scale_over_32768():
    samples = np.random.default_rng(1).integers(-32768, 32768, (2, 1600), np.int16)
    np.testing.assert_array_equal(
        spectrogram.log_mel(samples),
        spectrogram.log_mel(samples.astype(np.float32) / 32768),
    )


@pytest.mark.parametrize(
    "samples, rows", [(160000, 1000), (160, 1), (16159, 100), (16160, 101)]
)
def test_a_hundred_rows_a_second(samples, rows):
    shape = jax.eval_shape(
        spectrogram.log_mel, jax.ShapeDtypeStruct((3, samples), jnp.int16)
    ).shape
    assert shape == (3, rows, 128, 1)


def test_rows_are_centred_on_their_ten_milliseconds():
    click = np.zeros((1, 1600), np.float32)
    click[0, 5 * 160 + 80] = 1
    energy = np.exp(np.asarray(spectrogram.log_mel(click)))[0, ..., 0].sum(-1)
    assert energy.argmax() == 5
    assert energy[4] == pytest.approx(energy[6], rel=1e-3)


def test_silence_is_the_floor():
    quiet = np.zeros((1, 1600), np.int16)
    np.testing.assert_allclose(spectrogram.log_mel(quiet), np.log(1e-6), rtol=1e-6)


def test_no_filter_is_empty():
    matrix = spectrogram.mel_matrix(spectrogram.PRESETS["mbt"])
    assert matrix.shape == (513, 128)
    assert (matrix > 0).any(axis=0).all()
    assert (matrix[0] == 0).all()  # 0 Hz belongs to none


def test_every_product_asks_for_the_highest_precision():
    """A CPU always multiplies in float32; this is what an accelerator obeys."""
    program = jax.make_jaxpr(spectrogram.log_mel)(np.zeros((1, 1600), np.float32))
    products = [e for e in program.jaxpr.eqns if "precision" in e.params]
    products += [
        inner
        for e in program.jaxpr.eqns
        if "jaxpr" in e.params
        for inner in e.params["jaxpr"].jaxpr.eqns
        if "precision" in inner.params
    ]
    assert len(products) == 3
    for equation in products:
        assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}


# The preset kaldi.


def fbank(samples):
    """Kaldi's formulas in float64, a frame, a sample and a filter at a time."""
    mel = lambda hertz: 1127 * math.log(1 + hertz / 700)
    low, step = mel(20), (mel(8000) - mel(20)) / 129
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / 399) for i in range(400)]
    rows = []
    for first in range(0, len(samples) - 399, 160):
        part = samples[first : first + 400].astype(np.float64)
        part = part - sum(part) / 400
        for i in range(399, 0, -1):
            part[i] -= 0.97 * part[i - 1]
        part[0] -= 0.97 * part[0]
        power = np.abs(np.fft.fft(np.append(part * window, np.zeros(112)))) ** 2
        values = []
        for j in range(128):
            left, centre, right = (low + (j + k) * step for k in range(3))
            total = 0.0
            for bin in range(256):
                place = mel(bin * 31.25)
                if left < place < right:
                    rising = (place - left) / (centre - left)
                    falling = (right - place) / (right - centre)
                    total += min(rising, falling) * power[bin]
            values.append(math.log(max(total, 1.1920928955078125e-07)))
        rows.append(values)
    return np.array(rows)


@pytest.mark.parametrize("name", sounds())
def test_kaldi_meets_an_independent_float64_front_end(name):
    sound = np.float32(sounds()[name][:3360])
    found = jax.jit(lambda x: spectrogram.log_mel(x, "kaldi"))(sound[None])
    assert found.shape == (1, 21, 128, 1) and found.dtype == jnp.float32
    wanted = fbank(sound)
    assert len(wanted) == 19  # the others reach beyond the end
    error = np.abs(np.asarray(found)[0, :19, :, 0] - wanted).max()
    assert error < 4e-3, error  # in the bins that a loud tone leaves empty


def test_kaldi_of_int16_is_full_scale_over_32768():
    samples = np.random.default_rng(1).integers(-32768, 32768, (2, 1600), np.int16)
    floats = samples.astype(np.float32) / 32768
    np.testing.assert_array_equal(
        *(spectrogram.log_mel(x, "kaldi") for x in (samples, floats))
    )


# What a machine found out.


def test_presets_that_were_found(tmp_path, monkeypatch, caplog):
    path = tmp_path / "presets.json"
    monkeypatch.setenv("AV_MAE_PRESETS", str(path))
    assert spectrogram.found_file() == path and spectrogram.found_presets() == {}
    path.write_text('{"scenic": {"same_as": "kaldi"}}')
    kaldi = spectrogram.PRESETS["kaldi"]
    assert spectrogram.found_presets() == {"scenic": kaldi}
    for damaged in ("{", "[]", '{"scenic": {"same_as": "none"}}', '{"scenic": 1}'):
        path.write_text(damaged)
        caplog.clear()
        assert spectrogram.found_presets() == {}
        assert f"{path} cannot be read" in caplog.text
    monkeypatch.delenv("AV_MAE_PRESETS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert spectrogram.found_file() == tmp_path / "av_mae" / "presets.json"


# The preset mfcc.


def cepstra(samples):
    """python_speech_features' formulas in float64, a frame and a filter at a time."""
    signal = np.append(samples[0], samples[1:] - 0.97 * samples[:-1])
    rows = 1 + max(0, math.ceil((len(signal) - 400) / 160))
    signal = np.append(signal, np.zeros(rows * 160 + 400))
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    corner = np.floor(513 * 700 * (10 ** (mel / 2595) - 1) / 16000).astype(int)
    found = []
    for row in range(rows):
        power = np.abs(np.fft.rfft(signal[row * 160 : row * 160 + 400], 512)) ** 2 / 512
        mels = np.zeros(26)
        for j, (a, b, c) in enumerate(
            zip(corner, corner[1:], corner[2:], strict=False)
        ):
            mels[j] += sum(power[i] * (i - a) / (b - a) for i in range(a, b))
            mels[j] += sum(power[i] * (c - i) / (c - b) for i in range(b, c))
        logs = np.log(np.where(mels == 0, 2.0**-52, mels))
        values = scipy.fft.dct(logs, norm="ortho")[:13]
        values *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
        values[0] = np.log(power.sum() or 2.0**-52)
        found.append(values)
    return np.array(found)


@pytest.mark.parametrize("name", sounds())
def test_cepstra_meet_an_independent_float64_front_end(name):
    """The sound ends before the waveform does: rows after that are zero."""
    whole = np.round(32767 * np.clip(sounds()[name][:7000], -1, 1)).astype(np.int16)
    sound = np.trim_zeros(whole, "b")
    padded = np.append(sound, np.zeros(8000 - len(sound), np.int16))
    found = np.asarray(jax.jit(spectrogram.mfcc)(padded[None]))[0]
    assert found.shape == (50, 13) and found.dtype == np.float32
    wanted = cepstra(sound.astype(np.float64)) if len(sound) else np.zeros((0, 13))
    np.testing.assert_allclose(found[: len(wanted)], wanted, atol=2e-3)
    assert not found[len(wanted) :].any()
    preset = spectrogram.log_mel(padded[None].astype(np.float32) / 32768, "mfcc")
    np.testing.assert_allclose(preset[0, ..., 0], found, atol=1e-3)
