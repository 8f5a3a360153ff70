"""The classifier against the published numbers, and what pretraining hands over."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scenic
import scenic_finetune
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
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def worst(found, wanted) -> float:
    """The largest difference, after a comparison to 1e-5."""
    close(found, wanted)
    return float(np.abs(np.asarray(found) - wanted).max())


# The stored cases of MBT, all of them.


@functools.cache
def stored_cases():
    if not scenic.SCENIC.is_dir():
        return {}
    cases = scenic.meta("finetune/meta.json")["cases"]
    return {name: cases[name] for name in scenic.cases("finetune", "*.npz")}


@scenic.needed
def test_no_stored_case_is_missing():
    assert len(stored_cases()) >= 25


def labels_of(case):
    """{rgb, spectrogram, all: the labels stored for the case's objective}."""
    kind = "multilabel" if "multilabel" in case["model_name"] else "multiclass"
    stored = scenic.arrays("finetune/inputs.npz")
    names = (*stored_modalities(case), "all")
    return kind, {m: jnp.asarray(stored[f"label_{kind}/{m}"]) for m in names}


stored_modalities = scenic_finetune.modalities_of


# Those of the default suite; `make test-slow` runs them all.
FIRST = (
    "multiclass__rgb_spectrogram",
    "variant__classifier_gsp",
    "variant__classifier_token",
    "variant__no_bottleneck_share_encoder",
    "variant__return_prelogits",
    "variant__share_encoder_bottleneck",
    "variant__test_without_bottlenecks",
)


def all_or_slow(names):
    return [
        name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


@scenic.needed
@pytest.mark.parametrize("name", all_or_slow(stored_cases()))
def test_logits_and_losses_are_the_published_ones(name):
    case, stored = stored_cases()[name], scenic.arrays(f"finetune/cases/{name}.npz")
    settings = scenic_finetune.settings_of(case)
    params = scenic_finetune.params_of(settings, case)
    patches = scenic_finetune.inputs_of(settings)
    train, test = (
        scenic_finetune.outputs(settings, case, params, patches, train)
        for train in (True, False)
    )
    # What the case returns: tokens, features or logits.
    place = 0 if case["model"].get("return_preclassifier") else 2
    place = 1 if case["model"].get("return_prelogits") else place
    errors = [
        worst(train[place][m], stored[f"logits_train/{m}"])
        for m in stored_modalities(case)
    ]
    if place < 2:
        for m in stored_modalities(case):
            errors.append(worst(test[place][m], stored[f"logits_eval/{m}"]))
        parity.record("Scenic finetuning", name, outputs=max(errors))
        return
    logits = classifier.combine(test[2])
    errors.append(worst(logits, stored["logits_eval"]))
    loss = stored_losses(case, stored, train[2], logits)
    parity.record("Scenic finetuning", name, outputs=max(errors), loss=loss)


def stored_losses(case, stored, train, logits) -> float:
    """The worst relative difference of the case's losses, with and without smoothing,
    over both clips and over the first."""
    (kind, labels), found = labels_of(case), []
    for smoothing in (0.0, 0.3):
        for rows, valid in (("nomask", None), ("mask10", jnp.array([True, False]))):
            tail = f"ls{smoothing or None}/{rows}"
            entropy = functools.partial(ENTROPY[kind], smoothing=smoothing, valid=valid)
            each = [entropy(train[m], labels[m]) for m in stored_modalities(case)]
            for ours, theirs in (
                (entropy(logits, labels["all"]), stored[f"loss/eval_array/{tail}"]),
                (np.mean(each), stored[f"loss/train_dict/{tail}"]),
            ):
                close(ours, theirs)
                found.append(abs(float(ours) / float(theirs) - 1))
    return max(found)


# The stored models of one modality alone: video (vivit) and pictures (vit).

SINGLE = "single_modality_models"
SINGLE_PLACES = {
    "embed/rgb": "embedding",
    "embed/cls_rgb": "cls",
    "encoder/rgb": "Transformer/encoderblock_{}",
    "head_norm": "encoder_norm",
    "head": "output_projection",
}


@functools.cache
def single_cases():
    if not scenic.SCENIC.is_dir():
        return {}
    cases = scenic.meta(f"{SINGLE}/meta.json")["cases"]
    stored = scenic.arrays(f"{SINGLE}/fixtures.npz")
    return {name: case for name, case in cases.items() if f"{name}/logits" in stored}


@scenic.needed
def test_no_stored_case_of_one_modality_is_missing():
    assert len(single_cases()) >= 5


@scenic.needed
@pytest.mark.parametrize("name", single_cases())
def test_logits_of_one_modality_are_the_published_ones(name):
    case, stored = single_cases()[name], scenic.arrays(f"{SINGLE}/fixtures.npz")
    theirs, kind = case["model"], name.split("__")[0]
    token = theirs["classifier"] == "token"
    inside = "Transformer/encoder_norm/scale" in case["param_names"]
    settings = scenic.settings(
        "audioset/finetune",
        ("rgb",),
        fusion="separate",
        depth=2,
        mlp=48,
        drop_path=0.0,
        positions=theirs["positional_embedding"],
        cls_token=token,
        pool="token" if token else "mean",
        norm=inside,
        head_norm=not inside,
    )
    settings.model.width = 24
    clip = jnp.asarray(stored["input/video"])
    if kind == "vit_finetune":  # a picture is a video of one frame
        settings.model.variant = "Ti/8x1"
        settings.data.num_frames, settings.data.size = 1, 24
        clip = jnp.asarray(stored["input/image"])[:, None]
    model = classifier.build(settings, 7)
    pool = scenic.arrays(f"{SINGLE}/params_{kind}.npz")
    own = f"{name}/params_override/"
    pool = pool | {k.removeprefix(own): v for k, v in stored.items() if own in k}
    params = scenic.read(abstract_of(settings, model), pool, SINGLE_PLACES)
    apply = functools.partial(model.apply, {"params": params})
    with jax.default_matmul_precision("highest"):
        features = apply(
            quick(functools.partial(apply, method="encode"))(
                scenic.patches({"rgb": clip}, settings)
            ),
            method="features",
        )
        if "freeze_backbone" in theirs:
            # The probe's batch norm with its first statistics: mean 0, variance 1.
            features = {"rgb": features["rgb"] / np.sqrt(1 + 1e-5)}
        logits = apply(features, method="classify")["rgb"]
    error = worst(logits, stored[f"{name}/logits"])
    parity.record("Scenic models of one modality", name, outputs=error)


def stored_target(modalities, share_encoder=False):
    """(config, case) of the stored model with other modalities or one encoder."""
    case = stored_cases()["variant__fusion_layer_0"]
    model = case["model"] | {
        "fusion_layer": 2,
        "share_encoder": share_encoder,
        "modality_fusion": modalities,
    }
    case = case | {"inputs": modalities, "model": model}
    return scenic_finetune.settings_of(case), case


# Starting from a pretrained model.


@functools.cache
def pretrained(strategy, modalities):
    """(config, tree, places) of a stored pretraining model."""
    settings = scenic.settings(
        "audioset/pretrain", modalities, fusion=scenic.ENCODERS[strategy]
    )
    model = autoencoder.build(settings)
    abstract = jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))
    places = scenic.places(strategy, "same_decoder", modalities)
    pool = scenic.arrays("pretrain/params_pool.npz")
    return settings, scenic.read(abstract, pool, places), places


def handed_over(first, values, theirs, settings):
    """What a finetuning run does with the first params and a source."""
    fresh, unused = classifier.expected_gaps(theirs, settings)
    return init_from(
        first,
        values,
        renames=classifier.sources(theirs, settings),
        adapt=classifier.ADAPT,
        allow_fresh=fresh,
        allow_unused=unused,
    )


def started(strategy, source_modalities, modalities, share_encoder=False):
    """(config, case, params after init_from, report, places of source and target)."""
    settings, case = stored_target(modalities, share_encoder)
    first = scenic_finetune.params_of(settings, case)
    theirs, values, source_places = pretrained(strategy, source_modalities)
    params, report = handed_over(first, values, theirs, settings)
    return settings, case, params, report, (source_places, scenic_finetune.places(case))


def stored_mappings() -> dict[str, tuple]:
    """{key: (source's modalities, strategy, modalities, share)} of what is intended."""
    if not scenic.SCENIC.is_dir():
        return {}
    found = {}
    for key in scenic.meta("init_from_mae/mapping.json"):
        match = re.fullmatch(
            r"(?:pretrained_|inflated_)(\w+|rgb\+spectrogram)__(\w+)__to__"
            r"([\w+]+)__(share|noshare)__fixed_embedding_name",
            key,
        )
        if match:
            source, strategy, target, share = match.groups()
            # A target whose sound has three channels takes the same parameters.
            source = source.replace("spectrogram_3ch", "rgb+spectrogram")
            found[key] = (
                tuple(source.split("+")),
                strategy,
                tuple(target.split("+")),
                share == "share",
            )
    return found


@scenic.needed
def test_no_stored_mapping_is_missing():
    assert len(stored_mappings()) >= 34


@scenic.needed
@pytest.mark.parametrize("key", stored_mappings())
def test_init_from_maps_what_the_published_code_maps(key):
    """Where that raises (one modality, separate encoders), ours maps as from both."""
    source, strategy, modalities, share = stored_mappings()[key]
    stored = scenic.meta("init_from_mae/mapping.json")
    *_, report, (theirs, ours) = started(strategy, source, modalities, share)
    wanted = stored[key]
    if "error" in wanted:
        wanted = stored[key.replace(f"_{source[0]}__", "_rgb+spectrogram__", 1)]
    wanted = dict(wanted["mapping"])
    if len(modalities) == 1:
        # The published model has bottleneck tokens even if nothing meets in them.
        assert wanted.pop("bottleneck") is None
    assert mapping(report, theirs, ours) == wanted
    parity.record("Scenic init_from", key)


def stored_starts() -> list[tuple[str, str]]:
    """(strategy, modalities) of the logits that are stored after the intended start."""
    path = scenic.SCENIC / "init_from_mae" / "logits_after_init.npz"
    names = np.load(path).files if path.is_file() else []
    return [tuple(n.split("/")[:2]) for n in names if "/fixed/" in n]


@scenic.needed
def test_no_stored_start_is_missing():
    """Of every strategy, to every subset of the modalities."""
    assert len(stored_starts()) >= 12
    assert {strategy for strategy, _ in stored_starts()} == set(scenic.ENCODERS)


@scenic.needed
@pytest.mark.parametrize("strategy, subset", stored_starts())
def test_logits_after_init_from_are_the_published_ones(strategy, subset):
    stored = scenic.arrays("init_from_mae/logits_after_init.npz")
    wanted = stored[f"{strategy}/{subset}/fixed/logits_eval"]
    modalities = tuple(subset.split("+"))
    for source in {BOTH, modalities}:
        settings, case, params, *_ = started(strategy, source, modalities)
        patches = scenic_finetune.inputs_of(settings)
        found = scenic_finetune.outputs(settings, case, params, patches, False)[2]
        error = worst(classifier.combine(found), wanted)
    case = f"{strategy} to {subset}"
    parity.record("Scenic init_from", case, outputs=error)


def mapping(report, theirs, ours) -> dict:
    """The report as {Scenic's target: Scenic's source or None}."""
    found = {}
    for row in report.rows:
        targets = scenic.names(row.target, ours)
        fresh = row.source == "fresh"
        sources = [None] * len(targets) if fresh else scenic.names(row.source, theirs)
        found |= dict(zip(targets, sources, strict=True))
    return found


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


@pytest.mark.parametrize("fusion", ["bottleneck", "mid", "cross"])
def test_a_missing_modality_changes_nothing(fusion):
    """Loss, gradients and logits of a clip without picture do not see its junk."""
    settings, model = small(fusion=fusion, fusion_layer=2)
    settings.augment.mixup = 0.0
    settings.objective.label_smoothing = 0.0
    params, x = some_params(settings, model), examples(settings)
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, False]),
    }
    labels = {"label": jnp.eye(5)[jnp.array([0, 3, 1])]}

    def predict(params, batch, rng, train, mixes=None):
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
    np.testing.assert_allclose(
        classifier.POOLS["sum"](x), np.sum(x, axis=1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(classifier.POOLS["token"](x), x[:, 0])
    assert set(classifier.POOLS) == {"mean", "max", "sum", "token"}


@pytest.mark.parametrize("pool", classifier.POOLS)
def test_the_head_sees_what_the_config_pools(pool):
    """Pool, norm, tanh of a dense layer, head: by hand."""
    settings, model = small(pool=pool, head_norm=True, head_eps=0.1, representation=7)
    params = some_params(settings, model)
    tokens = {m: jax.random.normal(jax.random.key(0), (3, 4, 12)) for m in BOTH}
    apply = functools.partial(model.apply, {"params": params})
    found = apply(apply(tokens, method="features"), method="classify")
    x = np.asarray(classifier.POOLS[pool](tokens["rgb"]))
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 0.1)
    layers = {name: jax.tree.map(np.asarray, value) for name, value in params.items()}
    x = x * layers["head_norm"]["scale"] + layers["head_norm"]["bias"]
    for name, f in (("representation", np.tanh), ("head", lambda x: x)):
        x = f(x @ layers[name]["kernel"] + layers[name]["bias"])
    for m in BOTH:
        np.testing.assert_allclose(found[m], x, rtol=1e-4, atol=1e-5)


def test_dropout_is_before_the_head_and_in_training_only():
    settings, model = small(head_dropout=0.5)
    params = some_params(settings, model)
    features = {"rgb": jnp.ones((400, 12))}

    def run(train):
        rngs = {"dropout": jax.random.key(0)}
        apply = functools.partial(model.apply, {"params": params}, rngs=rngs)
        return apply(features, train, method="classify")["rgb"]

    whole, dropped = run(False), run(True)
    assert np.ptp(whole, axis=0).max() == 0 < np.ptp(dropped, axis=0).min()
    # Twice the rest, so that the mean stays.
    size = np.abs(np.asarray(params["head"]["kernel"])).sum(axis=0)
    assert (np.abs(dropped.mean(axis=0) - whole[0]) < 0.2 * size).all()


def test_the_first_head_has_the_scale_asked_for():
    def kernel(scale):
        _, model = small(head_init=scale, classes=300)
        features = {"rgb": jnp.zeros((1, 12))}
        key = jax.random.key(0)
        return model.init(key, features, method="classify")["params"]["head"]["kernel"]

    assert (kernel(0.0) == 0).all()
    assert 0.017 < kernel(1.0).std() < 0.0205
    np.testing.assert_allclose(kernel(0.001), 0.001 * kernel(1.0), rtol=1e-5)


def test_several_heads_have_logits_by_name():
    settings, model = small(classes={"verb": 3, "noun": 4})
    params = some_params(settings, model)
    assert {"head_verb", "head_noun"} < set(params) and "head" not in params
    features = {
        m: jax.random.normal(jax.random.key(i), (2, 12)) for i, m in enumerate(BOTH)
    }
    logits = model.apply({"params": params}, features, method="classify")
    for m in BOTH:
        for name, classes in (("verb", 3), ("noun", 4)):
            head = params[f"head_{name}"]
            assert logits[m][name].shape == (2, classes)
            wanted = features[m] @ head["kernel"] + head["bias"]
            np.testing.assert_allclose(logits[m][name], wanted, rtol=1e-5, atol=1e-5)
    present = {"rgb": jnp.array([True, False]), "spectrogram": jnp.ones(2, bool)}
    found = classifier.combine(logits, present)
    verb = {m: logits[m]["verb"] for m in BOTH}
    np.testing.assert_array_equal(found["verb"], classifier.combine(verb, present))
    np.testing.assert_array_equal(found["noun"][1], logits["spectrogram"]["noun"][1])


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
    params, report = handed_over(target, values, source_settings, settings)
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
    target = filled(abstract_of(settings, model), 0.0)
    with pytest.raises(CheckpointError, match="encoder/rgb/block_2/norm_1/scale"):
        values = filled(abstract_of(source_settings, source), 1.0)
        handed_over(target, values, source_settings, settings)


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
    "name, count, channels",
    [("audioset", 607_002_127, 1), ("vggsound", 607_302_965, 3)],
)
def test_the_full_model_has_the_published_parameters(name, count, channels):
    settings = config(f"{name}/finetune", "")
    model = classifier.build(settings, settings.model.classes)
    params = abstract_of(settings, model)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    published = scenic.large(f"{name}_finetune_L")["params"]
    kernel = published["embedding_spectrogram/kernel"]
    assert kernel == [16, 16, channels, 1024]
    scenic.assert_shapes(params, scenic.classifier_places(BOTH), published)


def test_sound_in_three_equal_channels_is_the_same_function_and_learns_thrice_as_fast():
    settings, model = small(fusion_layer=2)
    params, x = some_params(settings, model), examples(settings)
    settings.model.sound_channels = 3
    wide = classifier.build(settings, 5)
    first = abstract_of(settings, wide)
    shape = first["embed"]["spectrogram"]["kernel"].shape
    kernel = params["embed"]["spectrogram"]["kernel"]
    assert shape == (3 * len(kernel), kernel.shape[1])
    name, first = "embed/spectrogram/kernel", filled(first, 0.0)
    params = jax.device_get(params)
    three, report = init_from(first, params, adapt=classifier.ADAPT)
    (row,) = [row for row in report.rows if row.target == name]
    assert row.change.endswith("by equal_channels")
    back, _ = init_from(filled(params, 0.0), three, adapt=classifier.ADAPT)
    np.testing.assert_allclose(back["embed"]["spectrogram"]["kernel"], kernel, 1e-6)

    @functools.partial(quick, static_argnums=0)
    def run(which, params):
        apply = {1: model, 3: wide}[which].apply
        loss = lambda p: jnp.sum(apply({"params": p}, x)["spectrogram"] ** 2)
        return jax.value_and_grad(loss)(params)

    (wanted, slope), (found, slopes) = run(1, params), run(3, three)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    slope, slopes = (g["embed"]["spectrogram"]["kernel"] for g in (slope, slopes))
    for channel in range(3):  # each learns as the one does
        np.testing.assert_allclose(slopes[channel::3], slope, rtol=1e-3, atol=1e-4)
