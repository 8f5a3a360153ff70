"""The count of multiply-adds against published ones, traced programs and XLA's own."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
import synthetic

from av_mae import finetune, flops, fusion, inputs, pretrain, probe, update
from av_mae.importers import videomae

# Multiply-adds of one view, 16 × 224², as published for VideoMAE (400 classes).
PUBLISHED = {"S": 56.9e9, "B": 180.3e9, "L": 596.8e9, "H": 1191e9}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_counts(size):
    counts = flops.multiply_adds(videomae.published("finetune", size))
    assert sum(counts.values()) == pytest.approx(PUBLISHED[size], rel=1e-3)


def products(jaxpr) -> int:
    """Multiply-adds of all products and convolutions that a traced program has."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [x.aval.shape for x in equation.invars if hasattr(x.aval, "shape")]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(shapes[0][i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.params["dimension_numbers"].rhs_spec
            total += out * math.prod(shapes[1]) // shapes[1][kernel[0]]
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += products(inner)
    return total


def program(config, train: bool):
    """(function, abstract arguments) of one forward pass of one clip."""
    cuts = inputs.layouts(config)
    patches = {
        m: jax.ShapeDtypeStruct((1, cut.n, cut.f), jnp.float32)
        for m, cut in cuts.items()
    }
    rngs = {"drop_path": jax.random.key(0), "dropout": jax.random.key(1)}
    if config.trainer == "pretrain":
        model = pretrain.build(config)
        params = jax.eval_shape(
            functools.partial(pretrain.init, config, model), jax.random.key(0)
        )
        masks = pretrain.draw_masks(config, jax.random.key(0), 1, train)
        arguments = (params, patches, masks)
    else:
        model = finetune.build(config, config.model.classes)
        params = jax.eval_shape(
            functools.partial(finetune.init, config, model), jax.random.key(0)
        )
        arguments = (params, patches)
    run = lambda params, *rest: model.apply(
        {"params": params}, *rest, train=train, rngs=rngs, mutable=["statistics"]
    )
    return run, arguments


def traced(config, train: bool) -> int:
    run, arguments = program(config, train)
    return products(jax.make_jaxpr(run)(*arguments).jaxpr)


PRETRAINING = {
    "early": dict(model__fusion="early", model__decoder__kind="joint"),
    "shared": dict(model__fusion="shared", model__decoder__kind="separate"),
    "separate": dict(model__fusion="separate", model__cls_token=True),
    "mid": dict(model__fusion="mid"),
    "one modality": dict(modalities=("rgb",), model__fusion="separate"),
    "inpaint": dict(objective__kind="inpaint"),
    "inpaint, Scenic's layout": dict(
        objective__kind="inpaint",
        objective__inpaint_layout="scenic",
        mask__spectrogram__ratio=0.8,
    ),
    "kept tokens too": dict(objective__unmasked=True),
    "central frame": dict(objective__target__rgb="central_frame"),
    "cross-attention decoder": dict(model__decoder__kind="cross"),
    "half decoded": dict(
        objective__decode__kind="running_cell", objective__decode__share=0.5
    ),
    "some decoded": dict(
        objective__decode__kind="random", objective__decode__share=0.3
    ),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_is_counted_as_traced(name):
    config = synthetic.tiny("digits/pretrain", **PRETRAINING[name])
    counts = flops.multiply_adds(config, train=True)
    assert sum(counts.values()) == traced(config, True)


def test_what_is_not_decoded_costs_nothing_in_training():
    half = dict(objective__decode__kind="random", objective__decode__share=0.5)
    whole, half = (
        flops.multiply_adds(synthetic.tiny("digits/pretrain", **changes), train=True)
        for changes in ({}, half)
    )
    assert half["encoder"] == whole["encoder"] and half["predict"] < whole["predict"]
    assert half["decoder"] < whole["decoder"]
    config = synthetic.tiny("digits/pretrain", objective__decode__share=0.5)
    assert flops.multiply_adds(config, train=True) == whole  # its kind is "all"


def test_a_clip_may_pass_several_times():
    config = synthetic.tiny("digits/pretrain", objective__masks_per_clip=3)
    config.data.samples_per_clip = 2
    assert flops.per_clip(config) == 6 * flops.training(config)
    once = 2 * sum(flops.multiply_adds(config).values())
    assert flops.per_clip(config, train=False) == 2 * once
    config = synthetic.tiny("digits/finetune", data__views=4, data__crops=3)
    assert flops.per_clip(config, classes=5) == flops.training(config, 5)
    once = 2 * sum(flops.multiply_adds(config, 5).values())
    assert flops.per_clip(config, train=False, classes=5) == 12 * once


FINETUNING = {
    "bottleneck": dict(),
    "bottleneck later": dict(model__fusion_layer=1),
    "no bottleneck at test": dict(model__bottlenecks_at_test=False),
    "one modality": dict(modalities=("spectrogram",)),
    "mid": dict(model__fusion="mid", model__fusion_layer=1),
    "cross, shared": dict(
        model__fusion="cross", model__share_encoder=True, model__fusion_layer=1
    ),
    "early": dict(model__fusion="early"),
    "separate": dict(model__fusion="separate", model__representation=8),
    "linear": dict(probe="linear"),
    "attentive": dict(probe="attentive"),
    "attentive, one modality": dict(probe="attentive", modalities=("rgb",)),
}


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_is_counted_as_traced(name):
    config = synthetic.tiny("digits/finetune", **FINETUNING[name])
    config.model.classes = 5
    for train in (False, True):
        counts = flops.multiply_adds(config, train=train)
        assert sum(counts.values()) == traced(config, train)


def test_what_nobody_uses_is_not_counted():
    """Without shared layers each modality's run over the tokens of both."""
    config = synthetic.tiny("digits/finetune", model__fusion="cross")
    config.model.classes = 5
    counts = sum(flops.multiply_adds(config).values())
    assert 0.4 * traced(config, False) < counts < traced(config, False)


@pytest.mark.parametrize("variant", ["attention", "concat", "video"])
def test_avmaskenhancer_is_counted_as_traced(variant):
    config = synthetic.config("ucf101/avmaskenhancer_pretrain", f"{variant},smoke")
    counts = flops.multiply_adds(config)
    assert ("sound" in counts) == (variant != "video")
    assert sum(counts.values()) == traced(config, False)


def test_avmaskenhancers_classifier_is_counted_as_traced():
    config = synthetic.config("ucf101/avmaskenhancer_finetune", "smoke")
    config.model.classes = 5
    assert sum(flops.multiply_adds(config).values()) == traced(config, False)


def test_every_strategy_is_counted():
    assert flops.FUSIONS.keys() == fusion.FUSIONS.keys()


def test_several_heads():
    config = synthetic.tiny("digits/finetune")
    both = flops.multiply_adds(config, {"verb": 3, "noun": 4})
    assert both == flops.multiply_adds(config, 7)


def xla(function, *arguments) -> float:
    """FLOPs of a compiled program by XLA's own count."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def wide(name: str, **changes):
    """A tiny config with wide layers, beside which norms and softmax are little."""
    size = dict(model__width=128, model__mlp=512, model__drop_path=0.0)
    return synthetic.tiny(name, **size, **changes)


def test_xla_counts_the_same():
    decoder = dict(model__decoder__width=128, model__decoder__mlp=512)
    config = wide("digits/pretrain", **decoder)
    run, arguments = program(config, True)
    ours = 2 * sum(flops.multiply_adds(config).values())
    assert xla(run, *arguments) == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("kind", ["full", "attentive", "linear"])
def test_xla_counts_the_same_backward(kind):
    """Of a probe no gradient goes into the encoder, which is computed all the same."""
    config = wide("digits/finetune", modalities=("rgb",), model__depth=1, probe=kind)
    config.model.classes = 5
    run, (params, *rest) = program(config, True)
    learns = update.part(params, probe.TRAINED[kind])

    def loss(learns, params, *rest):
        found, _ = run(update.replaced(params, learns), *rest)
        return sum(x.sum() for x in found.values())

    found = xla(jax.grad(loss), learns, params, *rest)
    assert found == pytest.approx(flops.training(config), rel=0.05)
