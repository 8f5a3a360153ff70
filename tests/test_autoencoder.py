"""The masked autoencoder against the published numbers, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenic
from synthetic import config

from av_mae import ConfigError, autoencoder, inputs, losses, masking, pretrain
from av_mae.masking import Mask

BOTH = ("rgb", "spectrogram")

# The rest run with the slow tests; these two hold token order, positions and masks.
ALWAYS = (
    "separate_encoders_and_concat__same_decoder__plain",
    "separate_encoders__same_decoder__plain",
)
# Compiling takes nearly all of the time; the numbers are the same to rounding.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
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
