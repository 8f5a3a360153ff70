"""Log-mel spectrogram → sound: mel filters undone, phases by Griffin and Lim.

Griffin & Lim, "Signal Estimation from Modified Short-Time Fourier Transform", IEEE
TASSP 1984: phases come from the short-time transform of the sound that the last phases
gave, again and again. The steps are made larger by a momentum of .99 as in Perraudin,
Balazs & Søndergaard, "A Fast Griffin-Lim Algorithm", WASPAA 2013. The power in each
frequency is the non-negative least-squares solution of the mel filters, by the
multiplicative updates of Lee & Seung (NIPS 2000).

Mel filters keep 128 numbers of 513 and no phase at all: what is heard is the spectrum's
shape, not the original's waveform. Runs on the host in numpy.
"""

import numpy as np
from jaxtyping import Float

from av_mae import ConfigError, spectrogram
from av_mae.spectrogram import Kaldi, Preset

ITERATIONS = 60
UPDATES = 200  # of the least squares
MOMENTUM = 0.99
TINY = 1e-10


def invert(
    log_mel: Float[np.ndarray, "t f"],
    preset: str = "mbt",
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Float[np.ndarray, " s"]:
    """The sound of a log-mel in ln units, float64 [t · hop], full scale 1.

    Rows or values that are NaN are silent. seed: of the first phases. Raises
    ConfigError for a preset that has no log-mels to invert.
    """
    front_end = spectrogram.PRESETS.get(preset)
    if not isinstance(front_end, Preset | Kaldi):
        raise ConfigError(
            f"spectrogram.preset is {preset!r}, which cannot be made sound again: that "
            "needs log-mels of a known kind ('mbt', 'kaldi')."
        )
    mels = np.where(np.isnan(log_mel), 0.0, np.exp(np.nan_to_num(log_mel)))
    if isinstance(front_end, Preset):
        mels = np.where(np.isnan(log_mel), 0.0, np.maximum(mels - front_end.offset, 0))
    magnitude = np.sqrt(power(mels, front_end))  # t bins
    x = sound_of(magnitude, front_end, iterations, seed)
    return _deemphasised(x, front_end.emphasis) if isinstance(front_end, Kaldi) else x


def power(
    mels: Float[np.ndarray, "t f"], preset: Preset | Kaldi
) -> Float[np.ndarray, "t bins"]:
    """The power of each bin whose mel filters give `mels`, as nearly as can be."""
    from scipy.sparse import csr_array

    # Bins overlap with two filters at most: nearly all of the matrix is zeros.
    filters = csr_array(spectrogram.mel_matrix(preset).astype(np.float64))  # bins f
    spread = filters @ mels.T  # bins t
    found = filters @ (mels / (filters.sum(axis=0) + TINY)).T
    for _ in range(UPDATES):
        found = found * spread / (filters @ (filters.T @ found) + TINY)
    return found.T


def sound_of(
    magnitude: Float[np.ndarray, "t bins"],
    preset: Preset | Kaldi,
    iterations: int,
    seed: int,
) -> Float[np.ndarray, " s"]:
    """A sound whose short-time transform has this magnitude, as nearly as can be."""
    rng = np.random.default_rng(seed)
    phases = np.exp(2j * np.pi * rng.random(magnitude.shape))
    before = np.zeros_like(phases)
    for _ in range(iterations):
        rebuilt = transform(inverse(magnitude * phases, preset), preset)
        step = rebuilt + MOMENTUM * (rebuilt - before)
        phases, before = step / (np.abs(step) + TINY), rebuilt
    x = inverse(magnitude * phases, preset)
    start = _before(preset)
    return x[start : start + len(magnitude) * preset.hop]


def _window(preset: Preset | Kaldi) -> np.ndarray:
    """The front end's Hann window: periodic, or symmetric (Kaldi)."""
    n = np.arange(preset.window)
    symmetric = isinstance(preset, Kaldi)
    return 0.5 - 0.5 * np.cos(2 * np.pi * n / (preset.window - symmetric))


def _before(preset: Preset | Kaldi) -> int:
    """Samples of padding before the sound's first, as the front end has it."""
    return 0 if isinstance(preset, Kaldi) else (preset.window - preset.hop) // 2


def transform(sound: Float[np.ndarray, " s"], preset: Preset | Kaldi) -> np.ndarray:
    """The short-time transform, complex [t bins], of a sound with its padding."""
    rows = (len(sound) - preset.window) // preset.hop + 1
    index = preset.hop * np.arange(rows)[:, None] + np.arange(preset.window)
    return np.fft.rfft(sound[index] * _window(preset), preset.fft)


def inverse(found: np.ndarray, preset: Preset | Kaldi) -> Float[np.ndarray, " s"]:
    """The sound, padding included, whose transform is nearest (least squares)."""
    window = _window(preset)
    frames = np.fft.irfft(found, preset.fft)[:, : preset.window] * window
    norm = _overlap(np.broadcast_to(window**2, frames.shape), preset)
    return _overlap(frames, preset) / np.maximum(norm, 1e-3)


def _overlap(frames: np.ndarray, preset: Preset | Kaldi) -> np.ndarray:
    """Frames added up, each a hop after the last one: [(t - 1) · hop + window]."""
    t, hop = len(frames), preset.hop
    blocks = -(-preset.window // hop)
    padded = np.pad(frames, ((0, 0), (0, blocks * hop - preset.window)))
    total = np.zeros((t + blocks - 1, hop))
    for i in range(blocks):
        total[i : i + t] += padded[:, i * hop : (i + 1) * hop]
    return total.reshape(-1)[: (t - 1) * hop + preset.window]


def _deemphasised(x: np.ndarray, emphasis: float) -> np.ndarray:
    """The inverse of y[i] = x[i] - emphasis · x[i-1]."""
    from scipy.signal import lfilter

    return lfilter([1.0], [1.0, -emphasis], x)
