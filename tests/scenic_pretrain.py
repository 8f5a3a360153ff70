"""Scenic's stored pretraining cases: our config of each, and one comparison for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import scenic

from av_mae import (
    autoencoder,
    losses,
    masking,
    optim,
    parallel,
    pretrain,
    update,
)
from av_mae.masking import Mask

FAMILY = "Scenic pretraining"


def case_of(name: str) -> dict:
    """What is stored of a case beside its arrays."""
    return scenic.meta("pretrain/meta.json")["cases"][f"cases/{name}"]


def settings_of(name: str):
    """Our config of a case; its clips have less sound than the config says."""
    theirs = case_of(name)["config"]
    settings = scenic.settings(
        "audioset/pretrain",
        sorted(theirs["modalities"]),
        fusion=scenic.ENCODERS[theirs["encoder_strategy"]],
        fusion_layers=theirs["fusion_layers"],
        positions=positions(theirs["positional_embedding"]),
        modality_embeddings=theirs["use_modality_tokens"],
        norm=theirs["normalise_encoder_output"],
    )
    ph, _, pt = theirs["patches"]
    settings.model.variant, settings.data.size = f"Ti/{ph}x{pt}", 2 * ph
    settings.model.decoder.update(
        kind=scenic.DECODERS[theirs["decoder_strategy"]],
        positions=positions(theirs["positional_embedding_decoder"]),
        bias="no_decoder_projection_bias" not in name,
        norm=theirs["normalise_encoder_output"],
    )
    loss = theirs["masked_feature_loss"]
    settings.objective.update(
        kind="inpaint" if theirs["use_inpainting"] else "reconstruct",
        inpaint_layout="scenic",
        unmasked="loss_unmasked_tokens" in loss,
        l2=0.01 if "l2_decay" in name else 0.0,
    )
    for m, kind in targets(loss).items():
        settings.objective.target[m] = kind
        settings.objective.weights[m] = loss["modality_weight"][m]
        settings.mask[m].ratio = loss["token_mask_probability_dict"][m]
    return settings


def positions(name: str) -> str:
    return {"sinusoidal_1d": "sinusoidal", "learned_1d": "learned"}.get(name, name)


def targets(loss: dict) -> dict[str, str]:
    """Our targets for Scenic's settings; only some of them reach the sound."""
    if loss["standardise_per_patch"]:
        return dict(rgb="standardised", spectrogram="standardised")
    kinds = {
        "standardise_per_patch_channels": "standardised_channels",
        "select_central_frame": "central_frame",
        "reconstruct_grayscale": "grey",
    }
    rgb = next((kind for key, kind in kinds.items() if loss.get(key)), "raw")
    return dict(rgb=rgb, spectrogram="raw")


def places_of(name: str, modalities) -> dict[str, str]:
    theirs = case_of(name)["config"]
    return scenic.places(
        theirs["encoder_strategy"], theirs["decoder_strategy"], modalities
    )


def masks_of(stored: dict, modalities) -> dict[str, Mask]:
    return {
        m: Mask(
            jnp.asarray(stored[f"mask/{m}/unmasked_indices"]),
            jnp.asarray(stored[f"mask/{m}/masked_indices"]),
        )
        for m in modalities
    }


def model_of(name: str):
    """(config, model, params, patches, masks, {Scenic's place of ours}) of a case."""
    settings, case = settings_of(name), case_of(name)
    stored = scenic.arrays(f"pretrain/cases/{name}.npz")
    clips, prefix = scenic.arrays("pretrain/inputs.npz"), case["inputs_prefix"]
    modalities = settings.modalities
    x = scenic.patches({m: clips[prefix + m] for m in modalities}, settings)
    masks = masks_of(stored, modalities)
    model, places = autoencoder.build(settings), places_of(name, modalities)
    if settings.model.decoder.positions == "learned":  # a vector for each stored token
        grids = {m: (clip.shape[1],) for m, clip in x.items()}
        model = model.clone(decoder_embed=model.decoder_embed.clone(grids=grids))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, masks)["params"]
    params = scenic.read(abstract, pool_of(case), places)
    assert sum(x.size for x in jax.tree.leaves(params)) == case["n_params"]
    return settings, model, params, x, masks, places


def pool_of(case: dict) -> dict[str, np.ndarray]:
    return scenic.arrays(f"pretrain/{case['params_file']}")


def compare(name: str):
    """Predictions, losses, encoded tokens and gradients of a case, to their bounds."""
    stored = scenic.arrays(f"pretrain/cases/{name}.npz")
    settings, model, params, x, masks, places = model_of(name)
    index = model.objective.predicted(masks)
    aims = dict(index)  # the tokens that each prediction is compared with
    for m in index:
        # Shuffled are the sequence and its mask, not the targets: a prediction is
        # held against the patch of another place. No published model was trained so.
        if f"shuffle_ids/{m}" in stored:
            aims[m] = jnp.take_along_axis(stored[f"shuffle_ids/{m}"], index[m], 1)
    whole_f = {m: patches.shape[-1] for m, patches in x.items()}
    if "no_dim_norm" in name:  # the same as weights times the values of a patch
        for m, f in whole_f.items():
            settings.objective.weights[m] *= f
    present = None
    if "batch_mask" in stored:
        present = dict.fromkeys(x, jnp.asarray(stored["batch_mask"]) > 0)

    def reconstruct(params, batch, rng, train):
        predictions = model.apply({"params": params}, x, masks, None, train)
        pairs = {
            m: (p, pretrain.target(settings, m, masking.take(x[m], aims[m])))
            for m, p in predictions.items()
        }
        return pairs, masks, x, present

    loss = pretrain.make_loss(settings, reconstruct)

    def everything(params):
        def run(params):
            total, each = loss(params, None, 0)
            return total, (each, reconstruct(params, None, 0, False)[0])

        (total, (each, pairs)), grads = jax.value_and_grad(run, has_aux=True)(params)
        encoded = {}
        if any(key.startswith("eval_encoded") for key in stored):
            encoded = model.apply({"params": params}, x, method=encode)
        return total, each, pairs, encoded, grads

    wanted_grads = {
        k.removeprefix("grad/"): v for k, v in stored.items() if k[:5] == "grad/"
    }
    # The gradient of a key bias is rounding alone, in theirs and in ours, and that of a
    # program compiled in haste (which sums one by one) can be just beyond the bound:
    # then the optimised program, which training runs, has to keep it.
    for compiled in (scenic.quick, jax.jit):
        with jax.default_matmul_precision("highest"):
            total, each, pairs, encoded, grads = compiled(everything)(params)
        gradients = gradient_error(scenic.write(grads, places), wanted_grads)
        if gradients <= 1e-4:
            break

    outputs = []
    for m, (prediction, _) in pairs.items():
        wanted = masking.take(jnp.asarray(stored[f"pred/{m}"]), aims[m])
        outputs += [worst(prediction, wanted)]
        if encoded:
            outputs += [worst(encoded[m], stored[f"eval_encoded/{m}"])]
        if not settings.objective.unmasked:
            hidden = np.zeros(stored[f"token_mask/{m}"].shape)
            np.put_along_axis(hidden, np.asarray(aims[m]), 1, axis=1)
            np.testing.assert_array_equal(hidden, stored[f"token_mask/{m}"])
    divided = "no_dim_norm" not in name
    errors = [relative(total, stored["loss"])] + [
        relative(
            each[f"loss_{m}"] * (1 if divided else whole_f[m]),
            stored[f"loss_per_modality/{m}"],
        )
        for m in x
    ]
    parity.record(
        FAMILY, name, outputs=max(outputs), loss=max(errors), gradients=gradients
    )
    assert max(outputs) <= 1e-5 and max(errors) <= 1e-5 and gradients <= 1e-4


def encode(model, patches):
    """The encoder's output over all tokens."""
    return model.encoder(model.embed(patches))


def worst(found, wanted) -> float:
    """The largest difference, each as a part of what was wanted where that is > 1."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float((np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)).max())


def relative(found, wanted) -> float:
    return abs(float(found) - float(wanted)) / abs(float(wanted))


def gradient_error(found: dict, wanted: dict) -> float:
    """The worst ‖g − g_ref‖ / max(‖g_ref‖, 1e-4 · ‖all gradients of the case‖)."""
    norm = lambda x: float(np.linalg.norm(np.ravel(x)))
    everything = norm([norm(x) for x in wanted.values()])
    assert len(wanted) >= 6 and everything > 0
    errors = {
        name: norm(np.reshape(found[name], np.shape(g)) - g)
        / max(norm(g), 1e-4 * everything)
        for name, g in wanted.items()
    }
    return max(errors.values())


@functools.cache
def names() -> list[str]:
    """Names of the case files that are present."""
    return scenic.cases("pretrain", "*.npz")


# Models of one modality: Scenic's vivit.py and vit.py.

ALONE = {
    "embed/rgb": "embedding",
    "embed/cls_rgb": "cls",
    "embed/positions_rgb/embedding": "posembed_input/pos_embedding",
    "embed/positions_rgb/space": "posembed_input/pos_embedding_space",
    "embed/positions_rgb/time": "posembed_input/pos_embedding_time",
    "encoder/shared": "Transformer/encoderblock_{}",
    "decoder_embed/rgb": "decoder_projection",
    "decoder_embed/mask_token_rgb": "mask_token",
    "decoder_embed/positions_rgb/embedding": "posembed_decoder/pos_embedding",
    "decoder_embed/positions_rgb/space": "posembed_decoder/pos_embedding_space",
    "decoder_embed/positions_rgb/time": "posembed_decoder/pos_embedding_time",
    "decoder/shared": "Decoder/encoderblock_{}",
    "predict/rgb": "output_projection",
}


def alone_names() -> list[str]:
    """Names of the stored autoencoders of one modality."""
    if not scenic.SCENIC.is_dir():
        return []
    cases = scenic.meta("single_modality_models/meta.json")["cases"]
    return [name for name in cases if "_mae__" in name]


def alone_settings(name: str):
    """Our config of an autoencoder of video, or of pictures as clips of one frame."""
    case = scenic.meta("single_modality_models/meta.json")["cases"][name]
    theirs, loss = case["model"], case["masked_feature_loss"]
    assert loss["standardise_per_patch"]
    settings = scenic.settings(
        "audioset/pretrain",
        ("rgb",),
        **{"fusion": "shared", "width": 24, "depth": 2, "mlp": 48},
        positions=positions(theirs["positional_embedding"]),
        cls_token=theirs["classifier"] == "token",
    )
    if len(theirs["patches"]["size"]) == 2:
        settings.model.variant = "Ti/8x1"
        settings.data.num_frames, settings.data.size = 1, 24
    decoder = positions(theirs["positional_embedding_decoder"])
    settings.model.decoder.update(width=12, depth=1, mlp=24, positions=decoder)
    settings.mask.rgb.kind = loss.get("masking_strategy", "random")
    settings.mask.rgb.ratio = loss["token_mask_probability"]
    settings.objective.target.rgb = "standardised"
    settings.objective.weights.rgb = 1.0
    return settings


def compare_alone(name: str):
    """Predictions, loss and encoded tokens of a model of one modality, to 1e-5."""
    everything = scenic.arrays("single_modality_models/fixtures.npz")
    stored = {
        key.removeprefix(f"{name}/"): value
        for key, value in everything.items()
        if key.startswith(f"{name}/")
    }
    settings = alone_settings(name)
    model = autoencoder.build(settings)
    clip = everything["input/video"]
    if settings.data.num_frames == 1:
        clip = everything["input/image"][:, None]
    x = scenic.patches({"rgb": clip}, settings)
    kept, hidden = (
        jnp.asarray(stored[f"{key}_indices"]) for key in ("unmasked", "masked")
    )
    masks = {"rgb": Mask(kept, hidden)}
    counts = pretrain.draw_masks(settings, jax.random.key(0), 2)["rgb"]
    assert [i.shape for i in counts] == [kept.shape, hidden.shape]
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, masks)["params"]
    pool = scenic.arrays(f"single_modality_models/params_{name.split('_')[0]}.npz")
    override = "params_override/"
    pool |= {k.removeprefix(override): v for k, v in stored.items() if override in k}
    params = scenic.read(abstract, pool, ALONE)

    def run(params):
        found = model.apply({"params": params}, x, masks)["rgb"]
        target = pretrain.target(settings, "rgb", masking.take(x["rgb"], hidden))
        encoded = model.apply({"params": params}, x, method=encode)["rgb"]
        return found, losses.masked_mse(found, target), encoded

    with jax.default_matmul_precision("highest"):
        found, loss, encoded = scenic.quick(run)(params)
    wanted = masking.take(jnp.asarray(stored["pred"]), hidden)
    outputs = max(worst(found, wanted), worst(encoded, stored["eval_encoded"]))
    error = relative(loss, stored["loss"])
    parity.record("Scenic single modality", name, outputs=outputs, loss=error)
    assert outputs <= 1e-5 and error <= 1e-5


# Training, step by step.

TRAINED = "separate_encoders_and_concat__same_decoder__plain"


class Training:
    """Our update, from the stored start, on stored clips and masks.

    peak, warmup, total: the schedule in steps; call it with clips {m: array} and masks
    {m: Mask} for the numbers of one update.
    """

    def __init__(self, peak: float, warmup: float, total: int):
        self.settings, model, params, _, _, self.places = model_of(TRAINED)
        assert self.settings.optimizer.name == "adam"
        schedule = optim.warmup_cosine(peak, 0.0, warmup, total)
        self.tx = optim.make(self.settings.optimizer, schedule, params)

        def reconstruct(params, batch, rng, train):
            predictions = model.apply({"params": params}, *batch, None, train)
            x, masks = batch
            hidden = {m: masking.take(x[m], masks[m].masked) for m in x}
            pairs = {
                m: (p, pretrain.target(self.settings, m, hidden[m]))
                for m, p in predictions.items()
            }
            return pairs, masks, x, None

        loss = pretrain.make_loss(self.settings, reconstruct)
        mesh = parallel.mesh(1, 1)
        make, abstract = update.initial(lambda rng: params, self.tx, 0, mesh)
        self.state = make()
        self.step = update.make(loss, self.tx, 1, abstract, mesh)

    def __call__(self, clips: dict, masks: dict) -> dict[str, float]:
        batch = scenic.patches(clips, self.settings), masks
        with jax.default_matmul_precision("highest"):
            self.state, numbers = self.step(self.state, batch)
        return jax.device_get(numbers)

    def params(self) -> dict[str, np.ndarray]:
        """The parameters by Scenic's names."""
        return scenic.write(jax.device_get(self.state["params"]), self.places)


def compare_steps():
    """Three updates of Scenic's trainer: every number on the way, parameters after."""
    stored = scenic.arrays("train_steps/pretrain_adam_3steps.npz")
    training, errors = Training(1e-2, 2.0, 10), []
    for i in range(3):
        here = {
            k.removeprefix(f"step{i}/"): v
            for k, v in stored.items()
            if f"step{i}/" in k
        }
        clips = {m: here[f"inputs/{m}"] for m in ("rgb", "spectrogram")}
        numbers = training(clips, masks_of(here, clips))
        wanted = {
            "loss": here["metrics/total_loss"][0],
            "gradient_norm": here["metrics/max_grad_norm_preclip"][0],
        }
        for m, f in FEATURES.items():
            total, count = here[f"metrics/mean_squared_error_{m}"]
            wanted[f"loss_{m}"] = total / count / f
        errors += [relative(numbers[name], value) for name, value in wanted.items()]
        np.testing.assert_allclose(numbers["learning_rate"], here["lr"], rtol=1e-6)
    after = parameter_error(training.params(), under("step2/params_after/", stored))
    parity.record("Scenic training", "3 steps", outputs=after, loss=max(errors))
    assert max(errors) <= 1e-5 and after <= 1e-5


def under(prefix: str, stored: dict) -> dict:
    """The arrays whose names begin so, without that."""
    return {k.removeprefix(prefix): v for k, v in stored.items() if prefix in k}


# Values in a patch of the stored clips.
FEATURES = {"rgb": 2 * 8 * 8 * 3, "spectrogram": 8 * 8}


def published_curve() -> dict[str, np.ndarray]:
    """The stored loss of each of 200 steps: {m: [200]} and their total."""
    stored = scenic.arrays("train_steps/pretrain_adam_200steps.npz")
    curve = {}
    for m, f in FEATURES.items():
        total, count = stored[f"metric/mean_squared_error_{m}"].T
        curve[m] = total / count / f
    return curve | {"total": 0.5 * sum(curve.values())}


def our_curve() -> tuple[dict[str, np.ndarray], Training]:
    """The same of our training: (curve, the training at its end)."""
    stored = scenic.arrays("train_steps/pretrain_adam_200steps.npz")
    training, rows = Training(3e-3, 20.0, 200), []
    for i, order in enumerate(stored["order"]):
        masks = {
            m: Mask(
                jnp.asarray(stored[f"mask/{m}/kept"][i]),
                jnp.asarray(stored[f"mask/{m}/masked"][i]),
            )
            for m in ("rgb", "spectrogram")
        }
        rows.append(training({m: stored[f"clips/{m}"][order] for m in masks}, masks))
        np.testing.assert_allclose(
            rows[-1]["learning_rate"], stored["lr"][i], rtol=1e-5, atol=1e-9
        )
    names = {"loss_rgb": "rgb", "loss_spectrogram": "spectrogram", "loss": "total"}
    return {b: np.array([row[a] for row in rows]) for a, b in names.items()}, training


def compare_curve():
    """200 updates: our loss is within 1 % of the stored one at every step."""
    published, (ours, training) = published_curve(), our_curve()
    error = max(np.abs(ours[k] / published[k] - 1).max() for k in published)
    stored = scenic.arrays("train_steps/pretrain_adam_200steps.npz")
    after = parameter_error(training.params(), under("params_after_200/", stored))
    parity.record("Scenic training", "200 steps", outputs=after, loss=error)
    assert len(ours["total"]) == 200 and error < 0.01
    # Much closer in fact: the curves are one.
    assert error < 1e-3 and after < 1e-3


def parameter_error(found: dict, wanted: dict) -> float:
    """The worst ‖p − p_ref‖ / ‖p_ref‖, without the biases of keys.

    The gradient of those is rounding alone, which Adam blows up to whole steps; no
    output depends on them.
    """
    norm = lambda x: float(np.linalg.norm(np.ravel(x)))
    return max(
        norm(np.reshape(found[name], p.shape) - p) / norm(p)
        for name, p in wanted.items()
        if not name.endswith("key/bias")
    )
