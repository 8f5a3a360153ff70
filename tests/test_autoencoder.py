"""The masked autoencoder against the published numbers, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenic
from scenic import quick
from synthetic import config

from av_mae import ConfigError, autoencoder, inputs, masking, pretrain
from av_mae.masking import Mask

BOTH = ("rgb", "spectrogram")

# The rest run with the slow tests; these two hold token order, positions and masks.
ALWAYS = (
    "separate_encoders_and_concat__same_decoder__plain",
    "separate_encoders__same_decoder__plain",
)
CASES = scenic.cases("pretrain", "*__plain.npz")


@scenic.needed
def test_no_stored_case_is_missing():
    assert len(CASES) >= 21 and set(ALWAYS) <= set(CASES)


def case_model(name):
    """(config, model, params, {Scenic's place of ours}) of a stored case."""
    case = scenic.meta("pretrain/meta.json")["cases"][f"cases/{name}"]
    encoder = case["config"]["encoder_strategy"]
    decoder = case["config"]["decoder_strategy"]
    modalities = sorted(case["config"]["modalities"])
    settings = scenic.settings(
        "audioset/pretrain", modalities, fusion=scenic.ENCODERS[encoder]
    )
    settings.model.decoder.kind = scenic.DECODERS[decoder]
    model = autoencoder.build(settings)
    places = scenic.places(encoder, decoder, modalities)
    abstract = jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))
    # The model cuts the stored clips itself: their sound is shorter than the config's.
    params = scenic.read(abstract, scenic.arrays("pretrain/params_pool.npz"), places)
    assert sum(x.size for x in jax.tree.leaves(params)) == case["n_params"]
    return settings, model, params, places


@scenic.needed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow)
        for n in CASES or ALWAYS
    ],
)
def test_predictions_losses_and_gradients_are_the_published_ones(name):
    stored = scenic.arrays(f"pretrain/cases/{name}.npz")
    settings, model, params, places = case_model(name)
    clips = scenic.arrays("pretrain/inputs.npz")
    x = scenic.patches({m: clips[f"patch8/{m}"] for m in settings.modalities}, settings)
    masks = {
        m: Mask(
            jnp.asarray(stored[f"mask/{m}/unmasked_indices"]),
            jnp.asarray(stored[f"mask/{m}/masked_indices"]),
        )
        for m in settings.modalities
    }

    def reconstruct(params, batch, rng, train):
        predictions = model.apply({"params": params}, x, masks, None, train)
        pairs = {
            m: (p, masking.take(x[m], masks[m].masked)) for m, p in predictions.items()
        }
        return pairs, masks, x, None

    loss = pretrain.make_loss(settings, reconstruct)

    def everything(params):
        pairs = reconstruct(params, None, 0, False)[0]
        (total, each), grads = jax.value_and_grad(loss, has_aux=True)(params, None, 0)
        return total, each, grads, pairs

    with jax.default_matmul_precision("highest"):
        total, each, grads, pairs = quick(everything)(params)
    np.testing.assert_allclose(total, stored["loss"], rtol=1e-5)
    for m, (prediction, _) in pairs.items():
        wanted = masking.take(jnp.asarray(stored[f"pred/{m}"]), masks[m].masked)
        np.testing.assert_allclose(prediction, wanted, rtol=1e-5, atol=1e-5)
        wanted = stored[f"loss_per_modality/{m}"]
        np.testing.assert_allclose(each[f"loss_{m}"], wanted, rtol=1e-5)
    assert_gradients(
        scenic.write(grads, places),
        {k.removeprefix("grad/"): v for k, v in stored.items() if k[:5] == "grad/"},
    )


def assert_gradients(found, wanted):
    """‖g − g_ref‖ ≤ 1e-4 · max(‖g_ref‖, 1e-4 · ‖all gradients of the case‖)."""
    norm = lambda x: float(np.linalg.norm(np.ravel(x)))
    everything = norm([norm(x) for x in wanted.values()])
    assert len(wanted) >= 6 and everything > 0
    for name, g in wanted.items():
        error = norm(np.reshape(found[name], np.shape(g)) - g)
        assert error <= 1e-4 * max(norm(g), 1e-4 * everything), (name, error, norm(g))


# Small models of our own, from the shipped config.


def small(dtype="float32", decoder="shared", **model):
    """(config, model) of width 12, depth 2: 8 tokens of picture, 16 of sound."""
    settings = config("audioset/pretrain", "smoke")
    settings.data.update(num_frames=4, size=16, audio_seconds=0.08)
    settings.mask.rgb.ratio, settings.mask.spectrogram.ratio = 0.75, 0.5
    settings.model.update(variant="Ti/8x2", width=12, depth=2, heads=2, mlp=24)
    settings.model.update(fusion_layers=1, **model)
    settings.model.decoder.update(kind=decoder, width=8, depth=1, heads=2, mlp=16)
    settings.compute.dtype = dtype
    return settings, autoencoder.build(settings)


def some_params(settings, model):
    """Parameters of noise, so that none is zero and no initial value is compiled."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.3, x.shape), x.dtype)

    init = lambda: pretrain.init(settings, model, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def examples(settings, b=3):
    """Random (patches, masks) of `b` clips."""
    rng = np.random.default_rng(1)
    layouts = inputs.layouts(settings)
    normal = lambda layout: rng.normal(size=(b, layout.n, layout.f))
    x = {m: jnp.asarray(normal(l), jnp.float32) for m, l in layouts.items()}
    return x, pretrain.draw_masks(settings, jax.random.key(2), b)


class Pair:
    """A model with parameters and inputs, its loss and predictions compiled once."""

    def __init__(self, fusion, decoder):
        self.settings, self.model = small(fusion=fusion, decoder=decoder)
        self.params = some_params(self.settings, self.model)
        self.patches, self.masks = examples(self.settings)
        self.predict = quick(
            lambda x, masks: self.model.apply({"params": self.params}, x, masks)
        )


FUSIONS = [
    ("early", "separate"),
    ("shared", "shared"),
    ("separate", "shared"),
    ("mid", "joint"),
]


@pytest.fixture(scope="module", params=FUSIONS, ids="-".join)
def pair(request):
    return Pair(*request.param)


def permuted(index, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.permuted(np.asarray(index), axis=1))


def test_the_order_of_kept_tokens_does_not_matter(pair):
    first = pair.predict(pair.patches, pair.masks)
    masks = {m: Mask(permuted(k, 3), h) for m, (k, h) in pair.masks.items()}
    found = pair.predict(pair.patches, masks)
    for m in BOTH:
        assert (masks[m].kept != pair.masks[m].kept).any()
        assert first[m].shape[:2] == pair.masks[m].masked.shape
        np.testing.assert_allclose(found[m], first[m], rtol=1e-4, atol=1e-5)


def test_predictions_follow_the_order_of_masked_tokens(pair):
    first = pair.predict(pair.patches, pair.masks)
    masks = {m: Mask(k, permuted(h, 4)) for m, (k, h) in pair.masks.items()}
    found = pair.predict(pair.patches, masks)
    for m in BOTH:
        wanted = masking.take(first[m], jnp.argsort(pair.masks[m].masked, axis=1))
        here = masking.take(found[m], jnp.argsort(masks[m].masked, axis=1))
        np.testing.assert_allclose(here, wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(found[m] - first[m]).max() > 0.01


def test_the_encoder_sees_kept_tokens_alone(pair):
    first = pair.predict(pair.patches, pair.masks)

    def broken(m, index):
        """The patches with one set of tokens not a number."""
        rows = np.arange(len(index))[:, None]
        return pair.patches | {m: pair.patches[m].at[rows, index].set(jnp.nan)}

    for m in BOTH:
        found = pair.predict(broken(m, pair.masks[m].masked), pair.masks)
        jax.tree.map(np.testing.assert_array_equal, found, first)
        assert np.isnan(
            pair.predict(broken(m, pair.masks[m].kept), pair.masks)[m]
        ).all()


def test_a_missing_modality_is_as_if_it_never_were(pair):
    """Clip 1 has no picture: its junk changes no loss, gradient, nor prediction."""
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, True]),
    }

    def reconstruct(params, patches, rng, train):
        found = pair.model.apply({"params": params}, patches, pair.masks, present)
        hidden = {m: masking.take(x, pair.masks[m].masked) for m, x in patches.items()}
        return {m: (p, hidden[m]) for m, p in found.items()}, None, None, present

    loss = pretrain.make_loss(pair.settings, reconstruct)
    run = quick(
        lambda x: (
            jax.value_and_grad(loss, has_aux=True)(pair.params, x, None),
            reconstruct(pair.params, x, None, True)[0],
        )
    )
    numbers, found = run(pair.patches)
    junk = pair.patches | {"rgb": pair.patches["rgb"].at[1].multiply(-1e3)}
    others, changed = run(junk)
    jax.tree.map(np.testing.assert_array_equal, numbers, others)
    for m in BOTH:
        prediction, hidden = (x[present[m]] for x in found[m])
        np.testing.assert_array_equal(prediction, changed[m][0][present[m]])
        mean = np.mean((np.asarray(prediction) - np.asarray(hidden)) ** 2)
        np.testing.assert_allclose(numbers[0][1][f"loss_{m}"], mean, rtol=1e-5)
    # Without the picture in the program at all, the same predictions of sound.
    one = lambda values: {"spectrogram": values["spectrogram"]}
    alone = pair.predict(one(pair.patches), one(pair.masks))["spectrogram"]
    here = found["spectrogram"][0]
    np.testing.assert_allclose(here[1], alone[1], rtol=1e-4, atol=1e-5)
    meets = pair.settings.model.fusion in ("early", "mid")
    assert (np.abs(here[0] - alone[0]).max() > 0.01) == meets


@pytest.mark.parametrize(
    "decoder, stacks",
    [("shared", {"shared"}), ("separate", set(BOTH)), ("joint", {"joint"})],
)
def test_decoders(decoder, stacks):
    settings, model = small(decoder=decoder)
    params = jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))
    assert set(params["decoder"]) == stacks
    for stack in params["decoder"].values():
        assert set(stack) == {"block_0", "norm"}
        assert stack["block_0"]["mlp"]["in"]["kernel"].shape == (8, 16)
    assert set(params["decoder_embed"]) == {
        *BOTH,
        "mask_token_rgb",
        "mask_token_spectrogram",
    }
    assert params["predict"]["rgb"]["kernel"].shape == (8, 2 * 8 * 8 * 3)


def test_every_decoder_is_tested():
    assert set(autoencoder.DECODERS) == {"shared", "separate", "joint"}


def test_learned_positions_are_used_by_encoder_and_decoder():
    settings, model = small(positions="learned")
    params = some_params(settings, model)
    x, masks = examples(settings)
    predict = quick(lambda params: model.apply({"params": params}, x, masks))
    first = predict(params)
    for part, width in (("embed", 12), ("decoder_embed", 8)):
        for m, n in (("rgb", 8), ("spectrogram", 16)):
            changed = jax.tree.map(lambda x: x, params)
            table = changed[part][f"positions_{m}"]["embedding"]
            assert table.shape == (n, width)
            changed[part][f"positions_{m}"]["embedding"] = table + jnp.sin(
                jnp.arange(float(width))
            )
            assert np.abs(predict(changed)[m] - first[m]).max() > 0.01


def test_first_values():
    """Predictions begin at zero, and no two layers alike."""
    settings, model = small(fusion="separate", decoder="separate")
    params = quick(lambda rng: pretrain.init(settings, model, rng))(jax.random.key(0))
    for layer in params["predict"].values():
        assert (layer["kernel"] == 0).all() and (layer["bias"] == 0).all()
    kernels = [
        params["encoder"][m][f"block_{i}"]["mlp"]["in"]["kernel"]
        for m in BOTH
        for i in range(2)
    ]
    for i, kernel in enumerate(kernels):
        for other in kernels[:i]:
            assert np.abs(kernel - other).mean() > 0.1


def test_bfloat16_keeps_float32_parameters_and_predictions_near():
    settings, model = small("bfloat16")
    params = some_params(settings, model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x, masks = examples(settings)
    found = quick(lambda p: model.apply({"params": p}, x, masks))(params)
    exact = small("float32")[1]
    wanted = quick(lambda p: exact.apply({"params": p}, x, masks))(params)
    for m in BOTH:
        assert found[m].dtype == jnp.bfloat16
        error = np.abs(found[m].astype(jnp.float32) - wanted[m])
        assert 0 < error.mean() < 0.02 * float(wanted[m].std())


def test_drop_path_of_the_config_reaches_the_encoder_in_training_alone():
    settings, model = small(drop_path=0.5)
    params = some_params(settings, model)
    x, masks = examples(settings)

    @quick
    def predict(seed):
        rngs = {"drop_path": jax.random.key(seed)}
        run = lambda train: model.apply(
            {"params": params}, x, masks, None, train, rngs=rngs
        )
        return run(True)["rgb"], run(False)["rgb"]

    (first, still), (second, same) = predict(0), predict(1)
    assert (first != second).any()
    np.testing.assert_array_equal(still, same)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decoder="jont"), "model.decoder.kind is 'jont': did you mean 'joint'"),
        (dict(fusion="midd"), "model.fusion is 'midd': did you mean 'mid'"),
        (dict(variant="XL/16x2"), "model.variant is 'XL/16x2'"),
        (dict(positions="lerned"), "model.positions is 'lerned': .*'learned'"),
    ],
)
def test_a_wrong_name_is_named_with_the_right_one(change, message):
    with pytest.raises(ConfigError, match=message):
        settings, model = small(**change)
        jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))


# Full size, without an array.


@scenic.needed
@pytest.mark.parametrize(
    "table, encoder, count",
    [
        ("audioset_pretrain_L", "separate_encoders_and_concat", 595_849_984),
        ("vggsound_pretrain_L", "separate_encoders", 621_040_384),
    ],
)
def test_the_full_model_has_the_published_parameters(table, encoder, count):
    settings = config("audioset/pretrain", "")
    settings.model.fusion = scenic.ENCODERS[encoder]
    model = autoencoder.build(settings)
    params = jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    places = scenic.places(encoder, "same_decoder", BOTH)
    scenic.assert_shapes(params, places, scenic.large(table)["params"])
