"""Waveform → log-mel spectrogram on the device, by named presets.

`mbt` is the front end for AV-MAE and MBT. Known from the publications: 16 kHz mono,
25 ms Hann windows every 10 ms, 128 mel bins. Not published, so our choice: power (not
magnitude), FFT length 1024 (with 512, one mel filter is empty and two dozen rest on a
single bin), HTK mels from 20 to 8000 Hz with triangles that are linear in mel and not
normalised by area (TensorFlow's `linear_to_mel_weight_matrix`), and ln(x + 1e-6). The
published mean 1.102 and deviation 2.762 of AV-MAE's input could not be met by any of
the variants that were tried: measure the statistics of your own data instead.

The waveform is padded with silence, half a window less half a hop on either side, so
that row i is centred on its own 10 ms and there are exactly 100 rows a second. The
discrete Fourier transform is a matrix product at the highest precision: bfloat16
products would be off by up to 6 in the logarithm.

`kaldi` is the front end of AST, AudioMAE and CAV-MAE (Kaldi's fbank as torchaudio
computes it): row i sees the 25 ms from 10 i ms on, less their mean, pre-emphasised,
under a symmetric Hann window, ln(max(power, 1.19e-7)). AudioMAE normalises by
mean=-4.2677393, std=9.1379948 (twice the deviation 4.5689974), CAV-MAE by mean=-5.081,
std=4.4849. Theirs ends with the last whole window and pads with zeros; here the
waveform is padded, so that there are 100 rows a second.

`precomputed` stands for log-mels that the records hold (Scenic's TFRecords): nothing is
computed here, and what needs the sound itself is refused.

`mfcc` is the front end of AV-MaskEnhancer: 13 cepstral coefficients a row, see there.

`scenic` is whichever of these `python -m av_mae.convert --frontend` found on this
machine to be what a SavedModel of AV-MAE computes; until then there is no such preset.
"""

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int16

from av_mae import ConfigError, choose


class Preset(NamedTuple):
    """A front end. Frequencies are in Hz, lengths in samples."""

    sample_rate: int  # what the waveform must have
    window: int  # periodic Hann
    hop: int
    fft: int
    mels: int
    low: float  # where the lowest filter begins
    high: float  # where the highest filter ends
    offset: float  # the logarithm is ln(power + offset)


class Kaldi(NamedTuple):
    """The front end `kaldi`, in the units of Preset; `window` is a symmetric Hann."""

    sample_rate: int = 16000
    window: int = 400
    hop: int = 160
    fft: int = 512
    mels: int = 128
    low: float = 20.0
    high: float = 8000.0
    emphasis: float = 0.97
    floor: float = 2.0**-23  # the logarithm is ln(max(power, floor))


class Cepstra(NamedTuple):
    """The front end `mfcc`; `mels` is the number of its coefficients."""

    sample_rate: int = 16000
    window: int = 400  # without weights
    hop: int = 160
    fft: int = 512
    filters: int = 26
    mels: int = 13
    lifter: int = 22
    emphasis: float = 0.97


class Precomputed(NamedTuple):
    """Log-mels from the records: Scenic's, 100 rows a second."""

    sample_rate: int = 16000
    hop: int = 160
    mels: int = 128

    @property
    def rows(self) -> int:
        """Rows a second."""
        return self.sample_rate // self.hop


PRESETS = {
    "mbt": Preset(16000, 400, 160, 1024, 128, 20.0, 8000.0, 1e-6),
    "kaldi": Kaldi(),
    "mfcc": Cepstra(),
}

log = logging.getLogger(__name__)


def found_file() -> Path:
    """Where this machine keeps what it found out about front ends.

    $AV_MAE_PRESETS, else presets.json in the user's configuration folder. It holds
    {name: {"same_as": name of a preset, "source", "error"}}.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(os.environ.get("AV_MAE_PRESETS") or Path(home, "av_mae/presets.json"))


def found_presets() -> dict:
    """The presets of `found_file`; a damaged file is told in the log and left out."""
    path = found_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: PRESETS[entry["same_as"]] for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read, its presets are left out: %s", path, error)
        return {}


PRESETS |= found_presets()


def preset_of(sound):
    """The front end that `config.spectrogram` names, `precomputed` among them.

    Raises ConfigError for a name that is none, and where what is to be measured on
    sound is asked of log-mels.
    """
    known = PRESETS | {"precomputed": Precomputed()}
    preset = choose("spectrogram.preset", sound.preset, known)
    if isinstance(preset, Precomputed) and sound.normalise == "dataset":
        raise ConfigError(
            "spectrogram.normalise is 'dataset', which is measured on the sound, but "
            "spectrogram.preset is 'precomputed': set 'none', or 'fixed' with mean and "
            "std (Scenic's are 1.102 and 2.762)."
        )
    return preset


def log_mel(
    waveform: Float[Array | np.ndarray, "b s"] | Int16[Array | np.ndarray, "b s"],
    preset: str = "mbt",
) -> Float32[Array, "b t f 1"]:
    """The log-mel spectrogram of waveforms at the preset's sample rate.

    int16 is scaled by 1/32768; floating point is taken as it is, full scale being 1.
    t = s // hop; samples after the last whole hop only reach into the last rows.
    """
    front_end = PRESETS[preset]
    if isinstance(front_end, Cepstra):
        return mfcc(waveform)[..., None]
    if isinstance(front_end, Kaldi):
        return fbank(waveform, front_end)[..., None]
    scale = 2.0**-15 if jnp.issubdtype(waveform.dtype, jnp.integer) else 1.0
    frames = frame(jnp.asarray(waveform, jnp.float32) * scale, front_end)
    even, odd = fold(frames)
    cosines, sines = fourier_matrices(front_end)
    power = product(even, cosines) ** 2 + product(odd, sines) ** 2
    mels = product(power, mel_matrix(front_end))
    return jnp.log(mels + front_end.offset)[..., None]


def frame(
    waveform: Float32[Array, "b s"], preset: Preset
) -> Float32[Array, "b t window"]:
    """Overlapping windows: the waveform in blocks of one hop, neighbours joined."""
    batch, samples = waveform.shape
    rows = samples // preset.hop
    overlap = -(-preset.window // preset.hop)
    before = (preset.window - preset.hop) // 2
    needed = (rows + overlap - 1) * preset.hop
    after = max(needed - before - samples, 0)
    padded = jnp.pad(waveform, ((0, 0), (before, after)))[:, :needed]
    blocks = padded.reshape(batch, -1, preset.hop)
    shifted = [blocks[:, i : i + rows] for i in range(overlap)]
    return jnp.concatenate(shifted, axis=-1)[..., : preset.window]


def fold(
    frames: Float32[Array, "*b window"],
) -> tuple[Float32[Array, "*b half"], Float32[Array, "*b half"]]:
    """Sums and differences of the samples m before and m after the window's middle.

    Taken about the middle, the real part of the transform sees only the even half of a
    frame and the imaginary part only the odd one: half the multiplications, and the
    power is the same. The first sample, which a periodic Hann window sets to 0, is out.
    """
    half = frames.shape[-1] // 2
    after, before = frames[..., half:], frames[..., half:0:-1]
    return after + before, after - before


def fourier_matrices(
    preset: Preset,
) -> tuple[Float32[np.ndarray, "half bins"], Float32[np.ndarray, "half bins"]]:
    """Cosines and sines for the two halves of `fold` (window included)."""
    middle = np.arange(preset.window // 2)
    hann = 0.5 + 0.5 * np.cos(2 * np.pi * middle / preset.window)
    hann[0] /= 2  # the middle is in its sum twice
    # The phase is reduced in integers first: large angles would cost accuracy.
    turns = np.outer(middle, np.arange(preset.fft // 2 + 1)) % preset.fft / preset.fft
    transform = hann[:, None] * np.exp(-2j * np.pi * turns)
    return transform.real.astype(np.float32), transform.imag.astype(np.float32)


def mel_matrix(preset: Preset | Kaldi) -> Float32[np.ndarray, "bins mels"]:
    """HTK mel filters: triangles of height 1, linear in mel."""
    nyquist = preset.sample_rate / 2
    bins = hertz_to_mel(np.linspace(0, nyquist, preset.fft // 2 + 1))[:, None]
    low, high = hertz_to_mel(np.array([preset.low, preset.high]))
    edges = np.linspace(low, high, preset.mels + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def hertz_to_mel(hertz: np.ndarray) -> np.ndarray:
    """The mel scale as HTK has it."""
    return 1127 * np.log1p(hertz / 700)


def product(
    x: Float32[Array, "*batch n"], matrix: Float32[np.ndarray, "n m"]
) -> Float32[Array, "*batch m"]:
    """A matrix product in full float32, on tensor cores too."""
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


# Kaldi.


def fbank(
    waveform: Float[Array | np.ndarray, "b s"] | Int16[Array | np.ndarray, "b s"],
    preset: Kaldi,
) -> Float32[Array, "b t f"]:
    """Kaldi's filter banks, t = s // 160, f = 128; int16 is scaled by 1/32768.

    As `torchaudio.compliance.kaldi.fbank(x, htk_compat=True, use_energy=False,
    window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)`.
    """
    scale = 2.0**-15 if jnp.issubdtype(waveform.dtype, jnp.integer) else 1.0
    frames = _from_start(jnp.asarray(waveform, jnp.float32) * scale, preset)
    frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    hann = np.hanning(preset.window).astype(np.float32)
    frames = (frames - preset.emphasis * before) * hann
    cosines, sines = _plain_fourier_matrices(preset)
    power = product(frames, cosines) ** 2 + product(frames, sines) ** 2
    return jnp.log(jnp.maximum(product(power, mel_matrix(preset)), preset.floor))


# Cepstral coefficients.


def mfcc(
    waveform: Float[Array | np.ndarray, "b s"] | Int16[Array | np.ndarray, "b s"],
) -> Float32[Array, "b t f"]:
    """Mel-frequency cepstral coefficients of 16 kHz sound, t = s // 160, f = 13.

    As `python_speech_features.mfcc(x, 16000, numcep=13)` has them; AV-MaskEnhancer
    calls it so for videos of 25 frames a second (for other rates it scales window and
    hop by 25 / rate; here they stay in seconds). int16 is taken as it is and floating
    point times 32768, as WAV files hold it. Row i sees the samples from 160 i on. Rows
    after the sound's end are zero, not silence: the published project pads
    coefficients. The end is the last sample that is not 0.
    """
    preset = PRESETS["mfcc"]
    scale = 1 if jnp.issubdtype(waveform.dtype, jnp.integer) else 32768
    x = jnp.asarray(waveform, jnp.float32) * scale
    samples = jnp.arange(x.shape[1])[None]
    length = jnp.max(jnp.where(x != 0, samples + 1, 0), axis=1, keepdims=True)  # b 1
    x = x - preset.emphasis * jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
    frames = _from_start(jnp.where(samples < length, x, 0.0), preset)
    cosines, sines = _plain_fourier_matrices(preset)
    power = product(frames, cosines) ** 2 + product(frames, sines) ** 2
    power = power / preset.fft
    logarithm = lambda y: jnp.log(jnp.where(y == 0, np.finfo(np.float64).eps, y))
    energy = logarithm(jnp.sum(power, axis=-1, keepdims=True))
    mels = product(power, _mel_triangles(preset))
    cepstrum = product(logarithm(mels), _cosine_matrix(preset))
    result = jnp.concatenate([energy, cepstrum[..., 1:]], axis=-1)
    rows = 1 + jnp.maximum(0, -((preset.window - length) // preset.hop))
    rows = jnp.where(length == 0, 0, rows)
    exist = jnp.arange(frames.shape[1])[None] < rows
    return jnp.where(exist[..., None], result, 0.0)


def _from_start(
    waveform: Float32[Array, "b s"], preset: Kaldi | Cepstra
) -> Float32[Array, "b t window"]:
    """As `frame`, but row i begins with its own hop."""
    rows, overlap = waveform.shape[1] // preset.hop, -(-preset.window // preset.hop)
    needed = (rows + overlap - 1) * preset.hop
    after = max(needed - waveform.shape[1], 0)
    padded = jnp.pad(waveform, ((0, 0), (0, after)))[:, :needed]
    blocks = padded.reshape(len(waveform), -1, preset.hop)
    shifted = [blocks[:, i : i + rows] for i in range(overlap)]
    return jnp.concatenate(shifted, axis=-1)[..., : preset.window]


def _plain_fourier_matrices(preset: Kaldi | Cepstra) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [window bins] without weights."""
    turns = np.outer(np.arange(preset.window), np.arange(preset.fft // 2 + 1))
    transform = np.exp(-2j * np.pi * (turns % preset.fft) / preset.fft)
    return transform.real.astype(np.float32), transform.imag.astype(np.float32)


def _mel_triangles(preset: Cepstra) -> Float32[np.ndarray, "bins filters"]:
    """Triangles linear in hertz from 0 to half the rate, their corners on bins."""
    rate = preset.sample_rate
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    mels = np.linspace(0, highest, preset.filters + 2)
    corners = np.floor((preset.fft + 1) * 700 * (10 ** (mels / 2595) - 1) / rate)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    bins = np.arange(preset.fft // 2 + 1)[:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _cosine_matrix(preset: Cepstra) -> Float32[np.ndarray, "filters coefficients"]:
    """The orthonormal DCT-II, liftered: its columns weighed by 1 + 11 sin(pi n/22)."""
    k, n = np.arange(preset.filters)[:, None], np.arange(preset.mels)[None]
    matrix = np.cos(np.pi * n * (2 * k + 1) / (2 * preset.filters))
    matrix *= np.sqrt(np.where(n == 0, 1, 2) / preset.filters)
    lifter = 1 + preset.lifter / 2 * np.sin(np.pi * n / preset.lifter)
    return (matrix * lifter).astype(np.float32)
