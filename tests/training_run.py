"""Training runs of a child process: simulated devices, several processes, kills.

    python tests/training_run.py '[{"name": "digits/pretrain", "workdir": …}, …]'

The argument is a list of runs, one after another; the fields of a run are those of
`run`. A line of JSON for each tells what lay on how many devices.
"""

import functools
import json
import logging
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import synthetic  # noqa: E402

from av_mae import (  # noqa: E402
    autoencoder,
    checkpoints,
    classifier,
    finetune,
    loop,
    parallel,
    pretrain,
    update,
)
from av_mae import run as runs  # noqa: E402

TRAINERS = {"pretrain": pretrain, "finetune": finetune}


class Slow:
    """A data set whose training batches come every `pause` seconds; says the first."""

    def __init__(self, dataset, pause):
        self._dataset, self._pause = dataset, pause

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def train(self, batch_size, step=0):
        if self._pause:
            print(json.dumps({"begins": step}), flush=True)
        for batch in self._dataset.train(batch_size, step):
            time.sleep(self._pause)
            yield batch


def run(name, workdir, changes=None, pause=0.0, min_split=0, gradients=False):
    """Trains the tiny config `name` in `workdir`; returns what the line tells.

    changes: fields of the config; min_split: parallel.MIN_SPLIT, so that arrays of
    tiny models are split too; gradients: writes `first_gradients` beside the run.
    """
    if min_split:
        parallel.MIN_SPLIT = min_split
    config = synthetic.tiny(name, **(changes or {}))
    process = (jax.process_index(), jax.process_count())
    make = functools.partial(synthetic.Dataset, config, process=process)
    data = {"train": Slow(make(), pause), "eval": make(num_clips=6, first=100)}
    if gradients:
        values = first_gradients(config, data["train"])
        if process[0] == 0:
            Path(workdir).mkdir(parents=True, exist_ok=True)
            np.savez(Path(workdir) / "gradients.npz", **values)
    split = []
    save = runs.Run.save

    def watched(self, step, state):
        split.append(sum(is_split(x) for x in jax.tree.leaves(state)))
        save(self, step, state)

    runs.Run.save = watched
    try:
        TRAINERS[config.trainer].train(config, data, Path(workdir))
    finally:
        runs.Run.save = save
    return {"devices": len(jax.devices()), "processes": process[1], "split": split}


def is_split(array) -> bool:
    return array.addressable_shards[0].data.size < array.size


def first_gradients(config, dataset) -> dict[str, np.ndarray]:
    """Gradients of the first batch by name, on the mesh and batch of the trainer.

    At parameters that are all random: the last layers begin at zero, and then nothing
    before them has a gradient.
    """
    mesh = parallel.mesh(config.parallel.data, config.parallel.fsdp)
    trainer = TRAINERS[config.trainer]
    if trainer is pretrain:
        model = autoencoder.build(config)
        loss = pretrain.make_loss(
            config, pretrain.make_reconstruct(config, model, dataset.missing)
        )
    else:
        model = classifier.build(config, finetune.num_classes(config, dataset))
        predict = finetune.make_predict(config, model, dataset.missing)
        loss = finetune.make_loss(config, predict)
    init = functools.partial(trainer.init, config, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = parallel.state_shardings(shapes, mesh)
    draw = np.random.default_rng(0)
    fill = lambda x: np.asarray(draw.normal(0, 0.2, x.shape), x.dtype)
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        jax.tree.map(fill, shapes),
        shardings,
    )
    batch = parallel.put_batch(next(dataset.train(config.batch_size)), mesh)
    gradients = jax.jit(
        lambda params, batch: update.gradients(
            loss, params, batch, loop.key(config.seed, 0, "step"), 1
        )[1],
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=parallel.replicated(mesh),
    )
    found = checkpoints._names(gradients(params, batch))
    return {name: np.asarray(jnp.asarray(x)) for name, x in found.items()}


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    parallel.initialize()
    with synthetic.quick():
        for options in json.loads(sys.argv[1]):
            print(json.dumps(run(**options)), flush=True)


if __name__ == "__main__":
    main()
