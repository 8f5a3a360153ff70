"""One clip masked and reconstructed: frames, spectrograms, masks and errors by token.

Visible patches are shown as they are, predictions only where a patch was masked. A
standardised target says of a patch only how it deviates from its own mean: by default
that is undone by the mean statistics of the *visible* patches, which is all that the
model may know; published figures take those of the masked patches themselves, as
`oracle` does here. (Where the model's input is normalised clip by clip, mean and
deviation of the whole clip are taken to undo that in either case.)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int16
from ml_collections import ConfigDict

from av_mae import (
    ConfigError,
    autoencoder,
    choose,
    griffin_lim,
    inputs,
    losses,
    masking,
    pretrain,
    spectrogram,
    tokens,
    visualise,
)

Pairs = Mapping | Iterable[tuple] | None
HIDDEN = np.nan  # of a masked place of a spectrogram


class Spectrograms(NamedTuple):
    """Three versions of a log-mel, float32 [t f], ln units; masked places are NaN."""

    original: np.ndarray
    masked: np.ndarray
    reconstruction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """What `Model.reconstruct` gives of one clip.

    frames: Panels of uint8 [t h w 3], spectrograms: log-mels [t f], None for what the
    clip or the model lacks; masks: {m: bool on the grid of tokens, True is masked};
    errors: {m: the loss of each token, float32 on the same grid, NaN where it is
    visible}; error: {m: their mean}; distance: {m: mean squared error of the masked
    values in pixels of [0, 1], or in ln units of the log-mel}, which compares models of
    different targets; times: when each frame is shown and sound_start: when the sound
    begins, in seconds of the clip; waveform: what is heard there, int16; statistics:
    what undid a standardised target ("visible" or "oracle", {m: "none"} for others);
    used: the modalities that the model saw.
    """

    frames: visualise.Panels | None
    spectrograms: Spectrograms | None
    masks: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    error: dict[str, float]
    distance: dict[str, float]
    times: np.ndarray
    sound_start: float
    waveform: np.ndarray | None
    statistics: dict[str, str]
    used: tuple[str, ...]
    preset: str
    sample_rate: int

    def sound(
        self, which: str = "reconstruction", seed: int = 0
    ) -> Int16[np.ndarray, " s"]:
        """A log-mel as sound, int16 [s]: "original", "masked" or "reconstruction".

        By Griffin-Lim; masked places are silent. The original's own sound, which has
        its true phases, is `waveform`. Raises ConfigError without sound.
        """
        if self.spectrograms is None:
            raise ConfigError("this reconstruction has no sound.")
        log_mel = getattr(self.spectrograms, which)
        found = griffin_lim.invert(log_mel, self.preset, seed=seed)
        return (np.clip(found, -1, 1) * 32767).astype(np.int16)

    def ratio(self, m: str) -> float:
        """What share of the tokens is masked."""
        return float(self.masks[m].mean())


def settings(config: ConfigDict, ratio=None, mask: Pairs = None) -> ConfigDict:
    """The config with these masks: one ratio or {m: ratio}, {m: kind}.

    Raises ConfigError for what masks nothing or everything, or is no kind of mask.
    """
    config = config.copy_and_resolve_references()
    known = pretrain.masked(config)
    shared = isinstance(ratio, int | float)
    ratios = dict.fromkeys(known, ratio) if shared else dict(ratio or {})
    kinds = dict(mask or {})
    for name, given in (("ratio", ratios), ("mask", kinds)):
        for m in given:
            choose(name, m, tuple(known))
    for m in known:
        config.mask[m].ratio = float(ratios.get(m, config.mask[m].ratio))
        config.mask[m].kind = kinds.get(m, config.mask[m].kind)
    if "decode" in config.objective:  # show all that is masked
        config.objective.decode.kind, config.objective.decode.share = "all", 1.0
    if "masks_per_clip" in config.objective:
        config.objective.masks_per_clip = 1
    pretrain.check_masks(config)
    return config


def key(config) -> tuple[tuple, tuple]:
    """(ratio, mask) of a config from `settings`, as a hashable value for `settings`."""
    known = pretrain.masked(config)
    ratios = tuple((m, config.mask[m].ratio) for m in known)
    return ratios, tuple((m, config.mask[m].kind) for m in known)


class Found(NamedTuple):
    """Of one modality of a batch.

    patches: [b n f], as the model saw them; masked: [b m] indices; visible, oracle:
    predictions [b m f] in the patches' units; error: [b m], the loss of each token;
    present: [b].
    """

    patches: Array
    masked: Array
    visible: Array
    oracle: Array
    error: Array
    present: Array


def make(config, model: nn.Module):
    """The function (params, batch, rng) → {m: Found}."""
    reconstruct = pretrain.make_reconstruct(config, model, missing=True)
    objective = autoencoder.objective_of(config)

    def look(params, batch, rng):
        found = reconstruct(params, batch, rng, False)
        result = {}
        for m, sequence in objective.sequences(found.masks).items():
            patches, masked = found.patches[m], sequence.masked
            prediction, target = (x[:, -masked.shape[1] :] for x in found.pairs[m])
            seen = masking.take(patches, found.masks[m].kept)
            truth = masking.take(patches, masked)
            result[m] = Found(
                patches=patches,
                masked=masked,
                visible=pretrain.undo_target(config, m, prediction, seen),
                oracle=undo_by_truth(config, m, prediction, truth),
                error=((prediction - target) ** 2).mean(axis=-1),
                present=found.present[m],
            )
        return result

    return look


def undo_by_truth(
    config, m: str, prediction: Array, truth: Array
) -> Float32[Array, "b p f"]:
    """Predictions as patches, by the statistics of the very patches predicted."""
    cut, kind = inputs.layouts(config)[m], config.objective.target[m]
    pixels = losses.TARGETS[kind].pixels
    truth = inputs.pixels(config, truth) if pixels else truth
    mean, std = losses.target_statistics(truth, kind, cut.channels, cut.frames)
    values = losses.to_patches(prediction * std + mean, cut.f)
    return inputs.from_pixels(config, values) if pixels else values


def finish(config, found: dict, row: dict, clip, view, used, oracle: bool):
    """The Reconstruction of the first row of what `make` found."""
    cuts, parts = inputs.layouts(config), {}
    masks, errors, error, distance = {}, {}, {}, {}
    for m, x in found.items():
        if not x.present[0]:
            continue
        masked = np.asarray(x.masked[0])
        values = np.asarray(x.oracle[0] if oracle else x.visible[0])
        masks[m] = _on_grid(masked, np.True_, False, cuts[m].grid)
        errors[m] = _on_grid(masked, x.error[0], np.nan, cuts[m].grid)
        error[m] = float(np.mean(x.error[0]))
        patches = np.array(x.patches[0])
        scale = _scale(config, m, row)
        parts[m] = _versions(patches, values, masked, cuts[m], scale)
        distance[m] = _distance(parts[m], masks[m], cuts[m])
    return Reconstruction(
        frames=_frames(parts.get("rgb")),
        spectrograms=parts.get("spectrogram"),
        masks=masks,
        errors=errors,
        error=error,
        distance=distance,
        times=view.frames,
        sound_start=view.sound,
        waveform=row["waveform"][0] if "spectrogram" in parts else None,
        statistics={m: _statistics(config, m, oracle) for m in masks},
        used=tuple(used),
        preset=config.spectrogram.preset,
        sample_rate=spectrogram.preset_of(config.spectrogram).sample_rate,
    )


def _statistics(config, m: str, oracle: bool) -> str:
    target = losses.TARGETS[config.objective.target[m]]
    if target.statistics is losses.unchanged:
        return "none"
    return "oracle" if oracle else "visible"


def _on_grid(index: np.ndarray, values, rest, grid: tuple[int, ...]) -> np.ndarray:
    flat = np.full(int(np.prod(grid)), rest)
    flat[index] = values
    return flat.reshape(grid)


def _scale(config, m: str, row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation) that make the model's input a picture or log-mel again."""
    if m == "rgb":
        picture = config.picture
        if picture.normalise == "clip":
            return _of_clip(row["rgb"][0] / np.float32(255), (0, 1, 2))
        return np.array(picture.mean, "f4"), np.array(picture.std, "f4")
    sound = config.spectrogram
    if sound.normalise == "clip":
        x = spectrogram.log_mel(jnp.asarray(row["waveform"][:1]), sound.preset)
        return _of_clip(np.asarray(x[0]), (0,))
    if sound.normalise == "none":
        return np.zeros(1, "f4"), np.ones(1, "f4")
    return np.array(sound.mean, "f4"), np.array(sound.std, "f4")


def _of_clip(x: np.ndarray, axes: tuple[int, ...]):
    """The statistics by which `augment.prepare_…` normalises each clip."""
    mean = x.mean(axes, keepdims=True)
    return mean, np.asarray((x - mean).std() + np.float32(1e-6))


def _versions(patches, values, masked, cut: inputs.Layout, scale):
    """Original, masked and reconstruction in raw units; masked places are HIDDEN."""
    filled, hidden = patches.copy(), patches.copy()
    filled[masked], hidden[masked] = values, HIDDEN
    whole = lambda x: np.asarray(
        tokens.unpatchify(jnp.asarray(x)[None], cut.grid, cut.patch)[0]
    )
    raw = [whole(x) * scale[1] + scale[0] for x in (patches, hidden, filled)]
    return Spectrograms(*(x[..., 0] if x.shape[-1] == 1 else x for x in raw))


def _distance(versions: Spectrograms, mask: np.ndarray, cut: inputs.Layout) -> float:
    """Mean squared error where masked."""
    original, hidden, filled = versions
    if cut.channels == 3:
        original, filled = (np.clip(x, 0, 1) for x in (original, filled))
    return float(np.mean((filled - original)[np.isnan(hidden)] ** 2))


def _frames(versions: Spectrograms | None) -> visualise.Panels | None:
    """Pictures in [0, 1] as uint8, masked places grey."""
    if versions is None:
        return None
    hidden = np.isnan(versions.masked)
    paint = lambda x: np.round(np.clip(np.nan_to_num(x), 0, 1) * 255).astype(np.uint8)
    original, masked, filled = (paint(x) for x in versions)
    return visualise.Panels(original, np.where(hidden, visualise.GREY, masked), filled)
