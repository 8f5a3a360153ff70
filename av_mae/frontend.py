"""Which of our presets a TensorFlow SavedModel computes inside, from a waveform.

The released AV-MAE models take a waveform (float32 [b, samples, 1], 16 kHz) and have
their log-mel front end inside; it is published nowhere else. Here every tensor of the
SavedModel's functions that follows from the waveform alone and looks like rows of mels
is computed for tones and noise and compared with each preset. Weights are not read.

A SavedModel is a program, which can read and write files: run only what you trust.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import CheckpointError, ConfigError, spectrogram

TOLERANCE = 0.01
"""The largest difference of logarithms of a front end that is the same: TensorFlow and
XLA round otherwise where a tone leaves a filter nearly empty."""


_log_mel = jax.jit(spectrogram.log_mel, static_argnums=1)


class Error(NamedTuple):
    """How far a preset is from the nearest tensor: of logarithms, on all sounds."""

    preset: str
    mean: float
    worst: float
    tensor: str  # '' where no tensor has this preset's shape


def sounds(samples: int, rate: int = 16000) -> np.ndarray:
    """Sounds [8 samples] float32: tones, a sweep, noise loud and quiet, a click."""
    time = np.arange(samples) / rate
    rng = np.random.default_rng(0)
    rows = [0.5 * np.sin(2 * np.pi * hertz * time) for hertz in (110, 1000, 6000)]
    rows.append(0.5 * np.sin(2 * np.pi * (50 + 3500 * time / time[-1]) * time))
    rows += [level * rng.standard_normal(samples) for level in (0.2, 1e-2, 1e-4)]
    rows.append(np.eye(1, samples, samples // 2)[0])
    return np.clip(rows, -1, 1).astype(np.float32)


def compare(directory: Path | str) -> list[Error]:
    """The error of each preset that hears 16 kHz, the best first; runs the SavedModel.

    Raises CheckpointError where it is no SavedModel with a waveform as input, or where
    nothing in it looks like a spectrogram.
    """
    found: dict[str, Error] = {}
    seen = 0
    for name, waveform, values in tensors(Path(directory)):
        seen += 1
        for preset, error in _errors(name, waveform, values):
            if preset not in found or error.mean < found[preset].mean:
                found[preset] = error
    if not seen:
        raise CheckpointError(
            f"{directory} has no tensor that follows from the waveform alone and has "
            "rows of mels: its front end may be compiled into the model."
        )
    missing = [Error(name, np.inf, np.inf, "") for name in _presets() - found.keys()]
    return sorted([*found.values(), *missing], key=lambda error: error.mean)


def _presets() -> set[str]:
    return set(spectrogram.PRESETS) - {"scenic"}


def _errors(name, waveform, values) -> Iterator[tuple[str, Error]]:
    """The errors of the presets that have as many mels, in either order of axes."""
    if values.ndim == 4:
        values = values[..., 0]
    for preset in sorted(_presets()):
        ours = np.asarray(_log_mel(jnp.asarray(waveform), preset))[..., 0]
        for theirs in (values, values.swapaxes(1, 2)):
            if theirs.shape == ours.shape and np.isfinite(theirs).all():
                apart = np.abs(theirs - ours)
                error = Error(preset, float(apart.mean()), float(apart.max()), name)
                yield preset, error


def store(errors: list[Error], source: Path | str) -> Path | None:
    """Keeps the best preset as `scenic` for this machine, if it is the same front end.

    Returns the file, or None where even the best is further than `TOLERANCE`.
    """
    best = errors[0]
    if best.worst > TOLERANCE:
        return None
    path = spectrogram.found_file()
    try:
        entries = json.loads(path.read_text()) if path.exists() else {}
        entries["scenic"] = dict(
            same_as=best.preset, source=str(source), error=best.worst
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(entries, indent=1) + "\n")
        os.replace(temporary, path)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be written: {error}; set AV_MAE_PRESETS to another file."
        ) from error
    return path


def text(errors: list[Error]) -> str:
    """One line for each preset."""
    lines = [
        f"{e.preset:<8} mean error {e.mean:.5f}  worst {e.worst:.5f}  at {e.tensor}"
        if e.tensor
        else f"{e.preset:<8} nothing of its shape"
        for e in errors
    ]
    return "\n".join(lines)


# Inside a SavedModel.


def tensors(directory: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, waveforms [b s], values) of what may be a spectrogram of the waveforms."""
    tf = _tensorflow()
    for function, graph in _graphs(directory, tf):
        for waveform in _waveforms(graph):
            samples = waveform.shape[1] or 160000
            sound = sounds(samples)
            names = [t.name for t in _spectrograms(graph, waveform, samples)]
            feed = sound if waveform.shape.rank == 2 else sound[..., None]
            with tf.compat.v1.Session(graph=graph) as session:
                for name in names:
                    values = _run(session, name, {waveform: feed}, tf)
                    if values is not None and _like_mels(values.shape, samples):
                        yield f"{function}/{name}", sound, values


def _tensorflow():
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ConfigError(
            "--frontend runs a TensorFlow SavedModel: pip install tensorflow-cpu."
        ) from error
    return tf


def _graphs(directory: Path, tf) -> Iterator[tuple[str, Any]]:
    """(name, graph) of each function in the file."""
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.framework import function_def_to_graph

    path = directory / "saved_model.pb"
    try:
        model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
        main = model.meta_graphs[0].graph_def
    except (OSError, IndexError, ValueError, tf.errors.OpError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # protobuf's own, whose class depends on its backend
        raise CheckpointError(f"{path} is no SavedModel: {error}.") from error
    library = tf.compat.v1.GraphDef(library=main.library, versions=main.versions)
    for function in main.library.function:
        graph = tf.Graph()
        with graph.as_default():
            tf.compat.v1.import_graph_def(library)  # what the function calls
            definition, _ = function_def_to_graph.function_def_to_graph_def(function)
            tf.compat.v1.import_graph_def(definition, name="")
        yield function.signature.name, graph


def _waveforms(graph) -> list:
    """Placeholders of float32 [b samples] or [b samples 1] that may be a waveform."""
    found = []
    for operation in graph.get_operations():
        if operation.type != "Placeholder" or operation.outputs[0].dtype != "float32":
            continue
        shape = operation.outputs[0].shape
        if shape.rank not in (2, 3) or shape[0] is not None:
            continue
        if (shape.rank == 2 or shape[2] == 1) and (shape[1] or 16000) >= 16000:
            found.append(operation.outputs[0])
    return found


def _spectrograms(graph, waveform, samples: int) -> list:
    """Float tensors of rank 3 or 4 that depend on this waveform and no other input."""
    depends: dict[str, bool | None] = {}  # None: on something else too
    found = []
    for operation in graph.get_operations():
        inputs = [depends.get(x.op.name) for x in operation.inputs]
        if operation.type == "Placeholder":
            depends[operation.name] = True if operation is waveform.op else None
            continue
        depends[operation.name] = None if None in inputs else any(inputs)
        if not depends[operation.name]:
            continue
        for output in operation.outputs:
            shape = output.shape
            unknown = shape.rank is None
            if output.dtype == "float32" and (
                unknown or (shape.rank in (3, 4) and _like_mels(shape, samples))
            ):
                found.append(output)
    return found


def _like_mels(shape, samples: int) -> bool:
    """Whether sizes (None where unknown) are rows of mels of this many samples."""
    sizes = list(shape)[1:]
    if len(sizes) == 3 and sizes.pop() not in (None, 1):
        return False
    wanted = {(samples // 160, 128), (128, samples // 160)}
    return len(sizes) == 2 and any(
        all(size in (None, n) for size, n in zip(sizes, pair, strict=True))
        for pair in wanted
    )


def _run(session, name: str, feed: dict, tf) -> np.ndarray | None:
    """A tensor's value; None where it cannot be computed alone."""
    try:
        return np.asarray(session.run(name, feed))
    except (tf.errors.OpError, TypeError, ValueError):
        return None
