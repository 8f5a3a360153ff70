"""Configs: whatever is valid builds and runs, whatever is broken is a ConfigError."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reliability
import synthetic
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from av_mae import (
    ConfigError,
    evaluation,
    finetune,
    fusion,
    losses,
    optim,
    parallel,
    pretrain,
    probe,
    update,
)
from av_mae import run as runs

TRAINERS = {"pretrain": pretrain, "finetune": finetune}
FULL = os.environ.get("AV_MAE_STRESS") == "full"
EXAMPLES = 500 if FULL else 40
MANY = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a config tells enough, and a simpler one costs minutes
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


# Random valid configs.

COMMON = {
    "modalities": [("rgb", "spectrogram"), ("rgb",), ("spectrogram",)],
    "compute__accumulate": [1, 2],
    "compute__dtype": ["float32", "bfloat16"],
    "compute__scan": [False, True],
    "compute__remat": ["none", "blocks", "dots"],
    "data__num_frames": [2, 3, 4],  # half a tube is dropped
    "data__samples_per_clip": [1, 2],
    "ema": [0.0, 0.9],
    "nonfinite": ["stop", "skip"],
    "optimizer__clip_norm": [0.0, 1.0],
    "picture__normalise": ["fixed", "clip"],
    "model__cls_token": [False, True],
    "model__modality_embeddings": [False, True],
    "model__depth": [1, 2],
    "model__drop_path": [0.0, 0.5],
    "model__norm": [False, True],
    "model__positions": ["sinusoidal", "learned", "fourier"],
    "model__block__gelu": ["tanh", "erf"],
    "model__block__key_bias": [False, True],
    "model__block__layer_scale": [0.0, 0.1],
    "spectrogram__normalise": ["none", "fixed", "clip"],
    "augment__flip": [0.0, 0.5],
    "augment__time_shift": [False, True],
    "schedule__kind": list(optim.KINDS),
}
PRETRAIN = {
    "model__fusion": ["mid", "early", "shared", "separate"],
    "model__fusion_layers": [0, 1],
    "model__decoder__kind": ["shared", "separate", "joint"],
    "mask__rgb__kind": ["random", "tube"],
    "mask__rgb__ratio": [0.5, 0.75],
    "mask__spectrogram__kind": ["random", "time", "frequency"],
    "mask__spectrogram__ratio": [0.5, 0.75],
    "objective__kind": ["reconstruct", "inpaint"],
    "objective__unmasked": [False, True],
    "objective__target__rgb": list(losses.TARGETS),
    "objective__target__spectrogram": list(losses.SOUND_TARGETS),
    "objective__l2": [0.0, 0.01],
    "objective__masks_per_clip": [1, 2],
}
FINETUNE = {
    "model__fusion": list(fusion.FUSIONS),
    "model__fusion_layer": [0, 1],
    "model__bottlenecks_at_test": [False, True],
    "model__share_encoder": [False, True],
    "model__sound_channels": [1, 3],
    "model__pool": ["mean", "max", "sum", "token"],
    "model__head_norm": [False, True],
    "model__head_dropout": [0.0, 0.5],
    "model__representation": [0, 8],
    "objective__kind": ["softmax", "sigmoid"],
    "objective__label_smoothing": [0.0, 0.3],
    "optimizer__layer_decay": [1.0, 0.75],
    "augment__mixup": [0.0, 0.8],
    "augment__cutmix": [0.0, 1.0],
    "augment__mix_per_modality": [False, True],
    "eval__average": list(evaluation.AVERAGES),
    "probe": list(probe.TRAINED),
}


def is_valid(name: str, changes: dict) -> bool:
    """Whether the choices go together, as the documentation of the fields says."""
    one = len(changes["modalities"]) == 1
    if name == "digits/pretrain":
        inpaint = changes["objective__kind"] == "inpaint"
        pixels = losses.TARGETS[changes["objective__target__rgb"]].pixels
        return not (
            inpaint
            and (one or changes["objective__unmasked"])
            or (pixels and changes["picture__normalise"] == "clip")
        )
    return not (changes["probe"] == "linear" and changes["model__representation"])


@st.composite
def valid(draw, name: str, own: dict):
    """A tiny config with a random choice in every field of the tables."""
    each = {k: st.sampled_from(v) for k, v in (COMMON | own).items()}
    drawn = draw(st.fixed_dictionaries(each).filter(lambda c: is_valid(name, c)))
    config = synthetic.tiny(name, batch_size=2, eval__batch_size=2, **drawn)
    config.data.size = 32
    return config


def one_step(config) -> dict[str, float]:
    """The numbers of the first update and of one evaluated batch, at tiny size."""
    trainer, mesh = TRAINERS[config.trainer], parallel.mesh(1, 1)
    multilabel = config.objective.kind == "sigmoid"
    data = synthetic.Dataset(
        config, num_clips=4, views=config.data.samples_per_clip, multilabel=multilabel
    )
    if config.trainer == "pretrain":
        model, layers = pretrain.build(config), {}
        call = pretrain.make_reconstruct(config, model, False)
        options = update.options_of(config)
    else:
        model = finetune.build(config, 3)
        layers = finetune.layers_of(model)
        call = finetune.make_predict(config, model, False)
        options = update.options_of(config, probe.TRAINED[config.probe])
    init = functools.partial(trainer.init, config, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    tx = runs.optimiser(config, 4, 8, shapes, options.trained, **layers)
    first, abstract = update.initial(init, tx, config.seed, mesh, options)
    clips, accumulate = config.batch_size, config.compute.accumulate
    loss = trainer.make_loss(config, call)
    step = update.make(loss, tx, accumulate, abstract, mesh, options)
    batch = jax.tree.map(jnp.asarray, next(data.train(clips * accumulate)))
    state, numbers = step(first(), batch)
    numbers = {k: float(x) for k, x in numbers.items()}
    if config.trainer == "finetune":
        measures = finetune.make_measures(config, model, False, mesh)
        numbers |= evaluation.run(
            config, measures, runs.weights(state), data, lambda batch: batch
        )
    return numbers


def check_valid(config):
    TRAINERS[config.trainer].check(config)
    numbers = one_step(config)
    for name, value in numbers.items():
        # d' is infinite where a ranking of so few clips is right or wrong throughout.
        infinite = name.endswith("d_prime") and math.isinf(value)
        assert math.isfinite(value) or infinite, (name, value)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize(
    "name, own", [("digits/pretrain", PRETRAIN), ("digits/finetune", FINETUNE)]
)
def test_many_valid_configs_take_a_step(name, own):
    tried = []

    @MANY(max_examples=EXAMPLES // 2)
    @given(valid(name, own))
    def check(config):
        check_valid(config)
        tried.append(config)

    check()
    kind, outcome = name.split("/")[1], "a step, a finite loss"
    reliability.record(f"random valid config: {kind}", len(tried), outcome)


# Random broken configs: one fault in an otherwise valid one.

WRONG = {  # field: values that are never right
    "ema": [1.0, -0.1, math.nan],
    "epochs": [0.0, -1.0, math.inf],
    "batch_size": [0, -4],
    "eval.batch_size": [0],
    "steps": [-1],
    "nonfinite": ["skpi"],
    "modalities": [(), ("spectrogram", "rgb"), ("rgb", "rgb"), ("sound",), (3,)],
    "compute.accumulate": [0],
    "compute.dtype": ["float16", ""],
    "compute.remat": ["all"],
    "compute.attention": ["flash9"],
    "parallel.data": [0, 5000],
    "parallel.fsdp": [0, 5000],
    "data.size": [0, -16, 10**9],
    "data.num_frames": [0, 1],
    "data.fps": [-1.0, 0.0],
    "data.audio_seconds": [0.0, -1.0],
    "data.samples_per_clip": [0],
    "data.views": [0],
    "model.variant": ["B", "Q/16x2", "B/16", ""],
    "model.width": [-8],
    "model.heads": [-1, 3],
    "model.fusion": ["late", ""],
    "model.positions": ["absolute"],
    "model.drop_path": [1.0, -0.5],
    "model.block.gelu": ["relu"],
    "model.block.eps": [0.0],
    "optimizer.name": ["lion"],
    "optimizer.b1": [1.0],
    "optimizer.layer_decay": [0.0, 1.5],
    "optimizer.decay_rules": [(("(", 1.0),), (("a",),), ("ab",), ((".*", "x"),)],
    "schedule.kind": ["linear"],
    "schedule.learning_rate_per_256": [-1.0, math.nan],
    "checkpoint.keep": [0],
    "log.every_steps": [0],
    "eval.every_epochs": [0.0],
    "eval.modalities": [("sound",), ("spectrogram+rgb",), (1,)],
    "picture.normalise": ["imagenet"],
    "picture.mean": [(0.5,), (), ("a", "b", "c"), (0.5, math.nan, 0.5)],
    "picture.std": [(0.5, 0.0, 0.5)],
    "spectrogram.preset": ["mtb"],
    "spectrogram.mean": [math.nan, math.inf],
    "spectrogram.std": [0.0, math.nan],
    "spectrogram.normalise": ["both"],
    "init_from.weights": ["average"],
    "init_from.allow_fresh": [("(",), (1,)],
    "augment.flip": [1.5],
    "augment.corruption": ["noise", "rain:3"],
    "augment.time_masks": [-1, 2],
}
WRONG_PRETRAIN = {
    "mask.rgb.ratio": [1.0, 0.0, 2.0, -0.5, math.nan],
    "mask.rgb.kind": ["time"],
    "mask.spectrogram.ratio": [1.0],
    "mask.spectrogram.kind": ["tube"],
    "model.fusion_layers": [3, -1],
    "model.decoder.kind": ["tall"],
    "model.decoder.heads": [0, 3],
    "model.decoder.depth": [0],
    "objective.kind": ["restore"],
    "objective.target.rgb": ["hog"],
    "objective.target.spectrogram": ["grey"],
    "objective.inpaint_layout": ["mine"],
    "objective.decode.share": [0.0],
    "objective.masks_per_clip": [0],
}
WRONG_FINETUNE = {
    "model.fusion_layer": [3, -1],
    "model.bottlenecks": [0],
    "model.pool": ["attention"],
    "model.head_dropout": [1.0],
    "model.label_heads": [(("verb",),), ("verb",), (("verb", "many"),)],
    "objective.kind": ["hinge"],
    "objective.label_smoothing": [-0.1],
    "probe": ["knn"],
    "eval.corruption": ["noise:", "rain:3"],
    "eval.average": ["votes"],
    "augment.mix_probability": [2.0],
}
OTHER_TYPES = ["text", 7.5, 3, True, (1, 2), None]


def parent_of(config, name: str):
    """(group, last name) of a field by its full name."""
    *parents, last = name.split(".")
    return functools.reduce(lambda group, key: group[key], parents, config), last


@st.composite
def broken(draw):
    """(config, the field that is wrong)."""
    name = draw(st.sampled_from(["digits/pretrain", "digits/finetune"]))
    config = synthetic.tiny(name)
    own = WRONG_PRETRAIN if config.trainer == "pretrain" else WRONG_FINETUNE
    table = WRONG | own
    kind = draw(st.sampled_from(["value", "type", "missing", "unknown"]))
    field = draw(st.sampled_from(sorted(table)))
    group, last = parent_of(config, field)
    with config.unlocked(), group.ignore_type():
        if kind == "value":
            group[last] = draw(st.sampled_from(table[field]))
        elif kind == "missing":
            del group[last]
        elif kind == "unknown":
            group[f"{last}_"] = group[last]
            field += "_"
        else:
            old = type(group[last])  # ConfigDict itself makes 1.0 of True
            alike = {float: (float, int, bool), int: (int,), tuple: (tuple, str)}
            kinds = alike.get(old, (old,))
            others = [x for x in OTHER_TYPES if type(x) not in kinds]
            group[last] = draw(st.sampled_from(others))
    return config, field


@pytest.mark.stress
def test_a_broken_config_is_refused_by_its_field():
    tried = []

    @MANY(max_examples=EXAMPLES)
    @given(broken())
    def check(case):
        check_broken(*case)
        tried.append(case)

    check()
    outcome = "a ConfigError that names the field, before anything is compiled"
    reliability.record("random broken config", len(tried), outcome)


def check_broken(config, field: str):
    with pytest.raises(ConfigError) as error:
        TRAINERS[config.trainer].check(config)
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?"))
    assert field.rstrip("_") in text, (field, text)


def test_every_wrong_value_is_refused_by_its_field():
    for name, own in (
        ("digits/pretrain", WRONG_PRETRAIN),
        ("digits/finetune", WRONG_FINETUNE),
    ):
        for field, values in (WRONG | own).items():
            for value in values:
                config = synthetic.tiny(name)
                group, last = parent_of(config, field)
                with config.unlocked(), group.ignore_type():
                    group[last] = value
                with pytest.raises(ConfigError) as error:
                    TRAINERS[config.trainer].check(config)
                assert field in str(error.value), (field, value, str(error.value))


# Combinations, with what to do.

IMPOSSIBLE = [
    (
        "digits/pretrain",
        dict(data__size=40),
        "model.variant 'Ti/16x2' has patches of 16, which do not divide data.size=40: "
        "choose 32 or 48.",
    ),
    (
        "digits/pretrain",
        dict(model__fusion_layers=3),
        "model.fusion_layers is 3, but the encoder has 2 layers: set it from 0",
    ),
    (
        "digits/pretrain",
        dict(model__fusion="bottleneck"),
        "model.fusion is 'bottleneck', which is of finetuning alone: choose one of "
        "early, shared, separate, mid.",
    ),
    (
        "digits/finetune",
        dict(model__fusion="concat"),
        "model.fusion is 'concat', but the config has no model.sound: begin with "
        "configs/ucf101/avmaskenhancer_finetune.py.",
    ),
    (
        "digits/pretrain",
        dict(objective__decode__share=0.5),
        "objective.decode.share is 0.5, but with objective.decode.kind 'all' every",
    ),
    (
        "digits/pretrain",
        dict(optimizer__layer_decay=0.75),
        "optimizer.layer_decay is 0.75, but pretraining numbers no layers: set it",
    ),
    (
        "digits/finetune",
        dict(model__fusion_layer=3),
        "model.fusion_layer is 3, but the encoder has 2 layers: set it from 0",
    ),
    (
        "digits/pretrain",
        dict(objective__kind="inpaint", modalities=("rgb",)),
        "objective.kind is 'inpaint', which predicts each modality from the other",
    ),
    (
        "digits/pretrain",
        dict(mask__rgb__ratio=1.0),
        "mask.rgb.ratio is 1.0: choose a share between 0 and 1",
    ),
    (
        "digits/finetune",
        dict(objective__kind="sigmoid", model__label_heads=(("verb", 0),)),
        "objective.kind is 'sigmoid', but model.label_heads are of one label each",
    ),
    (
        "digits/finetune",
        dict(model__sound_channels=2),
        "model.sound_channels is 2: it has to be 1 or 3.",
    ),
    (
        "digits/finetune",
        dict(probe="linear", model__representation=8),
        "model.representation is 8, a layer with tanh, which is not linear",
    ),
    (
        "ucf101/avmaskenhancer_finetune",
        dict(probe="attentive"),
        "probe is 'attentive', but model.fusion 'concat' has no common tokens",
    ),
    (
        "ucf101/avmaskenhancer_finetune",
        dict(eval__modalities=("spectrogram",)),
        "eval.modalities has 'spectrogram', but model.fusion 'concat' looks at",
    ),
    (
        "digits/pretrain",
        dict(eval__modalities=("sound",)),
        "eval.modalities has 'sound', but modalities is ('rgb', 'spectrogram')",
    ),
]


@pytest.mark.parametrize(("name", "changes", "text"), IMPOSSIBLE)
def test_impossible_combinations_say_what_to_do(name, changes, text):
    make = synthetic.tiny if name.startswith("digits") else synthetic.config
    config = make(name)
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    with pytest.raises(ConfigError) as error:
        TRAINERS[config.trainer].check(config)
    assert text in str(error.value)


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
    config = synthetic.tiny("digits/pretrain", batch_size=3)
    twice = np.array([jax.devices()[:1] * 2]).T
    mesh = jax.sharding.Mesh(twice, ("data", "fsdp"))
    monkeypatch.setattr(parallel, "mesh", lambda *_: mesh)
    with pytest.raises(ConfigError, match="batch_size=3 is not divisible by the 2"):
        pretrain.check(config)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("epochs", "many", "epochs is 'many': it has to be a number, such as 1.0."),
        ("steps", 2.5, "steps is 2.5: it has to be a whole number, such as 0."),
        ("compute.scan", 1, "compute.scan is 1: it has to be a truth value"),
        ("seed", True, "seed is True: it has to be a whole number"),
        ("data.dir", 3, "data.dir is 3: it has to be a text"),
        ("picture", 3, "picture is 3: it has to be a group of fields"),
        ("picture.mean", 0.5, "picture.mean is 0.5: it has to be a tuple"),
    ],
)
def test_types_of_fields(field, value, text):
    config = synthetic.tiny("digits/pretrain")
    group, last = parent_of(config, field)
    with config.unlocked(), group.ignore_type():
        group[last] = value
    with pytest.raises(ConfigError) as error:
        pretrain.check(config)
    assert text in str(error.value)
    whole = synthetic.tiny("digits/pretrain")
    with whole.ignore_type():
        whole.epochs = 3  # a whole number is a number
    pretrain.check(whole)


def test_unknown_and_missing_fields():
    config = synthetic.tiny("digits/finetune")
    with config.unlocked():
        config.model.fusion_layr = 3
    with pytest.raises(ConfigError, match="model.fusion_layr is no field of a config"):
        finetune.check(config)
    with config.unlocked():
        del config.model.fusion_layr
        del config.eval.average
    with pytest.raises(ConfigError, match="eval.average is missing: add it, as 'logi"):
        finetune.check(config)


@pytest.mark.parametrize("name", ["digits/pretrain", "audioset/finetune"])
def test_shipped_configs_are_whole(name):
    for arg in ("", "smoke"):
        config = synthetic.config(name, arg)
        before = runs.config_json(config)
        TRAINERS[config.trainer].check(config)
        assert runs.config_json(config) == before
