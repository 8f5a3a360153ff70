"""AV-MaskEnhancer's files: every parameter has a place, the outputs are the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch_files
from scenic import SHARED, quick

from av_mae import (
    CheckpointError,
    finetune,
    importers,
    maskenhancer,
    optim,
    pretrain,
    tokens,
)
from av_mae.importers import avmaskenhancer, pickles
from av_mae.masking import Mask

FOLDER = SHARED / "fixtures" / "videomae" / "avmaskenhancer_tiny"
CASES = sorted(path.name.removesuffix("_io.npz") for path in FOLDER.glob("*_io.npz"))
needed = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the published numbers are not at {FOLDER}"
)


@functools.cache
def options(case: str) -> tuple[tuple[str, int], ...]:
    """What the files do not tell of the small models, as pairs."""
    sizes = json.loads((FOLDER / "config.json").read_text())[case]
    found = {"data.size": sizes["img_size"], "data.num_frames": sizes["frames"]}
    if case == "finetune":
        return tuple({**found, "model.heads": sizes["heads"]}.items())
    heads = {"model.heads": sizes["encoder"][2]}
    return tuple({**found, **heads, "model.decoder.heads": sizes["decoder"][2]}.items())


@functools.cache
def imported(case: str):
    return importers.read(FOLDER / f"{case}.pth", **dict(options(case)))


def patches_of(config, io) -> dict[str, jax.Array]:
    video = jnp.asarray(io["video"]).transpose(0, 2, 3, 4, 1)  # b t h w c
    side = int(config.model.variant.split("/")[1].split("x")[0])
    rgb = tokens.patchify(video, (2, side, side))
    return {"rgb": rgb, "spectrogram": jnp.asarray(io["mfcc"][:, 0])}


def mask_of(io) -> Mask:
    """Token indices in rising order, as a boolean mask has them."""
    masked = io["bool_masked_pos"]
    rows = lambda which: jnp.asarray(
        np.stack([np.flatnonzero(row) for row in which]), jnp.int32
    )
    return Mask(rows(~masked), rows(masked))


def outputs(case: str, io) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{what: (ours, stored)}, with the steps on the way where they are stored."""
    found = imported(case)
    x = patches_of(found.config, io)
    variables = {"params": jax.tree.map(jnp.asarray, found.params)}
    if case == "finetune":
        model = finetune.build(found.config, found.config.model.classes)
        logits = quick(lambda x: model.apply(variables, x))(x)["rgb"]
        return {"logits": (logits, io["logits"])}
    model, masks = pretrain.build(found.config), {"rgb": mask_of(io)}
    wanted = (maskenhancer.SoundEncoder, maskenhancer.Meeting)
    keep = lambda module, method: isinstance(module, wanted)
    run = lambda x: model.apply(variables, x, masks, capture_intermediates=keep)
    predictions, state = quick(run)(x)
    steps = state["intermediates"]
    each = {"sound": (steps["sound"]["__call__"][0], io["audio_encoder"])}
    names = {"to_video": "crossA2V", "to_sound": "crossV2A", "together": "selfAV"}
    for ours, theirs in names.items():
        value = steps["meet"][ours]["__call__"][0][:, io["rows_of_1568"]]
        each[ours] = (value, io[theirs])
    rows = predictions["rgb"][:, io["output_rows"]]
    return each | {"output": (rows, io["output"])}


@needed
def test_every_case_is_there():
    assert len(CASES) >= 2


@needed
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_published_ones(case):
    io = np.load(FOLDER / f"{case}_io.npz")
    with jax.default_matmul_precision("highest"):
        errors = {
            name: np.abs(np.asarray(ours) - stored).max()
            for name, (ours, stored) in outputs(case, io).items()
        }
    parity.record("avmaskenhancer", case, outputs=max(errors.values()))
    assert max(errors.values()) < 1e-4, errors


def abstract(config):
    if config.trainer == "pretrain":
        init = functools.partial(pretrain.init, config, pretrain.build(config))
    else:
        model = finetune.build(config, config.model.classes)
        init = functools.partial(finetune.init, config, model)
    return jax.eval_shape(init, jax.random.key(0))


def shapes(params) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in optim.named(params).items()}


@needed
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_place(case):
    found = imported(case)
    assert shapes(found.params) == shapes(abstract(found.config))
    stored, _ = pickles.weights(FOLDER / f"{case}.pth")
    assert {row.source for row in found.rows} == set(stored)
    left = {row.source for row in found.rows if not row.target}
    assert left == {name for name in stored if name.endswith("num_batches_tracked")}
    values = sum(x.size for x in optim.named(found.params).values())
    assert values == sum(np.prod(stored[name].shape) for name in set(stored) - left)
    config = found.config
    assert config.model.fusion == {"pretrain": "attention", "finetune": "concat"}[case]
    assert config.model.sound.to_dict() == dict(
        filters=(8, 8, 16, 128), blocks=(1, 1, 1, 1)
    )
    assert (config.trainer, config.spectrogram.preset) == (case, "mfcc")
    assert "data.audio_seconds=20.48" in " ".join(found.notes)


@needed
def test_a_pretraining_file_without_attention(tmp_path):
    """The layout of the project's other fusion, of which no file is stored."""
    stored, _ = pickles.weights(FOLDER / "pretrain.pth")
    dropped = ("crossA2V", "crossV2A", "selfAV")
    kept = {k: np.asarray(a) for k, a in stored.items() if not k.startswith(dropped)}
    path = torch_files.write(tmp_path / "concat.pth", {"model": kept})
    assert importers.find(path) is avmaskenhancer
    found = importers.read(path, **dict(options("pretrain")))
    assert found.config.model.fusion == "concat"
    assert shapes(found.params) == shapes(abstract(found.config))


@needed
def test_files_of_something_else(tmp_path):
    """A video model is left to its own reader; a strange parameter is named."""
    assert not avmaskenhancer.matches(FOLDER / "config.json")
    stored, _ = pickles.weights(FOLDER / "finetune.pth")
    arrays = {name: np.asarray(array) for name, array in stored.items()}
    video = {k: a for k, a in arrays.items() if not k.startswith("audio_endoder")}
    path = torch_files.write(tmp_path / "video.pth", {"model": video})
    assert not avmaskenhancer.matches(path)
    strange = arrays | {"audio_endoder.layer5.0.conv1.weight": np.zeros(3, np.float32)}
    path = torch_files.write(tmp_path / "strange.pth", {"model": strange})
    with pytest.raises(CheckpointError, match=r"strange.pth: .*layer5.0.conv1.weight"):
        importers.read(path, **dict(options("finetune")))
    empty = {k: a for k, a in arrays.items() if ".layer3." not in k}
    path = torch_files.write(tmp_path / "empty.pth", {"model": empty})
    with pytest.raises(CheckpointError, match="no stage 3 of four"):
        importers.read(path, **dict(options("finetune")))
