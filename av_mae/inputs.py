"""A host batch to what a model sees: views flattened, values normalised, patches cut.

Runs inside the jitted step, so that bytes over the wire stay uint8 and int16 and the
host stays free.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from av_mae import (
    ConfigError,
    augment,
    choose,
    corruption,
    mixing,
    spectrogram,
    tokens,
)
from av_mae.transformer import Size, size_of


class Layout(NamedTuple):
    """How one modality is cut: its grid of tokens, patch sides and channels."""

    grid: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int

    @property
    def n(self) -> int:
        """Tokens of a clip."""
        return math.prod(self.grid)

    @property
    def frames(self) -> int:
        """Frames in a tube; 1 for sound."""
        return self.patch[0] if len(self.patch) == 3 else 1

    @property
    def f(self) -> int:
        """Values in a patch."""
        return math.prod(self.patch) * self.channels


def _shape(config, modality: str) -> tuple[int, ...]:
    """Sizes of one clip's input: (frames, h, w), or (100 rows a second, mels)."""
    if modality == "rgb":
        return (config.data.num_frames, config.data.size, config.data.size)
    preset = spectrogram.preset_of(config.spectrogram)
    samples = round(config.data.audio_seconds * preset.sample_rate)
    return (samples // preset.hop, preset.mels)


def _patch(config, size: Size, modality: str) -> tuple[int, ...]:
    """Sides of a patch; a row of cepstral coefficients stays whole."""
    if modality == "spectrogram" and config.spectrogram.preset == "mfcc":
        return (1, spectrogram.PRESETS["mfcc"].mels)
    return tokens.patch_sides((size.side, size.tubelet), modality)


def layouts(config) -> dict[str, Layout]:
    """The layout of each modality of the config.

    Raises ConfigError where a patch is larger than the input.
    """
    choose(
        "spectrogram.normalise", config.spectrogram.normalise, augment.NORMALISATIONS
    )
    kinds = augment.PICTURE_NORMALISATIONS
    choose("picture.normalise", config.picture.normalise, kinds)
    size, result = size_of(config.model), {}
    for m in config.modalities:
        patch = _patch(config, size, m)
        shape = _shape(config, m)
        grid = tokens.grid_of(shape, patch)
        if 0 in grid:
            raise ConfigError(
                f"model.variant {config.model.variant!r} cuts {m} of size {shape} into "
                f"patches of {patch}, which do not fit: make data.size, "
                "data.num_frames or data.audio_seconds larger, or the patch smaller."
            )
        result[m] = Layout(grid, patch, 3 if m == "rgb" else 1)
    return result


def check(config):
    """Raises ConfigError for what is wrong with patches, augmentation, corruption."""
    layouts(config)
    _check_augment(config.augment)
    _damage(config)


def make(config, missing: bool) -> Callable:
    """The function (batch, rng, train, mixes) → (patches {m: [b n f]}, present).

    `batch` is the dict of the data pipeline; its v views become rows. `present[m]` is
    [b] bool, or None when no clip of the data set lacks a modality (`missing` False).
    `mixes` {m: Mix}, if any, says how rows are mixed once they are normalised. Patches
    are float32. Clips that have no number in a data set (`index`) are never degraded.
    """
    check(config)
    cuts, damage = layouts(config), _damage(config)

    def prepare(batch: dict, rng, train: bool, mixes: Mapping | None = None):
        patches, present = {}, {}
        if damage[train] and "index" in batch:
            batch = damage[train](batch, _keys(batch, rng, train))
        for i, (m, cut) in enumerate(cuts.items()):
            x = VALUES[m](config, batch, jax.random.fold_in(rng, i), train)
            has = batch["has_rgb" if m == "rgb" else "has_audio"]
            present[m] = rows(has, len(x))
            if mixes:
                there = present[m] if missing else None
                x = mixing.apply(x, mixing.among(mixes[m], there))
            patches[m] = tokens.patchify(x, cut.patch)
        return patches, present if missing else None

    return prepare


def _frames(config, batch: dict, rng, train: bool) -> jax.Array:
    """Normalised pictures float32 [(b v) t h w c], in training augmented."""
    x, picture, changes = batch["rgb"], config.picture, config.augment
    return augment.prepare_rgb(
        x.reshape((-1,) + x.shape[2:]),
        picture.mean,
        picture.std,
        normalise=picture.normalise,
        colour=changes.colour,
        grey=changes.grey,
        flip=changes.flip,
        erase=changes.erase,
        rng=rng,
        train=train,
    )


def _log_mel(config, batch: dict, rng, train: bool) -> jax.Array:
    """Normalised log-mels float32 [(b v) t f 1], in training augmented."""
    sound, changes = config.spectrogram, config.augment
    if sound.preset == "precomputed":
        x = batch["spectrogram"]
        x = x.reshape((-1,) + x.shape[2:])
    else:
        x = batch["waveform"]
        x = spectrogram.log_mel(x.reshape(-1, x.shape[-1]), sound.preset)
    x = augment.prepare_spectrogram(x, sound.normalise, sound.mean, sound.std)
    if train and changes.time_shift:
        x = augment.time_shift(x, rng)
    if train and (changes.frequency_masks or changes.time_masks):
        frequency = (changes.frequency_masks, changes.frequency_width)
        time = (changes.time_masks, changes.time_width)
        x = augment.spec_augment(x, jax.random.fold_in(rng, 1), frequency, time)
    return x


VALUES = {"rgb": _frames, "spectrogram": _log_mel}


def _check_augment(augment):
    """ConfigError for a chance beyond 0 … 1, and for bands without a width."""
    for name in ("flip", "colour", "grey", "erase"):
        if not 0 <= augment[name] <= 1:
            raise ConfigError(
                f"augment.{name} is {augment[name]:g}, but it is a probability: choose "
                "0 (never) to 1 (every clip)."
            )
    for name in ("frequency", "time"):
        count, width = augment[f"{name}_masks"], augment[f"{name}_width"]
        if count < 0 or width < 0 or (count > 0) != (width > 0):
            raise ConfigError(
                f"augment.{name}_masks is {count} and augment.{name}_width {width}: "
                "choose how many bands and the bound of their widths, or 0 for both."
            )


def _damage(config) -> dict[bool, corruption.Corruption | None]:
    """{whether it is training: how input is degraded}."""
    texts = {True: ("augment.corruption", config.augment.corruption), False: ("", "")}
    if config.trainer == "finetune":
        texts[False] = ("eval.corruption", config.eval.corruption)
    found = {train: corruption.parse(*text) for train, text in texts.items()}
    for train, kind in found.items():
        sound = kind and kind.kind.key == "waveform"
        if sound and config.spectrogram.preset == "precomputed":
            field, text = texts[train]
            raise ConfigError(
                f"{field} is {text!r}, which needs waveforms, but spectrogram.preset "
                "is 'precomputed': degrade the picture, or prepare data with sound."
            )
    return found


def _keys(batch: dict, rng: jax.Array, train: bool) -> jax.Array:
    """A random key for each clip: in evaluation by its number in the data set."""
    if train:
        rng, numbers = jax.random.fold_in(rng, 2), jnp.arange(len(batch["index"]))
    else:
        rng, numbers = jax.random.key(0), batch["index"]
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, numbers)


def pixels(config, patches: jax.Array) -> jax.Array:
    """Patches of frames [b n f] as they were in [0, 1], before they were normalised."""
    mean, std = (
        jnp.tile(jnp.array(x), patches.shape[-1] // 3) for x in _picture(config)
    )
    return patches * std + mean


def from_pixels(config, patches: jax.Array) -> jax.Array:
    """The inverse of `pixels`."""
    mean, std = (
        jnp.tile(jnp.array(x), patches.shape[-1] // 3) for x in _picture(config)
    )
    return (patches - mean) / std


def _picture(config) -> tuple:
    return config.picture.mean, config.picture.std


def rows(values: jax.Array, count: int) -> jax.Array:
    """A value [b …] of each clip, for its views [(b v) …]."""
    times, rest = count // len(values), values.shape[1:]
    # Not jnp.repeat, whose indices are gathered from all devices.
    again = jnp.broadcast_to(values[:, None], (len(values), times, *rest))
    return again.reshape(count, *rest)
