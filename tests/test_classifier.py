"""The classifier against the published numbers, and what pretraining hands over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenic
from scenic import quick
from synthetic import config

from av_mae import (
    CheckpointError,
    ConfigError,
    autoencoder,
    classifier,
    finetune,
    inputs,
    losses,
    pretrain,
)
from av_mae.checkpoints import init_from

BOTH = ("rgb", "spectrogram")
ENTROPY = {
    "multiclass": losses.softmax_cross_entropy,
    "multilabel": losses.sigmoid_cross_entropy,
}
# Of the published choices, those that belong to this model so far.
MODEL = dict(classifier="gap", share_encoder=False, representation_size=None)
NOT = ("use_modality_tokens", "return_prelogits", "return_preclassifier")


def is_ours(case) -> bool:
    model = case["model"]
    return (
        all(model[name] == value for name, value in MODEL.items())
        and not any(model.get(name) for name in NOT)
        and model["test_with_bottlenecks"]
        and (model["use_bottleneck"] or len(case["inputs"]) == 1)
    )


@functools.cache
def stored_cases():
    if not scenic.SCENIC.is_dir():
        return {}
    cases = scenic.meta("finetune/meta.json")["cases"]
    present = scenic.cases("finetune", "*.npz")
    return {name: cases[name] for name in present if is_ours(cases[name])}


@functools.cache
def stored_model(modalities, fusion_layer=2, bottlenecks=4):
    """(config, shapes of the params, compiled (params, patches) → logits twice)."""
    settings = scenic.settings(
        "audioset/finetune",
        modalities,
        fusion_layer=fusion_layer,
        bottlenecks=bottlenecks,
        drop_path=0.0,
    )
    settings.data.audio_seconds = 0.4
    model = classifier.build(settings, classes=11)
    abstract = jax.eval_shape(lambda: finetune.init(settings, model, jax.random.key(0)))

    def logits(params, patches):
        apply = functools.partial(model.apply, {"params": params}, patches, None)
        return apply(True), classifier.combine(apply(False))

    return settings, abstract, quick(logits)


def stored_patches(settings):
    clips = scenic.arrays("finetune/inputs.npz")
    clips = {m: clips[f"input/{m}"] for m in settings.modalities}
    return scenic.patches(clips, settings)


@scenic.needed
def test_no_stored_case_is_missing():
    assert len(stored_cases()) >= 12


@scenic.needed
@pytest.mark.parametrize("name", stored_cases())
def test_logits_and_losses_are_the_published_ones(name):
    case, stored = stored_cases()[name], scenic.arrays(f"finetune/cases/{name}.npz")
    modalities = tuple(sorted(case["inputs"]))
    model = case["model"]
    settings, abstract, logits = stored_model(
        modalities, model["fusion_layer"], model["n_bottlenecks"]
    )
    pool = scenic.arrays("finetune/params_pool.npz")
    if model["n_bottlenecks"] == 1:
        pool = pool | scenic.arrays("finetune/params_n_bottlenecks_1_diff.npz")
    places = scenic.classifier_places(model["modality_fusion"])
    params = scenic.read(abstract, pool, places)
    with jax.default_matmul_precision("highest"):
        train, test = logits(params, stored_patches(settings))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(test, stored["logits_eval"])
    for m in modalities:
        close(train[m], stored[f"logits_train/{m}"])
    objective = "multiclass" if case["model_name"][:5] != "mbt_m" else "multilabel"
    labels = scenic.arrays("finetune/inputs.npz")
    label = lambda m: jnp.asarray(labels[f"label_{objective}/{m}"])
    for smoothing in (0.0, 0.3):
        for rows, valid in (("nomask", None), ("mask10", jnp.array([True, False]))):
            tail = f"ls{smoothing or None}/{rows}"
            entropy = lambda x, m, s=smoothing, v=valid: ENTROPY[objective](
                x, label(m), s, v
            )
            close(entropy(test, "all"), stored[f"loss/eval_array/{tail}"])
            each = [entropy(train[m], m) for m in modalities]
            close(np.mean(each), stored[f"loss/train_dict/{tail}"])


# Starting from a pretrained model.


def pretrained(strategy, modalities):
    """(config.model, tree, places) of a stored pretraining model."""
    settings = scenic.settings(
        "audioset/pretrain", modalities, fusion=scenic.ENCODERS[strategy]
    )
    model = autoencoder.build(settings)
    abstract = jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))
    places = scenic.places(strategy, "same_decoder", modalities)
    pool = scenic.arrays("pretrain/params_pool.npz")
    return settings.model, scenic.read(abstract, pool, places), places


def started(strategy, source_modalities, modalities):
    """(config, params after init_from, report, places of source and target)."""
    settings, abstract, logits = stored_model(modalities)
    places = scenic.classifier_places(modalities)
    first = scenic.read(abstract, scenic.arrays("finetune/params_pool.npz"), places)
    model, values, source_places = pretrained(strategy, source_modalities)
    fresh, unused = classifier.expected_gaps(model, settings.model, modalities)
    params, report = init_from(
        first,
        values,
        renames=classifier.sources(model, settings.model),
        allow_fresh=fresh,
        allow_unused=unused,
    )
    return settings, params, report, logits, (source_places, places)


SUBSETS = [BOTH, ("rgb",), ("spectrogram",)]


@scenic.needed
@pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)
@pytest.mark.parametrize("strategy", scenic.ENCODERS)
def test_init_from_maps_what_the_published_code_maps(strategy, modalities):
    settings, params, report, logits, (theirs, ours) = started(
        strategy, BOTH, modalities
    )
    key = (
        f"pretrained_rgb+spectrogram__{strategy}__to__{'+'.join(modalities)}"
        "__noshare__fixed_embedding_name"
    )
    wanted = dict(scenic.meta("init_from_mae/mapping.json")[key]["mapping"])
    if len(modalities) == 1:
        # The published model has bottleneck tokens even if nothing meets in them.
        assert wanted.pop("bottleneck") is None
    assert mapping(report, theirs, ours) == wanted
    stored = scenic.arrays("init_from_mae/logits_after_init.npz")
    wanted = stored[f"{strategy}/{'+'.join(modalities)}/fixed/logits_eval"]
    with jax.default_matmul_precision("highest"):
        found = logits(params, stored_patches(settings))[1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def mapping(report, theirs, ours) -> dict:
    """The report as {Scenic's target: Scenic's source or None}."""
    found = {}
    for row in report.rows:
        targets = scenic.names(row.target, ours)
        fresh = row.source == "fresh"
        sources = [None] * len(targets) if fresh else scenic.names(row.source, theirs)
        found |= dict(zip(targets, sources, strict=True))
    return found


@scenic.needed
@pytest.mark.parametrize("modalities", SUBSETS[1:], ids="+".join)
@pytest.mark.parametrize("strategy", scenic.ENCODERS)
def test_init_from_one_modality_maps_what_both_would(strategy, modalities):
    """Where the published code raises (its separate encoders), ours works too."""
    _, _, report, _, places = started(strategy, modalities, modalities)
    _, _, wanted, _, both = started(strategy, BOTH, modalities)
    assert mapping(report, *places) == mapping(wanted, *both)


# Small models of our own, from the shipped config.


def small(dtype="float32", classes=5, modalities=BOTH, **model):
    """(config, model) of width 12, depth 3: 8 tokens of picture, 16 of sound."""
    settings = config("audioset/finetune", "smoke")
    settings.modalities = modalities
    settings.data.update(num_frames=4, size=16, audio_seconds=0.08)
    settings.model.update(variant="Ti/8x2", width=12, depth=3, heads=2, mlp=24)
    settings.model.update(drop_path=0.0, **model)
    settings.compute.dtype = dtype
    return settings, classifier.build(settings, classes)


def some_params(settings, model):
    """Parameters of noise, so that none is zero and no initial value is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.3, x.shape), x.dtype)

    init = lambda: finetune.init(settings, model, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def examples(settings, b=3):
    rng = np.random.default_rng(1)
    normal = lambda layout: rng.normal(size=(b, layout.n, layout.f))
    layouts = inputs.layouts(settings)
    return {m: jnp.asarray(normal(x), jnp.float32) for m, x in layouts.items()}


@pytest.mark.parametrize("fusion", ["bottleneck", "mid"])
def test_a_missing_modality_changes_nothing(fusion):
    """Loss, gradients and logits of a clip without picture do not see its junk."""
    settings, model = small(fusion=fusion, fusion_layers=1)
    settings.objective.label_smoothing = 0.0
    params, x = some_params(settings, model), examples(settings)
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, False]),
    }
    labels = {"label": jnp.eye(5)[jnp.array([0, 3, 1])]}

    def predict(params, batch, rng, train):
        return model.apply({"params": params}, batch["x"], present, train), present

    loss = finetune.make_loss(settings, predict)

    @quick
    def run(x):
        grads = jax.value_and_grad(loss, has_aux=True)(params, labels | {"x": x}, 0)
        return grads, classifier.combine(*predict(params, {"x": x}, 0, False))

    first = run(x)
    junk = {
        "rgb": x["rgb"].at[1].multiply(-1e3),
        "spectrogram": x["spectrogram"].at[2].add(1e3),
    }
    jax.tree.map(np.testing.assert_array_equal, run(junk), first)
    # The test can fail: junk of a clip that has the modality does change its logits.
    changed = run(x | {"rgb": x["rgb"].at[0].multiply(-1e3)})[1]
    assert np.abs(changed[0] - first[1][0]).max() > 0.01
    np.testing.assert_array_equal(changed[1:], first[1][1:])


def test_combine_is_the_mean_over_the_modalities_of_a_clip():
    logits = {
        "rgb": jnp.array([[1.0, 2.0]] * 3),
        "spectrogram": jnp.array([[3.0, 6]] * 3),
    }
    present = {
        "rgb": jnp.array([True, True, False]),
        "spectrogram": jnp.array([True, False, True]),
    }
    np.testing.assert_array_equal(classifier.combine(logits), [[2, 4]] * 3)
    found = classifier.combine(logits, present)
    np.testing.assert_array_equal(found, [[2, 4], [1, 2], [3, 6]])


def test_pooling():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    np.testing.assert_allclose(
        classifier.POOLS["mean"](x), np.sum(x, axis=1) / 5, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(classifier.POOLS["max"](x), np.sort(x, axis=1)[:, -1])
    assert set(classifier.POOLS) == {"mean", "max"}


def test_the_head_sees_what_the_config_pools():
    found = {}
    for pool in classifier.POOLS:
        settings, model = small(pool=pool)
        x, params = examples(settings), some_params(settings, model)
        found[pool] = quick(lambda p, x, m=model: m.apply({"params": p}, x))(params, x)
    for m in BOTH:
        assert np.abs(found["mean"][m] - found["max"][m]).max() > 0.01


def test_the_head_begins_at_zero_in_float32():
    settings, model = small("bfloat16", modalities=("spectrogram",))
    init = functools.partial(finetune.init, settings, model)
    params, x = quick(init)(jax.random.key(0)), examples(settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert set(params) == {"embed", "encoder", "head"}
    assert set(params["encoder"]) == {"spectrogram", "norm"}
    assert (params["head"]["kernel"] == 0).all() and (params["head"]["bias"] == 0).all()
    params = some_params(settings, model)
    found = quick(lambda p, x: model.apply({"params": p}, x))(params, x)["spectrogram"]
    exact = small(modalities=("spectrogram",))[1]
    wanted = quick(lambda p, x: exact.apply({"params": p}, x))(params, x)["spectrogram"]
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def abstract_of(settings, model):
    return jax.eval_shape(lambda: finetune.init(settings, model, jax.random.key(0)))


def filled(abstract, value):
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), abstract)


def test_one_modality_from_a_model_with_learned_positions():
    settings, model = small(modalities=("rgb",), positions="learned")
    source_settings, source = small(positions="learned")
    target = filled(abstract_of(settings, model), 0.0)
    values = filled(abstract_of(source_settings, source), 1.0)
    fresh, unused = classifier.expected_gaps(
        source_settings.model, settings.model, settings.modalities
    )
    params, report = init_from(
        target,
        values,
        renames=classifier.sources(source_settings.model, settings.model),
        allow_fresh=fresh,
        allow_unused=unused,
    )
    assert all((x == 1).all() for x in jax.tree.leaves(params))
    assert {name for name, _ in report.unused if name.startswith("embed/")} == {
        "embed/spectrogram/kernel",
        "embed/spectrogram/bias",
        "embed/positions_spectrogram/embedding",
    }


def test_a_source_of_another_depth_is_refused():
    settings, model = small()
    source_settings, source = small(depth=2, fusion="separate")
    source_settings.model.depth = 2
    source = classifier.build(source_settings, 5)
    fresh, unused = classifier.expected_gaps(
        source_settings.model, settings.model, BOTH
    )
    with pytest.raises(CheckpointError, match="encoder/rgb/block_2/norm_1/scale"):
        init_from(
            filled(abstract_of(settings, model), 0.0),
            filled(abstract_of(source_settings, source), 1.0),
            renames=classifier.sources(source_settings.model, settings.model),
            allow_fresh=fresh,
            allow_unused=unused,
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pool="men"), "model.pool is 'men': did you mean 'mean'"),
        (dict(fusion="botleneck"), "model.fusion is 'botleneck': .*'bottleneck'"),
    ],
)
def test_a_wrong_name_is_named_with_the_right_one(change, message):
    with pytest.raises(ConfigError, match=message):
        small(**change)


@scenic.needed
@pytest.mark.parametrize(
    "table, classes, count, channels",
    [
        ("audioset_finetune_L", 527, 607_002_127, 1),
        # Published with sound repeated into three channels: 2 · 16 · 16 · 1024 more.
        ("vggsound_finetune_L", 309, 607_302_965 - 524_288, 3),
    ],
)
def test_the_full_model_has_the_published_parameters(table, classes, count, channels):
    settings = config("audioset/finetune", "")
    model = classifier.build(settings, classes)
    params = abstract_of(settings, model)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    published = dict(scenic.large(table)["params"])
    kernel = published["embedding_spectrogram/kernel"]
    assert kernel == [16, 16, channels, 1024]
    published["embedding_spectrogram/kernel"] = [16, 16, 1, 1024]
    scenic.assert_shapes(params, scenic.classifier_places(BOTH), published)
