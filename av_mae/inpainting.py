"""The picture that a sound makes an autoencoder see, and what a classifier reads in it.

An autoencoder of the objective `inpaint` (Georgescu et al., ICCV 2023) predicts
each modality from the other. Where no layer mixes the two (`model.fusion` `separate`),
its prediction of a picture knows nothing of the picture.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from av_mae import ConfigError, inputs, loop, masking, pretrain, tokens, visualise

Frames = UInt8[np.ndarray, "b t h w 3"]


def check(config):
    """Raises ConfigError for a model to whose predicted picture pictures contribute."""
    if config.trainer != "pretrain" or config.objective.kind != "inpaint":
        raise ConfigError(
            "only an autoencoder with objective.kind 'inpaint' makes a picture of "
            "sound: load one."
        )
    if config.model.fusion != "separate":
        raise ConfigError(
            f"model.fusion is {config.model.fusion!r}, in which sound tokens have seen "
            "the picture: pretrain with 'separate'."
        )
    if config.objective.target.rgb != "raw":
        raise ConfigError(
            f"objective.target.rgb is {config.objective.target.rgb!r}, which is made a "
            "picture by statistics of the picture: pretrain with 'raw'."
        )


def pictures(model, dataset, batch_size: int) -> Iterator[tuple[dict, Frames, Frames]]:
    """(batch, predicted, true) of all clips of a data set, one view each.

    model: an `api.Model`; predicted: from the share of the sound alone that training
    kept, in two halves of the places; both are painted with the config's `picture.mean`
    and `picture.std`. Raises ConfigError as `check`.
    """
    check(model.config)
    program, params = _program(model.config, model.module), jax.device_put(model.params)
    mean, std = (np.array(model.config.picture[k]) for k in ("mean", "std"))
    paint = lambda x: np.round(255 * np.clip(x * std + mean, 0, 1)).astype(np.uint8)
    for i, batch in enumerate(dataset.evaluate(batch_size)):
        arrays = {k: v for k, v in batch.items() if k not in ("label", "index")}
        found = program(params, arrays, loop.key(model.config.seed, i, "eval"))
        yield batch, *(paint(np.asarray(x)) for x in found)


def _program(config, module):
    """The jitted (params, batch, rng) → (predicted, true) pictures, normalised."""
    prepare, cut = inputs.make(config, missing=False), inputs.layouts(config)["rgb"]
    whole = lambda x: tokens.unpatchify(x, cut.grid, cut.patch)

    def run(params, batch, rng):
        patches, _ = prepare(batch, loop.key(rng, 0, "augment"), False)
        b = len(patches["rgb"])
        masks = pretrain.draw_masks(config, loop.key(rng, 0, "mask"), b)
        places = jnp.broadcast_to(jnp.arange(cut.n, dtype=jnp.int32), (b, cut.n))
        halves = places[:, : cut.n // 2], places[:, cut.n // 2 :]
        predicted = []
        for masked, kept in (halves, halves[::-1]):
            some = dict(masks, rgb=masking.Mask(kept, masked))
            found = module.apply({"params": params}, patches, some, None, False)
            predicted.append(found["rgb"])
        return whole(jnp.concatenate(predicted, axis=1)), whole(patches["rgb"])

    return jax.jit(run)


def read(model, classifier, dataset, batch_size: int) -> dict[str, float]:
    """How often a classifier of pictures names the clip's class (top-1).

    Of the pictures that `model` makes of the sound (`generated`), of the true ones
    (`real`), and of generated ones given to a clip that they are not of (`shuffled`),
    which is what guessing by frequency gives. classifier: an `api.Model` that knows
    pictures, trained on real ones.
    """
    right: dict[str, list] = {"generated": [], "real": [], "shuffled": []}
    for batch, predicted, true in pictures(model, dataset, batch_size):
        valid = batch["valid"]
        for name, frames in (("generated", predicted), ("real", true)):
            seen = batch | {"rgb": frames[:, None]}
            guess = classifier.logits(seen).argmax(axis=1)[valid]
            label = batch["label"][valid]
            right[name].append(guess == label)
            if name == "generated":
                right["shuffled"].append(guess == np.roll(label, 1))
    return {name: float(np.concatenate(x).mean()) for name, x in right.items()}


def draw(model, dataset, batch_size: int, path: Path) -> None:
    """A sheet, PNG: of one clip of each class the middle frame, true and generated."""
    batch, predicted, true = next(pictures(model, dataset, batch_size))
    labels, chosen = np.unique(batch["label"][batch["valid"]], return_index=True)
    middle = true.shape[1] // 2
    rows = [[frames[i, middle] for i in chosen] for frames in (true, predicted)]
    names = [str(dataset.label_names[label]) for label in labels]
    sheet = visualise.sheet(rows, ["true", "of the sound"], names)
    Image.fromarray(sheet).save(path)
