"""Keras files of VideoMAE (innat/VideoMAE): parameters in the order of the layers.

Names of Keras variables carry counters that differ from session to session, so only
their order tells what they are. An .h5 file lists them in `weight_names`; a SavedModel
stores them as `variables/<n>` in the order of `model.weights`, and those that lie
nearer to its root under the name of an attribute. A variable that belongs to the model
itself (a mask token, learned positions) comes last, under its own name.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from av_mae import CheckpointError

BLOCK = (
    "norm_1/scale",
    "norm_1/bias",
    "attention/qkv/kernel",
    "attention/out/kernel",
    "attention/out/bias",
    "attention/q/bias",
    "attention/v/bias",
    "norm_2/scale",
    "norm_2/bias",
    "mlp/in/kernel",
    "mlp/in/bias",
    "mlp/out/kernel",
    "mlp/out/bias",
    "scale_1",  # the last two with layer scale only
    "scale_2",
)
_OWN = {
    "mask_token": "decoder_embed/mask_token_rgb",
    "pos_embed": "embed/positions_rgb/embedding",
}


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of the file: its name there, shape, and what reads it."""

    name: str
    shape: tuple[int, ...]
    load: Any

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.load(), dtype)


def matches(path: Path) -> bool:
    """Whether a path is an .h5 file of this edition, or a SavedModel with weights."""
    if path.is_dir():
        return (path / "saved_model.pb").is_file() and (path / "variables").is_dir()
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with h5py.File(path) as file:
        layers = _text(_root(file).attrs.get("layer_names", ()))
    return any(name.endswith(("patch_embed", "Encoder")) for name in layers)


def read(path: Path) -> dict[str, Variable]:
    """Variables by our name, as `videomae` reads them: kernels are [inputs, outputs].

    Raises CheckpointError where their order is of no VideoMAE, or TensorFlow is not
    there to read a SavedModel.
    """
    variables = _savedmodel(path) if path.is_dir() else _h5(path)
    found = {}
    for start, ours in _OWN.items():
        own = [v for v in variables if _last(v.name).startswith(start)]
        if own:
            found[ours] = own[0]
            variables.remove(own[0])
    try:
        return found | _in_order(variables, "decoder_embed/mask_token_rgb" in found)
    except (IndexError, StopIteration) as error:
        raise CheckpointError(
            f"{path}: the order and shapes of its {len(variables)} parameters are not "
            "those of a VideoMAE in Keras."
        ) from error


def _last(name: str) -> str:
    return name.split("/")[-1]


def _text(names) -> list[str]:
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _root(file):
    """The group of the layers: the file itself, or a part of a whole saved model."""
    return file["model_weights"] if "model_weights" in file else file


def _h5(path: Path) -> list[Variable]:
    """The variables of all layers, in order, then those of the model itself."""
    file = h5py.File(path)
    root = _root(file)
    layers = _text(root.attrs["layer_names"])
    if "top_level_model_weights" in root:
        layers.append("top_level_model_weights")
    return [
        Variable(name, root[layer][name].shape, lambda data=root[layer][name]: data[()])
        for layer in layers
        for name in _text(root[layer].attrs["weight_names"])
    ]


def _savedmodel(path: Path) -> list[Variable]:
    """The variables of a SavedModel; its program is not loaded."""
    try:
        import tensorflow as tf
        from tensorflow.core.protobuf import trackable_object_graph_pb2 as graphs
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a TensorFlow SavedModel: install tensorflow to read it, or "
            "give the .h5 file of the same model."
        ) from error
    try:
        reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
        graph = graphs.TrackableObjectGraph()
        graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}/variables cannot be read: {reason}") from error
    stored = [values for node in graph.nodes for values in node.attributes]
    names = {v.checkpoint_key: v.full_name for v in stored}
    slots: dict[int, Variable] = {}
    near = []
    for key, shape in reader.get_variable_to_shape_map().items():
        if key not in names:
            continue
        load = lambda key=key: reader.get_tensor(key)
        variable = Variable(names[key] or key, tuple(shape), load)
        if match := re.match(r"variables/(\d+)/", key):
            slots[int(match[1])] = variable
        else:
            near.append((_place(key), variable))
    near = [variable for _, variable in sorted(near, key=lambda pair: pair[0])]
    own = [v for v in near if _last(v.name).startswith(tuple(_OWN))]
    # Layers with variables of their own, at the root of a functional model, are not
    # among the numbered ones: they fill the numbers that are missing.
    rest = iter([v for v in near if v not in own])
    count = len(slots) + len(near) - len(own)
    return [slots.get(i) or next(rest) for i in range(count)] + own


def _place(key: str) -> tuple[int, int]:
    """Where a variable at the root belongs: number of the layer, place in the layer."""
    layer, leaf = (key.split("/") + [""])[:2]
    number = re.search(r"-(\d+)$", layer)
    order = ("kernel", "gamma", "bias", "beta")
    return int(number[1]) if number else -1, order.index(leaf) if leaf in order else 0


def _in_order(variables: list[Variable], pretrained: bool) -> dict[str, Variable]:
    """Our names by position: patches, blocks, norm, then the decoder or the head."""
    todo = list(variables)
    found: dict[str, Variable] = {}

    def take(*names: str):
        for name in names:
            found[name] = todo.pop(0)

    def blocks(stack: str):
        for i in range(len(todo)):
            if not _is_block(todo):
                break
            take(*(f"{stack}/block_{i}/{leaf}" for leaf in BLOCK[:length]))

    take("embed/rgb/kernel", "embed/rgb/bias")
    length = _block_length(todo)
    blocks("encoder/rgb")
    if pretrained:
        take("encoder/rgb/norm/scale", "encoder/rgb/norm/bias")
        blocks("decoder/rgb")
        take("decoder/rgb/norm/scale", "decoder/rgb/norm/bias")
        take("predict/rgb/kernel", "predict/rgb/bias", "decoder_embed/rgb/kernel")
    else:
        norm = "head_norm" if "fc_norm" in todo[0].name else "encoder/rgb/norm"
        take(f"{norm}/scale", f"{norm}/bias", "head/kernel", "head/bias")
    if todo:
        raise IndexError("variables are left over")
    return found


def _is_block(variables: list[Variable]) -> bool:
    """Whether these begin with a block: a norm, then the kernel of QKV [d, 3d]."""
    if len(variables) < 13:
        return False
    (d,), shape = variables[0].shape[:1], variables[2].shape
    return shape == (d, 3 * d)


def _block_length(variables: list[Variable]) -> int:
    """13 variables, or 15 with layer scale: where the next block of this width is."""
    shape = variables[2].shape
    beginnings = [i for i, v in enumerate(variables) if v.shape == shape]
    return 15 if len(beginnings) > 1 and beginnings[1] == 2 + 15 else 13
