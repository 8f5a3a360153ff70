"""What can be seen to be wrong with a config before anything is made or compiled.

`common` is for both trainers, `pretraining` and `finetuning` for one; their `check`
calls them and asks the tables of names that the models choose from. Every error is a
ConfigError with the field's full name and what to do.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from av_mae import (
    MODALITIES,
    ConfigError,
    choose,
    fusion,
    inputs,
    maskenhancer,
    optim,
    parallel,
    tokens,
)
from av_mae.importers import imported
from av_mae.transformer import size_of

# Numbers by field, where the trainer has the field: (allowed, rule, fields).
RULES = (
    (
        lambda x: x >= 1,
        "at least 1",
        "batch_size eval.batch_size data.stride data.samples_per_clip data.views "
        "data.crops "
        "compute.accumulate log.every_steps checkpoint.every_steps checkpoint.keep "
        "parallel.fsdp objective.masks_per_clip model.decoder.depth "
        "model.decoder.width model.decoder.heads model.decoder.mlp",
    ),
    (
        lambda x: x >= 0,
        "at least 0",
        "seed steps data.fps data.limit data.threads data.workers "
        "data.skip_bad_records model.width model.depth model.heads model.mlp "
        "model.classes model.representation model.head_init model.block.layer_scale "
        "optimizer.weight_decay optimizer.clip_norm schedule.warmup_epochs "
        "schedule.learning_rate_per_256 schedule.floor_per_256 augment.mixup "
        "augment.cutmix augment.frequency_masks augment.frequency_width "
        "augment.time_masks augment.time_width log.pictures objective.l2 "
        "objective.weights.rgb objective.weights.spectrogram",
    ),
    (
        lambda x: 1 <= x <= 8192,
        "from 1 to 8192",
        "data.num_frames data.size data.short_side",
    ),
    (lambda x: x in (1, 3), "1 or 3", "model.sound_channels"),
    (lambda x: True, "a finite number", "spectrogram.mean"),
    (
        lambda x: x > 0,
        "above 0",
        "epochs data.audio_seconds eval.every_epochs optimizer.eps "
        "model.block.eps model.head_eps model.decoder.eps spectrogram.std",
    ),
    (
        lambda x: 0 <= x <= 1,
        "from 0 to 1",
        "augment.flip augment.colour augment.grey augment.erase "
        "augment.mix_probability augment.mix_switch objective.label_smoothing",
    ),
    (
        lambda x: 0 <= x < 1,
        "at least 0 and below 1",
        "ema model.drop_path model.head_dropout optimizer.b1 optimizer.b2",
    ),
    (
        lambda x: 0 < x <= 1,
        "above 0 and at most 1",
        "optimizer.layer_decay objective.decode.share",
    ),
)


def common(config: ConfigDict):
    """What both trainers ask of a config; see the module."""
    _fields(config, imported.template(config.trainer))
    for allowed, rule, names in RULES:
        for name in names.split():
            value = _find(config, name)
            if value is not None and not (math.isfinite(value) and allowed(value)):
                raise ConfigError(f"{name} is {value}: it has to be {rule}.")
    _modalities(config.modalities)
    if "rgb" in config.modalities and config.data.fps <= 0:
        raise ConfigError(
            f"data.fps is {config.data.fps}: it has to be above 0 where there is a "
            "picture, as 25.0."
        )
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    parallel.check_batch(config.batch_size, mesh)
    parallel.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    choose("nonfinite", config.nonfinite, ("stop", "skip"))
    choose("init_from.weights", config.init_from.weights, ("params", "ema"))
    choose("optimizer.name", config.optimizer.name, optim.OPTIMIZERS)
    choose("model.positions", config.model.positions, tokens.POSITIONS)
    choose("schedule.kind", config.schedule.kind, optim.KINDS)
    _rules(config.optimizer.decay_rules)
    for name in ("allow_fresh", "allow_unused"):
        patterns = config.init_from[name]
        _regexes(f"init_from.{name}", [patterns] if _is_text(patterns) else patterns)
    _picture(config.picture)
    _patches(config)
    if config.model.fusion in maskenhancer.FUSIONS:
        _maskenhancer(config)


def _maskenhancer(config):
    """AV-MaskEnhancer needs its sound encoder, and classifies pictures."""
    kind = config.model.fusion
    if "sound" not in config.model:
        raise ConfigError(
            f"model.fusion is {kind!r}, but the config has no model.sound: begin with "
            f"configs/ucf101/avmaskenhancer_{config.trainer}.py."
        )
    for name in config.eval.modalities:
        if "rgb" not in str(name).split("+"):
            raise ConfigError(
                f"eval.modalities has {name!r}, but model.fusion {kind!r} looks at "
                "the picture and only hears the sound: leave it out."
            )


def _is_text(value) -> bool:
    return isinstance(value, str)


def _find(config, name: str) -> Any:
    """The value of a field by its full name, None where there is no such field."""
    for part in name.split("."):
        if part not in config:
            return None
        config = config[part]
    return config


# Fields and their types.


def _fields(config: ConfigDict, neutral: ConfigDict, prefix: str = ""):
    """Every field of the trainer, none besides, each of its type."""
    for name in config:
        if name not in neutral and prefix + name not in _own(config):
            close = difflib.get_close_matches(name, list(neutral), n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else "remove it."
            raise ConfigError(f"{prefix}{name} is no field of a config: {hint}")
    for name, value in neutral.items():
        full = prefix + name
        if name not in config:
            if full in ("optimizer.b2", "optimizer.eps") and config.name == "sgd":
                continue
            shown = "its fields" if isinstance(value, ConfigDict) else repr(value)
            raise ConfigError(
                f"{full} is missing: add it, as {shown} to change nothing."
            )
        if isinstance(value, ConfigDict) and isinstance(config[name], ConfigDict):
            _fields(config[name], value, f"{full}.")
        elif not _fits(config[name], value):
            kind = "group of fields" if isinstance(value, ConfigDict) else _kind(value)
            raise ConfigError(
                f"{full} is {config[name]!r}: it has to be a {kind}, such as {value!r}."
            )


def _own(group) -> tuple[str, ...]:
    """Fields that `model` alone may have besides: AV-MaskEnhancer's (maskenhancer)."""
    return ("model.sound",) if "fusion" in group else ()


def _kind(value) -> str:
    names = {bool: "truth value", int: "whole number", float: "number", str: "text"}
    return names.get(type(value), "tuple")


def _fits(value, neutral) -> bool:
    """Whether a value has the type of the neutral one; a whole number is a number."""
    if isinstance(neutral, bool) or isinstance(value, bool):
        return type(value) is type(neutral)
    if isinstance(neutral, float):
        return isinstance(value, int | float)
    if isinstance(neutral, Sequence) and not _is_text(neutral):
        return isinstance(value, Sequence)  # text names one: "head/.*"
    return isinstance(value, type(neutral))


# Values.


def _modalities(names: Sequence):
    if not names or list(names) != [m for m in MODALITIES if m in names]:
        raise ConfigError(
            f"modalities={tuple(names)!r} must be some of {MODALITIES}, in this order."
        )


def _regexes(field: str, patterns: Iterable):
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"{field} has {pattern!r}, which is no regular expression ({error}): "
                "correct it."
            ) from error


def _rules(rules):
    for rule in rules:
        pair = isinstance(rule, Sequence) and len(rule) == 2 and not _is_text(rule)
        if not pair or not _fits(rule[1], 1.0):
            raise ConfigError(
                f"optimizer.decay_rules has {rule!r}: write pairs (regex, multiple of "
                "optimizer.weight_decay)."
            )
    _regexes("optimizer.decay_rules", [rule[0] for rule in rules])


def _picture(picture):
    for name in ("mean", "std"):
        values = picture[name]
        numbers = all(_fits(x, 1.0) and math.isfinite(x) for x in values)
        if len(values) != 3 or not numbers:
            raise ConfigError(
                f"picture.{name} is {values!r}: give a finite number for each of the "
                "three colours."
            )
    if min(picture.std) <= 0:
        raise ConfigError(f"picture.std is {picture.std!r}: all have to be above 0.")


def _patches(config):
    """Patches have to fill the picture; frames and rows left over are dropped."""
    inputs.check(config)
    layouts = inputs.layouts(config)
    if "rgb" not in layouts:
        return
    size, part = config.data.size, layouts["rgb"].patch[1]
    if size % part:
        below = size - size % part
        raise ConfigError(
            f"model.variant {config.model.variant!r} has patches of {part}, which do "
            f"not divide data.size={size}: choose {below} or {below + part}."
        )


# One trainer's.


def pretraining(config: ConfigDict):
    """What only pretraining asks of a config."""
    model, decoder = config.model, config.model.decoder
    depth = size_of(model).depth
    own = [x for x in fusion.FUSIONS if {*fusion.SETTINGS.get(x, ())} <= {*model}]
    if model.fusion in fusion.FUSIONS and model.fusion not in own:
        raise ConfigError(
            f"model.fusion is {model.fusion!r}, which is of finetuning alone: choose "
            f"one of {', '.join(own)}."
        )
    if config.objective.decode.kind == "all" and config.objective.decode.share != 1:
        raise ConfigError(
            f"objective.decode.share is {config.objective.decode.share}, but with "
            "objective.decode.kind 'all' every masked token is decoded: set it to 1.0, "
            "or kind to 'running_cell' or 'random'."
        )
    if config.optimizer.layer_decay != 1:
        raise ConfigError(
            f"optimizer.layer_decay is {config.optimizer.layer_decay}, but pretraining "
            "numbers no layers: set it to 1.0."
        )
    if model.fusion == "mid" and not 0 <= model.fusion_layers <= depth:
        raise ConfigError(
            f"model.fusion_layers is {model.fusion_layers}, but the encoder has "
            f"{depth} layers: set it from 0 (never joint) to {depth} (all joint)."
        )
    if decoder.width % decoder.heads:
        raise ConfigError(
            f"model.decoder.heads is {decoder.heads}, which does not divide "
            f"model.decoder.width {decoder.width}: choose a number of heads that does."
        )


def finetuning(config: ConfigDict):
    """What only finetuning asks of a config."""
    model = config.model
    heard = model.fusion in maskenhancer.FUSIONS
    if model.fusion == "bottleneck" and model.bottlenecks < 1:
        raise ConfigError(
            f"model.bottlenecks is {model.bottlenecks}: it has to be at least 1 where "
            "model.fusion is 'bottleneck'."
        )
    for pair in model.label_heads:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not _fits(pair[1], 0):
            raise ConfigError(
                f"model.label_heads has {pair!r}: write pairs (kind of label, number "
                "of classes or 0)."
            )
    if model.label_heads and config.objective.kind == "sigmoid":
        raise ConfigError(
            "objective.kind is 'sigmoid', but model.label_heads are of one label each: "
            "set it to 'softmax', or model.label_heads to ()."
        )
    if config.probe == "linear" and model.representation:
        raise ConfigError(
            f"model.representation is {model.representation}, a layer with tanh, which "
            "is not linear: set it to 0, or probe to 'full'."
        )
    if config.probe == "attentive" and heard:
        raise ConfigError(
            f"probe is 'attentive', but model.fusion {model.fusion!r} has no common "
            "tokens of picture and sound: choose 'linear'."
        )
