"""Writes a checkpoint of ours in a layout that others read.

    python -m av_mae.export CHECKPOINT --to safetensors --out DIR
    python -m av_mae.export CHECKPOINT --to hf-videomae --out DIR
    python -m av_mae.export CHECKPOINT --to stablehlo --out DIR --licence CC-BY-4.0
    python -m av_mae.export CHECKPOINT --to savedmodel --out DIR

CHECKPOINT is a workdir, its checkpoints folder or one step. `safetensors` is any model
as model.safetensors (our names) and config.json; `init_from.checkpoint_path` and
`av_mae.convert` take the folder. `hf-videomae` is a model of rgb alone as Hugging
Face's VideoMAEForPreTraining or VideoMAEForVideoClassification open it, where it is one
that they can express: fixed positions, no CLS token, and either mean pooling with the
head's norm or the final norm with the first token. `stablehlo` and `savedmodel` are
what `safetensors` is and a program beside it, for any number of clips, that runs
without this package (portable.py says what goes in and comes out). Each has labels.txt
and a model card, README.md, filled in from the run.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from av_mae import (
    CheckpointError,
    UserError,
    card,
    checkpoints,
    commandline,
    importers,
    optim,
    portable,
)
from av_mae import run as runs
from av_mae.importers import exported
from av_mae.transformer import size_of

Arrays = dict[str, np.ndarray]

# Hugging Face builds these norms with torch's own epsilon, whatever its config says.
TORCH_EPS = 1e-5
_ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}


def export(
    checkpoint: Path | str,
    to: str,
    out: Path | str,
    weights: str = "params",
    licence: str = "",
) -> list[str]:
    """Writes the folder `out`; returns sentences on what is not the same there.

    checkpoint: ours, or what `importers.read` reads; to: a name of `LAYOUTS`; weights:
    `params`, or `ema` for their moving average; licence: of the weights, for the card.
    Raises CheckpointError if the checkpoint cannot be read or expressed in the layout.
    """
    if importers.find(checkpoint):
        if weights != "params":
            raise CheckpointError(f"{checkpoint} has no weights called {weights}.")
        found = importers.read(checkpoint)
        params, config = found.params, found.config
        meta = found.meta | {"labels": found.labels}
    else:
        params, saved, meta = checkpoints.load(checkpoint, weights)
        config = runs.config_of(saved)
    flat = optim.named(params)
    flat = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    try:
        files, arrays, notes = LAYOUTS[to](config, flat, meta)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    # Transformers asks for this word, and sets no store by whose format it is.
    save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    program = {}
    if to in portable.WRITERS:
        program = portable.shapes(config)
        portable.WRITERS[to](config, params, out)
    if config.trainer == "finetune" and meta.get("labels"):
        lines = card.label_lines(meta["labels"])
        (out / "labels.txt").write_text(lines, encoding="utf-8")
    count = sum(x.size for x in flat.values())
    results = card.results_of(checkpoint, weights)
    text = card.text(config, meta, results, count, to, program, licence)
    (out / "README.md").write_text(text, encoding="utf-8")
    return notes


def to_safetensors(config, flat: Arrays, meta: Mapping[str, Any]):
    """(JSON files by name, arrays by name, notes) of our own layout."""
    settings = {
        "model_type": exported.TYPE,
        "format": exported.FORMAT,
        "config": json.loads(runs.config_json(config)),
        "meta": dict(meta),
    }
    return {"config.json": settings}, flat, []


def to_huggingface(config, flat: Arrays, meta: Mapping[str, Any]):
    """(JSON files by name, arrays by name, notes) of Hugging Face's VideoMAE."""
    encoder = _stack(flat, "encoder")
    finetuned = config.trainer == "finetune"
    _check(config, flat, finetuned)
    notes: list[str] = []
    settings = _settings(config, flat, meta, finetuned)
    arrays = {
        "videomae.embeddings.patch_embeddings.projection.weight": _conv(config, flat),
        "videomae.embeddings.patch_embeddings.projection.bias": flat["embed/rgb/bias"],
    }
    arrays |= _blocks(flat, encoder, "videomae.encoder.layer")
    arrays |= _norm(flat, _last_norm(flat, encoder), "videomae.layernorm")
    if finetuned:
        arrays |= _norm(flat, "head_norm", "fc_norm")
        arrays |= _dense(flat, "head", "classifier")
        eps = config.model.head_eps if config.model.head_norm else TORCH_EPS
        where = "the head's norm"
    else:
        decoder = _stack(flat, "decoder")
        arrays |= _blocks(flat, decoder, "decoder.decoder_layers")
        arrays |= _norm(flat, f"{decoder}/norm", "decoder.norm")
        arrays |= _dense(flat, "predict/rgb", "decoder.head")
        arrays["mask_token"] = flat["decoder_embed/mask_token_rgb"]
        arrays["encoder_to_decoder.weight"] = flat["decoder_embed/rgb/kernel"].T
        eps, where = config.model.decoder.eps, "the decoder's last norm"
    if eps != TORCH_EPS:
        notes.append(
            f"Hugging Face's {where} has epsilon {TORCH_EPS:g}, ours {eps:g}: outputs "
            "differ by about 1e-5."
        )
    if any(name.endswith("scale_1") for name in flat):
        notes.append("Layer scale is multiplied into the kernels, which is exact.")
    if any(len(x) == 3 for name, x in flat.items() if name.endswith("qkv/bias")):
        notes.append("Biases of keys are left out, which changes nothing.")
    files = {"config.json": settings, "preprocessor_config.json": _processor(config)}
    return files, arrays, notes


LAYOUTS = {
    "safetensors": to_safetensors,
    "hf-videomae": to_huggingface,
    **dict.fromkeys(portable.WRITERS, to_safetensors),
}


def _stack(flat: Arrays, coder: str) -> str:
    """The one stack of blocks that pictures go through."""
    stacks = {name.split("/block_")[0] for name in flat if "/block_" in name}
    stacks = sorted(stack for stack in stacks if stack.startswith(f"{coder}/"))
    if len(stacks) != 1:
        raise CheckpointError(
            f"its {coder} has {len(stacks)} stacks, Hugging Face's VideoMAE has one: "
            "export it --to safetensors."
        )
    return stacks[0]


def _last_norm(flat: Arrays, encoder: str) -> str:
    """The norm after the encoder; that of bottleneck fusion lies outside the stack."""
    return "encoder/norm" if "encoder/norm/scale" in flat else f"{encoder}/norm"


def _has_last_norm(flat: Arrays) -> bool:
    return f"{_last_norm(flat, _stack(flat, 'encoder'))}/scale" in flat


def _check(config, flat: Arrays, finetuned: bool):
    """CheckpointError for the first thing that Hugging Face's VideoMAE cannot say."""
    model = config.model
    wrong = {
        f"modalities {tuple(config.modalities)}": tuple(config.modalities) != ("rgb",),
        f"model.positions {model.positions!r}": model.positions != "sinusoidal",
        "a CLS token": model.cls_token,
        "modality embeddings": model.modality_embeddings,
    }
    if finetuned:
        pools = {"mean": (True, False), "token": (False, True)}
        norms = (model.head_norm, _has_last_norm(flat))
        pool = f"model.pool {model.pool!r}, head_norm {norms[0]} and norm {norms[1]}"
        wrong |= {
            "several heads": "head/kernel" not in flat,
            "a representation before the head": model.representation != 0,
            pool: pools.get(model.pool) != norms,
        }
    else:
        decoder = model.decoder
        wrong |= {
            "a decoder with learned positions": decoder.positions != "sinusoidal",
            "a bias before the decoder (model.decoder.bias)": decoder.bias,
        }
    for what, is_so in wrong.items():
        if is_so:
            raise CheckpointError(
                f"it has {what}, which Hugging Face's VideoMAE cannot express: export "
                "it --to safetensors."
            )


def _settings(config, flat: Arrays, meta: Mapping[str, Any], finetuned: bool) -> dict:
    """Hugging Face's config.json."""
    model, size = config.model, size_of(config.model)
    settings = {
        "model_type": "videomae",
        "architectures": [
            "VideoMAEForVideoClassification" if finetuned else "VideoMAEForPreTraining"
        ],
        "image_size": config.data.size,
        "num_frames": config.data.num_frames,
        "num_channels": 3,
        "patch_size": size.side,
        "tubelet_size": size.tubelet,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "hidden_act": _ACTIVATIONS[model.block.gelu],
        "layer_norm_eps": model.block.eps,
        "use_mean_pooling": not _has_last_norm(flat),
        # Releases before 5.20 read the first name, later ones the second.
        "qkv_bias": True,
        "qv_bias": True,
        "torch_dtype": "float32",
    }
    if finetuned:
        names = list(meta.get("labels", ()))
        count = len(flat["head/bias"])
        names = names if len(names) == count else [f"LABEL_{i}" for i in range(count)]
        several = config.objective.kind == "sigmoid"
        return settings | {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": (
                "multi_label_classification"
                if several
                else "single_label_classification"
            ),
        }
    decoder = model.decoder
    return settings | {
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.mlp,
        "norm_pix_loss": config.objective.target.rgb not in ("raw", "pixels"),
    }


def _processor(config) -> dict:
    """Hugging Face's preprocessor_config.json: resize, centre crop, normalise."""
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.data.size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": config.data.size, "width": config.data.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.picture.mean),
        "image_std": list(config.picture.std),
    }


def _conv(config, flat: Arrays) -> np.ndarray:
    """The patch kernel [f, d] as a convolution's [d, c, t, h, w]."""
    size, kernel = size_of(config.model), flat["embed/rgb/kernel"]
    kernel = kernel.reshape(size.tubelet, size.side, size.side, 3, -1)
    return kernel.transpose(4, 3, 0, 1, 2)


def _dense(flat: Arrays, ours: str, theirs: str) -> Arrays:
    return {
        f"{theirs}.weight": flat[f"{ours}/kernel"].T,
        f"{theirs}.bias": flat[f"{ours}/bias"],
    }


def _norm(flat: Arrays, ours: str, theirs: str) -> Arrays:
    """A LayerNorm where the model has it."""
    if f"{ours}/scale" not in flat:
        return {}
    return {
        f"{theirs}.weight": flat[f"{ours}/scale"],
        f"{theirs}.bias": flat[f"{ours}/bias"],
    }


def _blocks(flat: Arrays, ours: str, theirs: str) -> Arrays:
    arrays, i = {}, 0
    while f"{ours}/block_{i}/norm_1/scale" in flat:
        arrays |= _block(flat, f"{ours}/block_{i}", f"{theirs}.{i}")
        i += 1
    return arrays


def _block(flat: Arrays, ours: str, theirs: str) -> Arrays:
    """A block; layer scale goes into the last layer of its branch."""
    kernel = flat[f"{ours}/attention/qkv/kernel"]  # d 3 h e
    d = len(kernel)
    bias = flat[f"{ours}/attention/qkv/bias"]  # 3 h e, or 2 h e
    attention = f"{theirs}.attention.attention"
    arrays = {
        f"{attention}.{name}.weight": kernel[:, i].reshape(d, d).T
        for i, name in enumerate(("query", "key", "value"))
    }
    arrays |= {
        f"{attention}.q_bias": bias[0].reshape(d),
        f"{attention}.v_bias": bias[-1].reshape(d),
    }
    scaled = {}
    for part, scale in (("attention/out", "scale_1"), ("mlp/out", "scale_2")):
        factor = flat.get(f"{ours}/{scale}", np.ones(d, np.float32))
        weight = flat[f"{ours}/{part}/kernel"].reshape(-1, d)
        scaled[f"{part}/kernel"] = weight * factor
        scaled[f"{part}/bias"] = flat[f"{ours}/{part}/bias"] * factor
    arrays |= _dense(scaled, "attention/out", f"{theirs}.attention.output.dense")
    arrays |= _dense(flat, f"{ours}/mlp/in", f"{theirs}.intermediate.dense")
    arrays |= _dense(scaled, "mlp/out", f"{theirs}.output.dense")
    arrays |= _norm(flat, f"{ours}/norm_1", f"{theirs}.layernorm_before")
    return arrays | _norm(flat, f"{ours}/norm_2", f"{theirs}.layernorm_after")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "a workdir, its checkpoints, one step, or a published file or folder"
    parser.add_argument("checkpoint", help=what)
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    parser.add_argument("--licence", default="", help="of the weights, for the card")
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        notes = export(
            given.checkpoint, given.to, given.out, given.weights, given.licence
        )
    except UserError as error:
        commandline.stop(error)
    print("\n".join([*notes, f"written: {given.out} ({given.to})"]))


if __name__ == "__main__":
    sys.exit(main())
