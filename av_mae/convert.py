"""Converts a file that others published into a checkpoint of ours.

    python -m av_mae.convert SOURCE --out DIR
    python -m av_mae.convert SOURCE --out DIR --config.model.fusion_layer=18
    python -m av_mae.convert --frontend SAVEDMODEL_DIR --trust

The first writes a workdir whose step 0 holds the weights, with the config and what else
rebuilds the model: `init_from.checkpoint_path` and `--config.mode=eval` take it. It
prints where every parameter went, and what the file does not tell; `--config.x.y=value`
says such a field otherwise. `init_from.checkpoint_path` takes SOURCE itself too.

The last compares our log-mels with those that a TensorFlow SavedModel computes from a
waveform; what agrees becomes the preset `scenic` of this machine (see av_mae.frontend).
"""

import argparse
import ast
import functools
import json
import logging
from pathlib import Path

import jax

from av_mae import (
    CheckpointError,
    ConfigError,
    UserError,
    checkpoints,
    commandline,
    finetune,
    frontend,
    importers,
    loop,
    optim,
    pretrain,
)
from av_mae import run as runs
from av_mae.importers import Imported, Row

log = logging.getLogger("av_mae.convert")  # `__name__` is "__main__" here


def convert(source: Path | str, out: Path | str, **options) -> Imported:
    """Writes the workdir `out` and returns what was read; options as `importers.read`.

    Raises CheckpointError if the file cannot be read or does not fit the model that its
    config describes, or if `out` holds another experiment.
    """
    found = fitted(importers.read(source, **options), source)
    meta = {
        "labels": found.labels,
        "spectrogram": dict(found.config.spectrogram),
        "picture": found.config.picture.to_dict(),
        "dataset_checksum": "",
        "provenance": loop.provenance(),
        "source": str(source),
        "notes": found.notes,
    }
    config = json.loads(runs.config_json(found.config))
    target = checkpoints.Checkpoints(out, config, meta, keep=1)
    try:
        target.save(0, {"params": found.params}, force=True)
    finally:
        target.close()
    return found


def fitted(found: Imported, source: Path | str) -> Imported:
    """The same, with a row for each parameter of the model that the file lacks.

    Raises CheckpointError for a parameter that the model has not, or of another shape.
    """
    wanted, given = shapes(abstract(found.config)), shapes(found.params)
    wrong = [
        f"{name} {shape} (in the model: {wanted.get(name, 'none')})"
        for name, shape in given.items()
        if wanted.get(name) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} does not fit the model of its config: {', '.join(wrong[:5])}; "
            "data.num_frames, data.size, data.audio_seconds decide the number of "
            "positions."
        )
    known = {row.target for row in found.rows}
    why = "not in the file: fresh where it is needed (init_from.allow_fresh)"
    for name in sorted(wanted.keys() - given.keys() - known):
        found.rows.append(Row("", name, why))
    return found


def shapes(params) -> dict[str, tuple[int, ...]]:
    """{'/'-joined name: shape} of a tree of arrays."""
    return {name: x.shape for name, x in optim.named(params).items()}


def abstract(config):
    """Shapes of all parameters of the model that a config describes."""
    if config.trainer == "pretrain":
        init = functools.partial(pretrain.init, config, pretrain.build(config))
    else:
        model = finetune.build(config, config.model.classes)
        init = functools.partial(finetune.init, config, model)
    return jax.eval_shape(init, jax.random.key(0))


def summary(found: Imported) -> str:
    """How many parameters went where."""
    taken = sum(bool(row.source and row.target) for row in found.rows)
    left = sum(not row.target for row in found.rows)
    missing = sum(not row.source for row in found.rows)
    sizes = sum(x.size for x in jax.tree.leaves(found.params))
    return (
        f"{taken} parameters of the source taken, {left} left out; ours has {sizes:,} "
        f"values, {missing} parameters are not in the source."
    )


def options_of(arguments: list[str]) -> dict:
    """{dotted name: value} of --config.NAME=VALUE; ConfigError for anything else."""
    options = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name.startswith("--config.") and equals):
            raise ConfigError(f"what is {argument!r}? Fields are --config.NAME=VALUE.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        options[name.removeprefix("--config.")] = value
    return options


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", help="the published file or folder")
    parser.add_argument("--out", help="the workdir to write")
    parser.add_argument("--frontend", help="a SavedModel to compare presets with")
    parser.add_argument(
        "--trust", action="store_true", help="run the SavedModel, which is a program"
    )
    given, rest = parser.parse_known_args(argv)
    commandline.quiet_libraries()
    try:
        options = options_of(rest)
        if given.frontend:
            print(compare_frontend(given.frontend, given.trust))
            return
        if not (given.source and given.out):
            raise UserError("give a published file and --out, the workdir to write.")
        found = convert(given.source, given.out, **options)
    except UserError as error:
        commandline.stop(error)
    print(found.report())
    print(summary(found))
    print(f"written: {given.out}, step 0")


def compare_frontend(directory: str, trust: bool) -> str:
    """The error of each preset against a SavedModel; keeps one that agrees."""
    if not trust:
        raise UserError(
            f"a SavedModel is a program, and --frontend would run the one in "
            f"{directory}: add --trust if you know where it comes from."
        )
    errors = frontend.compare(directory)
    path = frontend.store(errors, directory)
    if path is None:
        end = "no preset is the same: there is no preset `scenic` on this machine yet."
    else:
        end = f"preset `scenic` is now {errors[0].preset} on this machine ({path})."
    return f"{frontend.text(errors)}\n{end}"


if __name__ == "__main__":
    main()
