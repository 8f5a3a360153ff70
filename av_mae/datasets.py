"""The data sets that a config names, opened as its model wants them."""

import logging

import jax

from av_mae import choose, finetune, spectrogram, stats
from data import pipeline

log = logging.getLogger(__name__)


def load(config) -> dict[str, pipeline.Dataset]:
    """The splits that the config's mode reads, the training split for training alone.

    Fills in statistics that the config asks of the data set.
    """
    told = _statistics(config) if "spectrogram" in config.modalities else ""
    names = {"train": config.data.split, "eval": config.eval.split}
    roles = ("train", "eval") if config.mode == "train" else ("eval",)
    found = {role: split(config, names[role]) for role in roles}
    for dataset in found.values():
        dataset.notes += [told] if told else []
    return found


def _statistics(config) -> str:
    """Looks mean and deviation of log-mels up, or fixed ones over: what is wrong.

    Those of the data set, which are the training split's; where only an evaluation is
    made and none are stored, of what it is made on.
    """
    sound, data = config.spectrogram, config.data
    split = data.split if config.mode == "train" else config.eval.split
    if sound.normalise == "fixed":
        return stats.check_fixed(config, split)
    if sound.normalise == "dataset":
        where = data.dir, sound.preset, split, data.source, data.skip_bad_records
        training = config.mode == "train"
        sound.mean, sound.std, stored = stats.sound(*where, keep=training)
        log.info("log-mel mean %.4f, deviation %.4f (data set)", sound.mean, sound.std)
        if not (training or stored):
            return (
                f"mean and deviation of the log-mels are those of {split}, since none "
                f"of the training's are stored in {data.dir}"
            )
    return ""


def split(config, name: str, label: str | None = None) -> pipeline.Dataset:
    """One split; `label` as of `pipeline.load`, None for what the trainer takes."""
    preset, log_mel = spectrogram.preset_of(config.spectrogram), None
    if isinstance(preset, spectrogram.Precomputed):
        log_mel = preset.rows, preset.mels
    if label is None:
        label = label_kind(config) if config.trainer == "finetune" else "none"
    return pipeline.load(
        config.data,
        name,
        modalities=tuple(config.modalities),
        label=label,
        sample_rate=preset.sample_rate,
        log_mel=log_mel,
        seed=config.seed,
        process=(jax.process_index(), jax.process_count()),
    )


def label_kind(config) -> str:
    """How the pipeline gives labels to a classifier of this config."""
    if dict(config.model.label_heads):
        return "heads"
    return choose("objective.kind", config.objective.kind, finetune.LABELS)
