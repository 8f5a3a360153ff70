"""The masked autoencoder against the published numbers, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenic
import scenic_pretrain
from scenic import quick
from synthetic import config

from av_mae import ConfigError, autoencoder, inputs, masking, pretrain
from av_mae.masking import Mask

BOTH = ("rgb", "spectrogram")

# The rest run with the slow tests.
ALWAYS = (
    "separate_encoders_and_concat__same_decoder__plain",
    "separate_encoders__concat_and_decode__inpaint",
)
ALONE = ("vivit_mae__tube_sin3d", "vivit_mae__cls_token", "vit_mae__token_sin2d")
CASES = scenic_pretrain.names()


@scenic.needed
def test_no_stored_case_is_missing():
    assert len(CASES) >= 49 and set(ALWAYS) <= set(CASES)
    assert len(scenic_pretrain.alone_names()) >= 8


@scenic.needed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow)
        for n in CASES or ALWAYS
    ],
)
def test_predictions_losses_and_gradients_are_the_published_ones(name):
    scenic_pretrain.compare(name)


@scenic.needed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ALONE else pytest.mark.slow)
        for n in scenic_pretrain.alone_names() or ALONE
    ],
)
def test_models_of_one_modality_are_the_published_ones(name):
    scenic_pretrain.compare_alone(name)


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
    [
        *[("shared", {"shared"}), ("separate", set(BOTH)), ("joint", {"joint"})],
        ("cross", {"shared"}),
    ],
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
    assert set(autoencoder.DECODERS) == {"shared", "separate", "joint", "cross"}


@pytest.mark.parametrize("decoder", ["cross", "shared"])
def test_cross_decoded_tokens_do_not_see_each_other(decoder):
    """Of half the mask tokens the predictions are the same; a full decoder's not."""
    settings, model = small(decoder=decoder)
    params, (x, masks) = some_params(settings, model), examples(settings)
    half = {m: Mask(kept, masked[:, ::2]) for m, (kept, masked) in masks.items()}
    both = lambda: [model.apply({"params": params}, x, y) for y in (masks, half)]
    whole, some = quick(both)()
    for m in BOTH:
        wanted = whole[m][:, ::2]
        assert some[m].shape == wanted.shape
        difference = np.abs(some[m] - wanted).max()
        assert difference < 1e-4 if decoder == "cross" else difference > 1e-2


def test_cross_decoded_tokens_see_the_kept_ones():
    settings, model = small(decoder="cross")
    params, (x, masks) = some_params(settings, model), examples(settings)
    index = masks["rgb"].kept[0, 0]
    changed = x | {"rgb": x["rgb"].at[0, index].add(1.0)}
    both = lambda: [model.apply({"params": params}, y, masks) for y in (x, changed)]
    first, other = (found["rgb"] for found in quick(both)())
    assert (np.abs(first - other)[0].max(-1) > 1e-4).all()
    np.testing.assert_allclose(other[1:], first[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"decode.kind": "most"}, "objective.decode.kind"),
        ({"decode.kind": "running_cell", "decode.share": 0.4}, "0.25, 0.5, 0.75"),
        (
            {
                **{"decode.kind": "random", "decode.share": 0.5},
                **{"kind": "inpaint", "inpaint_layout": "scenic"},
            },
            "objective.decode.share is 0.5, but objective.inpaint_layout",
        ),
        ({"unmasked": True}, "objective.unmasked is True, but model.decoder.kind"),
    ],
)
def test_decoding_that_makes_no_sense(changes, error):
    settings, _ = small()
    settings.objective.update_from_flattened_dict(changes)
    settings.model.decoder.kind = "cross"
    with pytest.raises(ConfigError, match=error):
        autoencoder.build(settings)


def test_learned_positions_are_used_by_encoder_and_decoder():
    settings, _ = small(positions="learned")
    settings.model.decoder.positions = "learned"
    model = autoencoder.build(settings)
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


def test_positions_of_encoder_and_decoder_are_chosen_apart():
    settings, _ = small(positions="learned")
    places = lambda: {
        part
        for part, layers in abstract(settings).items()
        if any(name.startswith("positions") for name in layers)
    }
    assert places() == {"embed"}
    settings.model.positions, settings.model.decoder.positions = "sinusoidal", "learned"
    assert places() == {"decoder_embed"}


def abstract(settings):
    """The parameters' shapes."""
    model = autoencoder.build(settings)
    return jax.eval_shape(lambda: pretrain.init(settings, model, jax.random.key(0)))


@pytest.mark.parametrize(
    "field, value, gone",
    [
        ("norm", False, {"encoder/norm"}),
        ("decoder.norm", False, {"decoder/norm"}),
        ("decoder.bias", False, {"decoder_embed/rgb/bias"}),
        ("block.key_bias", True, set()),
    ],
)
def test_layers_that_can_be_left_out(field, value, gone):
    settings, _ = small(fusion="shared")
    settings.model.update_from_flattened_dict({field: value})
    names = set(scenic.named(abstract(settings)))
    all_of_them = {
        "encoder/norm": "encoder/shared/norm/scale",
        "decoder/norm": "decoder/shared/norm/scale",
        "decoder_embed/rgb/bias": "decoder_embed/rgb/bias",
    }
    for key, name in all_of_them.items():
        assert (name in names) == (key not in gone)


# Inpainting: each modality from the other.


class Inpainting(Pair):
    """As `Pair`, with the objective `inpaint` in one of its layouts."""

    def __init__(self, layout, k=None):
        self.settings, _ = small(fusion="separate")
        self.settings.mask.spectrogram.ratio = 0.75
        objective = self.settings.objective
        objective.kind, objective.inpaint_layout = "inpaint", layout
        self.model = autoencoder.build(self.settings)
        self.patches, self.masks = examples(self.settings)
        if k is not None:  # the first k tokens of each are kept
            self.masks = {m: first(x.shape[1], k) for m, x in self.patches.items()}
        self.params = some_params(self.settings, self.model)
        self.predict = quick(
            lambda x, masks: self.model.apply({"params": self.params}, x, masks)
        )


def first(n, k, b=3):
    index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    return Mask(index[:, :k], index[:, k:])


@pytest.fixture(scope="module")
def inpainting():
    return Inpainting("own")


def test_a_modality_is_inpainted_from_the_other_alone(inpainting):
    found = inpainting.predict(inpainting.patches, inpainting.masks)
    for m, other in (BOTH, BOTH[::-1]):
        assert found[m].shape[:2] == inpainting.masks[m].masked.shape
        patches = inpainting.patches | {m: -inpainting.patches[m]}
        changed = inpainting.predict(patches, inpainting.masks)
        np.testing.assert_array_equal(changed[m], found[m])
        assert np.abs(changed[other] - found[other]).max() > 0.01


def test_the_order_of_tokens_does_not_matter_to_inpainting(inpainting):
    found = inpainting.predict(inpainting.patches, inpainting.masks)
    masks = {
        m: Mask(permuted(k, 3), h[:, ::-1]) for m, (k, h) in inpainting.masks.items()
    }
    again = inpainting.predict(inpainting.patches, masks)
    for m in BOTH:
        np.testing.assert_allclose(again[m][:, ::-1], found[m], rtol=1e-4, atol=1e-5)


def test_the_layouts_agree_where_the_first_tokens_are_kept():
    """Then the slots that Scenic deals out are the tokens' own places."""
    own, slots = Inpainting("own", k=2), Inpainting("scenic", k=2)
    assert own.model.objective != slots.model.objective
    found = own.predict(own.patches, own.masks)
    wanted = slots.predict(own.patches, own.masks)
    for m in BOTH:
        np.testing.assert_allclose(found[m], wanted[m], rtol=1e-4, atol=1e-5)


def test_scenic_predicts_the_slots_after_the_other_modalitys_tokens():
    masks = {"rgb": first(8, 3), "spectrogram": first(16, 5)}
    objective = autoencoder.Objective("inpaint", "scenic")
    index = objective.predicted(masks)
    np.testing.assert_array_equal(index["rgb"][0], np.arange(5, 8))
    np.testing.assert_array_equal(index["spectrogram"][0], np.arange(3, 16))
    with pytest.raises(ConfigError, match="leave none of the 8 slots of rgb"):
        objective.predicted(masks | {"spectrogram": first(16, 8)})


def test_inpainting_needs_clips_with_both():
    masks = {"rgb": first(8, 3), "spectrogram": first(16, 5)}
    present = {
        "rgb": jnp.array([True, False, True]),
        "spectrogram": jnp.array([True, True, False]),
    }
    for kind, wanted in (
        ("reconstruct", {"rgb": [1, 0, 1], "spectrogram": [1, 1, 0]}),
        ("inpaint", {"rgb": [1, 0, 0], "spectrogram": [1, 0, 0]}),
    ):
        found = autoencoder.Objective(kind).present(masks, present)
        for m in BOTH:
            np.testing.assert_array_equal(found[m], wanted[m])


def test_kept_tokens_are_predicted_too_where_the_objective_says_so():
    settings, model = small(fusion="shared")
    params = some_params(settings, model)
    x, masks = examples(settings)
    settings.objective.unmasked = True
    more = autoencoder.build(settings)
    run = quick(
        lambda: [module.apply({"params": params}, x, masks) for module in (model, more)]
    )
    some, every = run()
    index = more.objective.predicted(masks)
    for m in BOTH:
        k = masks[m].kept.shape[1]
        np.testing.assert_array_equal(index[m][:, :k], masks[m].kept)
        np.testing.assert_array_equal(index[m][:, k:], masks[m].masked)
        np.testing.assert_allclose(every[m][:, k:], some[m], rtol=1e-5, atol=1e-6)
        assert every[m].shape[1] == x[m].shape[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(objective__kind="impaint"), "objective.kind .* did you mean 'inpaint'"),
        (dict(objective__inpaint_layout="mine"), "objective.inpaint_layout is 'mine'"),
        (dict(modalities=("rgb",)), "objective.kind is 'inpaint', which predicts each"),
        (dict(objective__unmasked=True), "objective.unmasked is True"),
        (dict(objective__target__rgb="gray"), "objective.target.* mean 'grey'"),
        (dict(model__decoder__positions="fixed"), "model.decoder.positions is 'fixed'"),
        (dict(model__positions="sinusoidal_3d"), "needs frames, but there is sound"),
        (dict(model__positions="learned_space_time"), "needs frames"),
        (
            dict(model__positions="sinusoidal_2d", model__width=14),
            "needs a width that 4 divides, but it is 14",
        ),
        (dict(model__block__gelu="relu"), "model.block.gelu is 'relu'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(change, message):
    settings, _ = small(fusion="separate")
    settings.objective.kind = "inpaint"
    settings.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in change.items()}
    )
    with pytest.raises(ConfigError, match=message):
        abstract(settings)


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
