"""Scenic's stored finetuning cases: our config and parameter names for each of them."""

import functools

import jax
import jax.numpy as jnp
import scenic

from av_mae import classifier, finetune

# Scenic's names of the pools. The tokens that it takes for '0' and 'onetoken' are
# counted as if there were CLS tokens: see `shifted`.
POOLS = {"gap": "mean", "gmp": "max", "gsp": "sum", "token": "token"}
POOLS |= {"0": "token", "onetoken": "token"}
HEAD = "ProjectionHeadAndClassifier_0"


def modalities_of(case) -> tuple[str, ...]:
    return tuple(sorted(case["inputs"]))  # rgb before spectrogram


def places(case) -> dict[str, str]:
    """Our names of an MBT case's layers to Scenic's."""
    order = case["model"]["modality_fusion"]
    found = scenic.classifier_places(order)
    found["encoder/shared"] = "Transformer/encoderblock_{}"
    found["representation"] = f"{HEAD}/pre_logits"
    for m in order:
        plain = m == "rgb" or len(order) == 1
        found[f"embed/cls_{m}"] = "cls" if plain else f"cls{m}"
        found[f"embed/modality_{m}"] = f"Encoder_modality_token_{m}"
    return found


def pool_of(case) -> dict:
    """The stored parameters of an MBT case."""
    model = case["model"]
    files = ["params_token" if model["classifier"] == "token" else "params_pool"]
    if model["n_bottlenecks"] == 1:
        files.append("params_n_bottlenecks_1_diff")
    if model["representation_size"]:
        files.append("params_representation_size_diff")
    found = {}
    for name in files:
        found |= scenic.arrays(f"finetune/{name}.npz")
    return found


def settings_of(case):
    """Our config of an MBT case."""
    model = case["model"]
    token = model["classifier"] == "token"
    settings = scenic.settings(
        "audioset/finetune",
        modalities_of(case),
        fusion="bottleneck" if model["use_bottleneck"] else "cross",
        fusion_layer=model["fusion_layer"],
        bottlenecks=model["n_bottlenecks"] + token,
        bottlenecks_at_test=model["test_with_bottlenecks"],
        share_encoder=model["share_encoder"],
        modality_embeddings=bool(model.get("use_modality_tokens")),
        cls_token=token,
        positions="sinusoidal_cls" if token else "sinusoidal",
        pool=POOLS[model["classifier"]],
        representation=model["representation_size"] or 0,
        drop_path=0.0,
    )
    settings.data.audio_seconds = 0.4
    kind = "multilabel" if "multilabel" in case["model_name"] else "multiclass"
    settings.objective.kind = {"multilabel": "sigmoid", "multiclass": "softmax"}[kind]
    return settings


def shifted(encoded, case):
    """The tokens of each modality, those before the one that '0' takes left out.

    In the sequence of both it skips one place for a CLS token that is not there.
    """
    if case["model"]["classifier"] not in ("0", "onetoken"):
        return encoded
    return {m: x[:, i:] for i, (m, x) in enumerate(encoded.items())}


_ENCODERS: dict = {}


def encoder(settings, model):
    """The compiled (params, patches, train) → tokens, once for many heads."""
    fields = settings.model.to_dict()
    for name in ("pool", "representation"):
        fields.pop(name)
    key = (str(fields), settings.modalities)
    if key not in _ENCODERS:

        def encode(params, patches, train):
            return model.apply(
                {"params": params}, patches, None, train, method="encode"
            )

        _ENCODERS[key] = scenic.quick(encode, static_argnums=2)
    return _ENCODERS[key]


def outputs(settings, case, params, patches, train):
    """(tokens, features, logits) of each modality, with Scenic's precision."""
    model = classifier.build(settings, classes=11)
    apply = functools.partial(model.apply, {"params": params})
    # Only what is left out at test makes another program of training.
    train = train and not settings.model.bottlenecks_at_test
    with jax.default_matmul_precision("highest"):
        encoded = encoder(settings, model)(params, patches, train)
        features = apply(shifted(encoded, case), method="features")
        return encoded, features, apply(features, method="classify")


@functools.cache
def abstract_of(key: str):
    settings = _SETTINGS[key]
    model = classifier.build(settings, classes=11)
    return jax.eval_shape(lambda: finetune.init(settings, model, jax.random.key(0)))


_SETTINGS: dict = {}


def params_of(settings, case):
    """The stored parameters as ours."""
    key = settings.to_json()
    _SETTINGS[key] = settings
    return scenic.read(abstract_of(key), pool_of(case), places(case))


def inputs_of(settings):
    clips = scenic.arrays("finetune/inputs.npz")
    clips = {m: jnp.asarray(clips[f"input/{m}"]) for m in settings.modalities}
    return scenic.patches(clips, settings)
