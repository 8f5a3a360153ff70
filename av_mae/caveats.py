"""Sentences that belong beside a number: what is partial, or other than it seems.

They stand at the top of the log and beside the final result, and travel with the
checkpoints (`meta["caveats"]`), so that an evaluation elsewhere repeats them. A
sentence has no full stop.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from av_mae import spectrogram

# Means and deviations further apart than this share of the deviation are told.
CLOSE = 0.01
SHOWN = 4  # names in a sentence


def text(sentences: Sequence[str]) -> str:
    """A line for each sentence, each behind a line break; '' for none."""
    return "".join(f"\n  NOTE: {sentence}." for sentence in sentences)


def of_data(config, dataset, split: str) -> list[str]:
    """A split that lacks clips that its list names, and what else its `notes` say.

    `dataset.info["splits"][split]["listed"]` is how many clips the list names.
    """
    said, counts = list(dataset.notes), dataset.info.get("splits", {}).get(split, {})
    listed, present = counts.get("listed") or 0, counts.get("clips", 0)
    if listed > present:
        said.append(
            f"{present} of {listed} listed clips present in {split} of "
            f"{config.data.dir}: numbers are of a part of it"
        )
    if config.data.limit and split == config.data.split == config.eval.split:
        said.append(
            f"{split} is cut to {config.data.limit} clips (data.limit), also where it "
            "is evaluated"
        )
    return said


def of_corruption(config) -> list[str]:
    """Evaluations on degraded inputs; of no other evaluation, so it is not saved."""
    corruption = getattr(config.eval, "corruption", "")
    return [f"evaluated on degraded input: {corruption}"] if corruption else []


def of_evaluation(config, dataset, said: Sequence[str]) -> list[str]:
    """What `said`, the caveats of the weights, does not yet say of an evaluation."""
    found = of_data(config, dataset, config.eval.split)
    found += of_subsets(config, dataset) + of_corruption(config)
    return [sentence for sentence in found if sentence not in said]


def of_fresh(fresh: Sequence[str], total: int, expected: Sequence[str]) -> list[str]:
    """Parameters without a source, but for those that no source has (`expected`)."""
    names = [x for x in fresh if not any(re.fullmatch(e, x) for e in expected)]
    if not names:
        return []
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return [f"{len(names)} of {total} parameters are not from the source: {shown}"]


def of_unused(unused: Sequence[str], total: int) -> list[str]:
    """Parameters of the source that nothing takes, but should."""
    if not unused:
        return []
    shown = ", ".join(unused[:SHOWN]) + (", …" if len(unused) > SHOWN else "")
    return [f"{len(unused)} of {total} parameters of the source are left out: {shown}"]


def of_changes(changes: Mapping[str, tuple[Any, Any]], sentence: str) -> list[str]:
    """Fields whose value is another, behind `sentence`.

    changes: {field: (before, now)}, as `checkpoints.changes` finds them.
    """
    if not changes:
        return []
    told = [f"{x} is {now!r}, not {before!r}" for x, (before, now) in changes.items()]
    more = [f"{len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return [f"{sentence}: {', '.join([*told[:SHOWN], *more])}"]


def of_left_out(count: int, split: str) -> list[str]:
    """Damaged records that were left out of an evaluation."""
    if not count:
        return []
    return [f"{count} damaged records of {split} were left out of the evaluation"]


def of_subsets(config, dataset) -> list[str]:
    """Evaluated subsets of the modalities that some clips have nothing of.

    Their numbers are of other clips than those of all modalities.
    """
    total = dataset.num_clips
    return [
        f"numbers of {name} are of the {having} of {total} clips of "
        f"{config.eval.split} that have it"
        for name, having in dataset.having.items()
        if name in config.eval.modalities and having < total
    ]


def of_inputs(theirs, config) -> list[str]:
    """Pictures or sound that reach the model otherwise than in the source's training.

    theirs, config: whole configs, of the source and of this run.
    """
    said = []
    both = [m for m in config.modalities if m in theirs.modalities]
    if "spectrogram" in both:
        ours, source = config.spectrogram, theirs.spectrogram
        if ours.preset != source.preset:
            said.append(
                f"spectrogram.preset is {_preset(ours)}, but the source was trained "
                f"with {_preset(source)}"
            )
        said += _statistics("spectrogram", ours, source)
    if "rgb" in both:
        said += _statistics("picture", config.picture, theirs.picture)
    return said


def _preset(sound) -> str:
    """The preset's name and sample rate."""
    known = spectrogram.PRESETS.get(sound.preset, spectrogram.Precomputed())
    return f"{sound.preset!r} ({known.sample_rate} Hz)"


def _statistics(field: str, ours, theirs) -> list[str]:
    mine, other = _effective(ours), _effective(theirs)
    if mine == other:
        return []
    if isinstance(mine, str) or isinstance(other, str):
        return [
            f"{field}.normalise is {ours.normalise!r}, but the source was trained "
            f"with {theirs.normalise!r}"
        ]
    (mean, std), (other_mean, other_std) = mine, other
    pairs = [*zip(mean, other_mean, std, strict=True)]
    pairs += zip(std, other_std, std, strict=True)
    if all(abs(a - b) <= CLOSE * scale for a, b, scale in pairs):
        return []
    number = lambda values: ", ".join(f"{x:.4g}" for x in values)
    return [
        f"{field}.mean and .std are {number(mean)} and {number(std)}, but the source "
        f"was trained with {number(other_mean)} and {number(other_std)}"
    ]


def _effective(group) -> str | tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, deviations) that inputs lose; the rule where there are none."""
    if group.normalise == "none":
        return (0.0,), (1.0,)
    if group.normalise == "clip":
        return "clip"
    numbers = lambda x: tuple(x) if isinstance(x, Sequence) else (x,)
    return numbers(group.mean), numbers(group.std)


def of_meta(meta: Mapping[str, Any]) -> list[str]:
    """What the training that a checkpoint comes from had to say."""
    return list(meta.get("caveats", ()))


def of_labels(meta: Mapping[str, Any], labels) -> list[str]:
    """Class names of the evaluation that are not those of the training.

    labels: names, or {head: names}; None where the model has no classes.
    """
    trained = meta.get("labels")
    plain = lambda x: {k: list(v) for k, v in x.items()} if _heads(x) else list(x)
    if not labels or not trained or plain(labels) == plain(trained):
        return []
    return [
        "the data set's class names, or their order, are not those of the training: "
        "labels may stand for other classes than the model's"
    ]


def _heads(labels) -> bool:
    return isinstance(labels, Mapping)
