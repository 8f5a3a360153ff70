"""Runs: stopped, refused, and on other numbers of devices and processes."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synthetic
import training_run

from av_mae import (
    CheckpointError,
    TrainingError,
    checkpoints,
    checksums,
    optim,
    parallel,
    pretrain,
)
from av_mae import run as runs
from av_mae.importers import imported
from data import RecordError

PRETRAIN, FINETUNE = "digits/pretrain", "digits/finetune"
SOUND = "pretraining on sound alone"
SCRIPT = Path(training_run.__file__)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


def child(runs, devices=1, **environment):
    """A process that does these runs one after another, on simulated devices."""
    if devices > 1:
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + flags
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(runs)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> tuple[list[dict], str]:
    """What a child printed for each run, and its log; it has to end well."""
    out, log = process.communicate(timeout=600)
    assert process.returncode == 0, log[-3000:]
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines], log  # Gloo prints there too


def state_of(workdir, step=None) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint (or of one step) by name."""
    path = Path(workdir) / "checkpoints" / str(step) if step else workdir
    state = {}
    for part in ("params", "opt_state", "ema"):
        values = checkpoints._names(checkpoints.load(path, part)[0])
        state |= {f"{part}/{name}": value for name, value in values.items()}
    return state


def assert_same_bits(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


# Interrupted runs end as uninterrupted ones.

ALONE = {"modalities": ["spectrogram"], "model__fusion": "separate"}
LIGHT = ALONE | {  # every step a line, a checkpoint every third
    "log__every_steps": 1,
    "log__pictures": 0,
    "checkpoint__every_steps": 3,
    "eval__every_epochs": 1.5,
    "ema": 0.9,
}
PAUSE = 0.03  # seconds between the steps of a run that is going to be interrupted


def light(steps=40):
    return LIGHT | {"steps": steps}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(steps) → the workdir of an uninterrupted run in this process."""

    def make(steps=40):
        workdir = tmp_path_factory.mktemp("whole")
        training_run.run(PRETRAIN, workdir, light(steps))
        rows = synthetic.lines(workdir)
        logged = [row["step"] for row in rows if "loss" in row]
        assert logged == list(range(1, steps + 1))
        assert len(rows) == steps + -(-steps // 6)
        return workdir

    return functools.cache(make)


def interrupted(workdir, steps=40, pause=PAUSE):
    changes = light(steps)
    options = dict(name=PRETRAIN, workdir=str(workdir), changes=changes, pause=pause)
    return child([options])


def wait_for(process, workdir, more) -> bool:
    """Waits until a child has written so many lines; False if it ended before."""
    path, start = Path(workdir) / "metrics.jsonl", None
    process.stdout.readline()  # the run begins: the file is cut
    while process.poll() is None:
        lines = path.read_bytes().count(b"\n")
        start = lines if start is None else start
        if lines >= start + more:
            return True
        time.sleep(0.002)
    return False


def assert_as_uninterrupted(workdir, whole):
    assert_same_bits(state_of(workdir), state_of(whole))
    assert synthetic.lines(workdir) == synthetic.lines(whole)
    folders = [workdir / "checkpoints", whole / "checkpoints"]
    kept, wanted = ({path.name for path in folder.iterdir()} for folder in folders)
    assert kept == wanted and len(kept) == 3  # two steps and the lock


def test_sigterm_saves_and_the_next_run_goes_on(whole, tmp_path, caplog):
    process = interrupted(tmp_path)
    assert wait_for(process, tmp_path, 12)  # ten steps, two evaluations
    process.send_signal(signal.SIGTERM)
    _, log = finish(process)  # exit status 0
    _, step = checkpoints.find(tmp_path)
    assert 10 <= step < 40
    assert f"stopped by SIGTERM after step {step}; run again to go on" in log
    assert synthetic.lines(tmp_path)[-1]["step"] == step
    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level("INFO"):
        training_run.run(PRETRAIN, tmp_path, light())
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"resuming {tmp_path} at step {step}" in caplog.text
    assert_as_uninterrupted(tmp_path, whole())


def test_a_bad_update_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
    """The loss of step 5 is good, its update is not: the parameters overflow."""
    rate = jax.tree_util.Partial(lambda step: jnp.where(step == 4, 1e30, 1e-3))
    monkeypatch.setattr(optim, "warmup_cosine", lambda *_: rate)
    changes = {"steps": 9, "checkpoint__every_steps": 1, "log__every_steps": 9}
    with pytest.raises(TrainingError) as error:
        training_run.run(PRETRAIN, tmp_path, LIGHT | changes)
    for text in (
        "parameter_norm is inf at step 5",
        f"the last good checkpoint is step 4 in {tmp_path}",
        "in another --workdir with a lower schedule.learning_rate_per_256",
    ):
        assert text in str(error.value)
    steps = checksums.steps(tmp_path / "checkpoints")
    assert steps == [3, 4]
    config = synthetic.tiny(PRETRAIN, **LIGHT | changes)
    *_, batch = zip(
        range(5), synthetic.Dataset(config).train(config.batch_size), strict=False
    )
    line = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert line["step"] == 5 and line["numbers"]["parameter_norm"] == "inf"
    assert line["clips"] == [f"clip {i}" for i in batch[1]["index"]]
    assert all(np.isfinite(x).all() for x in state_of(tmp_path).values())
    # The first bad step is named, although it is looked at only later.
    changes |= {"checkpoint__every_steps": 4}
    with pytest.raises(TrainingError, match="parameter_norm is inf at step 5; .* 4 in"):
        training_run.run(PRETRAIN, tmp_path, LIGHT | changes)
    assert checksums.steps(tmp_path / "checkpoints") == [3, 4]

    def full(*_):
        raise TrainingError("nonfinite.jsonl could not be written.")

    monkeypatch.setattr(runs.loop, "note_clips", full)  # and its evaluation comes first
    with pytest.raises(TrainingError, match="parameter_norm is inf at step 5; .* 4 in"):
        training_run.run(PRETRAIN, tmp_path, LIGHT | changes)
    assert checksums.steps(tmp_path / "checkpoints") == [3, 4]


def spoilt(monkeypatch, bad: int):
    """Every loss of a batch that holds this clip is not a number."""
    make_loss = pretrain.make_loss

    def make(config, reconstruct):
        loss = make_loss(config, reconstruct)

        def spoil(params, batch, rng):
            total, numbers = loss(params, batch, rng)
            return jnp.where((batch["index"] == bad).any(), jnp.nan, total), numbers

        return spoil

    monkeypatch.setattr(pretrain, "make_loss", make)


@pytest.mark.slow
def test_updates_of_bad_batches_are_skipped_and_their_clips_named(
    tmp_path, monkeypatch, caplog
):
    """Also in a run that goes on from before one; the file has each bad step once."""
    changes = LIGHT | {"steps": 9, "nonfinite": "skip"}
    config = synthetic.tiny(PRETRAIN, **changes)
    batches = synthetic.Dataset(config).train(config.batch_size)
    clips = [next(batches)["index"] for _ in range(9)]
    bad = clips[7][0]
    spoilt(monkeypatch, bad)
    steps = [step for step, index in enumerate(clips, 1) if bad in index]
    assert 8 in steps and len(steps) < 9
    with caplog.at_level("INFO"):
        training_run.run(PRETRAIN, tmp_path, changes)
    assert f"the update of step {steps[0]} is skipped: loss is nan" in caplog.text
    assert f"NOTE: {len(steps)} updates were skipped as not finite." in caplog.text
    whole = state_of(tmp_path), synthetic.lines(tmp_path)
    checksums.delete(tmp_path / "checkpoints" / "9")
    training_run.run(PRETRAIN, tmp_path, changes)
    assert_same_bits(state_of(tmp_path), whole[0])
    assert synthetic.lines(tmp_path) == whole[1]
    text = (tmp_path / "nonfinite.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "step": step,
            "numbers": {"loss": "nan"},
            "clips": [f"clip {i}" for i in clips[step - 1]],
        }
        for step in steps
    ]
    rows = [row for row in whole[1] if "learning_rate" in row]
    assert [row["step"] for row in rows if "loss" not in row] == steps
    assert rows[-1]["skipped"] == len(steps)


def test_a_run_that_skips_everything_ends(tmp_path, monkeypatch):
    huge = jax.tree_util.Partial(lambda step: 3e38)
    monkeypatch.setattr(optim, "warmup_cosine", lambda *_: huge)
    monkeypatch.setattr(runs, "MAX_SKIPPED", 3)
    changes = LIGHT | {"steps": 9, "nonfinite": "skip"}
    with pytest.raises(TrainingError, match="3 updates one after another .* step 3:"):
        training_run.run(PRETRAIN, tmp_path, changes)


def begun(config, workdir, tx):
    """A run of a model of one parameter, on records of which one is not there."""
    data = dict.fromkeys(("train", "eval"), synthetic.Dataset(config))
    data["train"].info["splits"] = {config.eval.split: {"clips": 8, "listed": 9}}
    first, mesh = lambda key: {"x": jnp.zeros(2)}, parallel.mesh(1, 1)
    return runs.start(config, data, workdir, first, tx, mesh, lambda *_: None)


def test_a_checkpoint_does_not_keep_what_one_evaluation_was_of(tmp_path):
    config = synthetic.tiny(FINETUNE, eval__corruption="noise:3")
    for step in (0, 1):  # a new run, and one that goes on
        with begun(config, tmp_path, optax.sgd(0.1)) as run:
            assert run.step == step
            listed, degraded = run.caveats
            run.save(step + 1, run.state)
        assert degraded == "evaluated on degraded input: noise:3"
        assert checkpoints.load(tmp_path)[2]["caveats"] == [listed]


def test_a_run_that_is_done_still_tells_what_it_skipped(tmp_path, caplog):
    config = synthetic.tiny(FINETUNE, nonfinite="skip")
    with begun(config, tmp_path, optax.adam(0.1)) as run:
        run.save(3, run.state | {"step": jnp.int32(3)})  # no update was made
    with caplog.at_level("INFO"), begun(config, tmp_path, optax.adam(0.1)) as run:
        run.conclude({}, synthetic.Dataset(config))
    assert "NOTE: 3 updates were skipped as not finite." in caplog.text


def test_spikes_of_the_loss_stand_beside_the_final_numbers(tmp_path, caplog):
    config = synthetic.tiny(FINETUNE)
    with caplog.at_level("INFO"), begun(config, tmp_path, optax.sgd(0.1)) as run:
        for step in range(1, 130):
            run.watch(step, {"loss": 9.0 if step in (110, 120) else 1.0})
        run.conclude({}, synthetic.Dataset(config))
        assert "spikes of the loss" not in caplog.text  # nobody has looked yet
        run.check()
        run.conclude({}, synthetic.Dataset(config))
    assert "the loss has a spike at step 110: 9 over" in caplog.text
    said = "spikes of the loss since this process began: 2, the last at step 120"
    assert f"NOTE: {said}." in caplog.text


def test_pictures_that_cannot_be_written_cost_no_step(tmp_path, monkeypatch):
    changes = LIGHT | {"steps": 5, "log__pictures": 1, "eval__every_epochs": 1.0}

    def full(*arguments, **options):
        raise TrainingError("a.png could not be written: No space left on device.")

    monkeypatch.setattr(pretrain.visualise, "write", full)
    with pytest.raises(TrainingError, match="No space left"):
        training_run.run(PRETRAIN, tmp_path, changes)
    assert checkpoints.find(tmp_path)[1] == 4


class Failing:
    """A data set that one evaluation, the `number`-th, finds damaged."""

    def __init__(self, dataset, number):
        self._dataset, self._left = dataset, number

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def evaluate(self, batch_size):
        self._left -= 1
        if not self._left:
            raise RecordError("clip 3 is damaged.")
        yield from self._dataset.evaluate(batch_size)


@pytest.mark.parametrize("number", [1, 2])  # during the run, after its last step
@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE])
def test_an_evaluation_that_fails_costs_nothing(name, number, tmp_path, monkeypatch):
    changes = LIGHT | {"steps": 7, "eval__every_epochs": 1.0}  # an epoch is 4 steps
    if name == FINETUNE:
        del changes["log__pictures"], changes["model__fusion"]
    training_run.run(name, tmp_path / "whole", changes)
    made = synthetic.Dataset

    def dataset(*args, **options):
        found = made(*args, **options)
        return Failing(found, number) if "first" in options else found

    with monkeypatch.context() as patch, pytest.raises(RecordError, match="clip 3"):
        patch.setattr(synthetic, "Dataset", dataset)
        training_run.run(name, tmp_path / "run", changes)
    failed_at = {1: 4, 2: 7}[number]
    assert checkpoints.find(tmp_path / "run")[1] == failed_at
    training_run.run(name, tmp_path / "run", changes)
    synthetic.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_changes_the_numbers_as_a_run_goes_on_is_told(tmp_path):
    config = synthetic.tiny(FINETUNE, eval__split="test", steps=6, log__every_steps=2)
    with begun(config, tmp_path, optax.sgd(0.1)) as run:
        run.save(3, run.state)
    config.steps, config.eval.split, config.log.every_steps = 12, "train", 4
    told = "from step 3 on, other than before: "
    steps = told + "steps is 12, not 6"
    split = told + "eval.split is 'train', not 'test'"
    for step in (3, 4):  # it is still told when it goes on once more
        with begun(config, tmp_path, optax.sgd(0.1)) as run:
            assert run.step == step
            assert run.caveats.count(steps) == 1
            assert run.caveats.count(split) == (step == 3)  # of this evaluation alone
            run.save(step + 1, run.state)
        saved = checkpoints.load(tmp_path)[2]["caveats"]
        assert steps in saved and split not in saved


def test_an_evaluation_by_another_config_says_so(whole, caplog):
    """Of the run's own: every field that is fixed; elsewhere, what the model sees."""
    changes = dict(seed=5, mask__spectrogram__ratio=0.75, eval__batch_size=3)
    config = synthetic.tiny(PRETRAIN, **(light() | changes))
    ratio = "is not that of the training: mask.spectrogram.ratio is 0.75, not 0.7"
    for init_from, told in (
        ("", f"NOTE: the config {ratio}, seed is 5, not 0."),
        (str(whole()), f"NOTE: the config {ratio}."),
    ):
        caplog.clear()
        config.init_from.checkpoint_path = init_from
        workdir = whole() / "none" if init_from else whole()
        with caplog.at_level("INFO"):
            pretrain.evaluate(config, {"eval": synthetic.Dataset(config)}, workdir)
        assert f"evaluating the weights of {whole()}/checkpoints/40" in caplog.text
        assert caplog.text.count(told) == 2  # at the top and beside the result
    same = synthetic.tiny(PRETRAIN, **light())
    caplog.clear()
    with caplog.at_level("INFO"):
        pretrain.evaluate(same, {"eval": synthetic.Dataset(same)}, whole())
    assert "NOTE" not in caplog.text


def test_what_is_not_finite_in_an_evaluation_is_told_and_not_written(tmp_path, caplog):
    config = synthetic.tiny(FINETUNE)
    with caplog.at_level("INFO"), begun(config, tmp_path, optax.sgd(0.1)) as run:
        run.report(3, {"eval/loss": float("nan"), "eval/top_1": 0.5})
        run.report(3, {"eval/loss": 0.25, "eval/top_1": 0.5})  # not a second time
    assert "not finite in this evaluation: loss nan" in caplog.text
    row = {"step": 3, "eval/top_1": 0.5, "not_finite_in_evaluation": 1.0}
    assert synthetic.lines(tmp_path) == [row]


# Configs of older releases.


@pytest.mark.parametrize("name", [PRETRAIN, FINETUNE, "audioset/finetune"])
def test_fields_that_a_checkpoint_lacks_get_their_neutral_value(name):
    config = synthetic.config(name, "")
    saved = json.loads(runs.config_json(config))
    assert runs.config_json(runs.config_of(saved)) == json.dumps(saved)
    neutral = imported.template(config.trainer)
    lost = "ema nonfinite compute.scan compute.remat model.block.qkv_init".split()
    lost += ["probe", "eval.average"] if config.trainer == "finetune" else []
    for field in lost:
        *parents, last = field.split(".")
        group = functools.reduce(lambda tree, key: tree[key], parents, saved)
        del group[last]
    del saved["data"]["skip_bad_records"]
    found = runs.config_of(saved)
    for field in (*lost, "data.skip_bad_records"):
        at = lambda tree, field=field: functools.reduce(
            lambda group, key: group[key], field.split("."), tree
        )
        assert at(found) == at(neutral), field
    assert set(found.optimizer) == set(config.optimizer)  # SGD has no second moment
    fields = lambda tree: checkpoints._dotted(tree.to_dict()).keys()
    assert fields(found) == fields(config)


# Another experiment in the same workdir.


@pytest.mark.parametrize(
    ("trainer", "changes", "field"),
    [
        (PRETRAIN, {"seed": 1}, "config.seed is 1, there it is 0"),
        (PRETRAIN, {"batch_size": 8}, "config.batch_size is 8, there it is 4"),
        (PRETRAIN, {"optimizer__name": "sgd"}, "config.optimizer.name is 'sgd'"),
        (PRETRAIN, {"compute__accumulate": 2}, "config.compute.accumulate is 2"),
        (FINETUNE, {}, "holds another experiment: config"),
    ],
)
def test_another_experiment_is_refused(whole, trainer, changes, field):
    whole = whole()
    before = synthetic.lines(whole)
    base = light() if trainer == PRETRAIN else {}
    with pytest.raises(CheckpointError, match=field):
        training_run.run(trainer, whole, base | changes)
    assert synthetic.lines(whole) == before
    checkpoints.Checkpoints(whole, {}, {}).close()  # nothing holds the workdir


def test_other_records_and_a_second_run_are_refused(whole):
    whole = whole()
    config = synthetic.tiny(PRETRAIN, **light())
    data = {"train": synthetic.Dataset(config), "eval": synthetic.Dataset(config)}
    data["train"].checksum = "another"
    with pytest.raises(CheckpointError, match="trained on other records"):
        pretrain.train(config, data, whole)
    other = checkpoints.Checkpoints(whole, {}, {})
    with pytest.raises(CheckpointError, match="in use by another run"):
        training_run.run(PRETRAIN, whole, light())
    other.close()


def test_an_init_from_that_fails_lets_go_of_the_workdir(whole, tmp_path):
    changes = {"init_from__checkpoint_path": str(whole()), "model__depth": 3}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CheckpointError, match="embed/rgb/kernel"):
        training_run.run(FINETUNE, tmp_path, changes)
    changes["init_from__checkpoint_path"] = str(tmp_path / "none")
    with pytest.raises(CheckpointError, match="none holds no checkpoint"):
        training_run.run(FINETUNE, tmp_path, changes)
    assert signal.getsignal(signal.SIGTERM) == before


# Devices and processes.

EIGHT = {
    "batch_size": 8,
    "eval__batch_size": 8,
    "steps": 5,
    "log__every_steps": 1,
    "checkpoint__every_steps": 3,
    "schedule__learning_rate_per_256": 0.032,  # 0.001
    # With 1e-8 Adam makes rounding to updates not in key biases alone, but wherever
    # the gradients of a batch happen to cancel (a few of 60,000 numbers).
    "optimizer__eps": 1e-6,
}
SGD = {"optimizer__name": "sgd", "schedule__learning_rate_per_256": 0.64}
MESHES = {"data": {}, "fsdp": {"parallel__fsdp": 4}}
CASES = [  # the smallest in the default suite
    pytest.param(SOUND, "sgd", id="sound-sgd"),
    pytest.param(PRETRAIN, "sgd", id="pretrain-sgd", marks=pytest.mark.slow),
    pytest.param(PRETRAIN, "adamw", id="pretrain-adamw", marks=pytest.mark.slow),
    pytest.param(FINETUNE, "sgd", id="finetune-sgd", marks=pytest.mark.slow),
    pytest.param(FINETUNE, "adamw", id="finetune-adamw", marks=pytest.mark.slow),
]


def case(name, optimizer, workdir, mesh="data", **options) -> dict:
    changes = EIGHT | (SGD if optimizer == "sgd" else {}) | MESHES[mesh]
    if name != FINETUNE:
        changes["log__pictures"] = 0
    if name == SOUND:
        name, changes = PRETRAIN, changes | ALONE
    return dict(name=name, workdir=str(workdir), changes=changes, **options)


def assert_close(workdir, one, adam: bool, step=None):
    """Losses and parameters of a run as those of the run on one device.

    The gradient of key biases is zero in truth: Adam makes rounding to whole updates.
    """
    rows, expected = synthetic.lines(workdir), synthetic.lines(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in row:
            if "loss" in name:
                assert row[name] == pytest.approx(wanted[name], rel=1e-5), row
    params = checkpoints._names(checkpoints.load(workdir)[0])
    first = checkpoints._names(checkpoints.load(one)[0])
    for name, wanted in first.items():
        value = params[name]
        if adam and name.endswith("attention/qkv/bias"):
            value, wanted = np.delete(value, 1, axis=0), np.delete(wanted, 1, axis=0)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def assert_gradients_close(workdir, one):
    found = np.load(Path(workdir) / "gradients.npz")
    expected = np.load(Path(one) / "gradients.npz")
    norm = np.sqrt(sum(np.sum(np.square(expected[k], dtype=float)) for k in expected))
    assert sorted(found) == sorted(expected) and norm > 0.1
    for name in expected:
        assert np.any(expected[name]), name
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 * norm, name


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_eight_devices_compute_what_one_does(name, optimizer, tmp_path):
    one = tmp_path / "one"
    eight = child(
        [
            case(name, optimizer, tmp_path / mesh, mesh, min_split=64, gradients=True)
            for mesh in MESHES
        ],
        devices=8,
    )
    alone = training_run.run(**case(name, optimizer, one, gradients=True))
    assert alone == {"devices": 1, "processes": 1, "split": [0, 0]}
    copied, split = finish(eight)[0]
    assert copied == {"devices": 8, "processes": 1, "split": [0, 0]}
    pieces = split.pop("split")
    assert split == {"devices": 8, "processes": 1} and len(pieces) == 2
    assert pieces[0] == pieces[1] > 10
    for mesh in MESHES:
        assert_gradients_close(tmp_path / mesh, one)
        assert_close(tmp_path / mesh, one, optimizer == "adamw")


def two_processes(runs: list[dict]) -> list[subprocess.Popen]:
    """Two processes, each with a device, that do these runs together."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    together = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    return [child(runs, **together, JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_two_processes_compute_what_one_does_and_one_goes_on(name, optimizer, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    both = two_processes([case(name, optimizer, two, gradients=True)])
    training_run.run(**case(name, optimizer, one, gradients=True))
    for process in both:
        expected = {"devices": 2, "processes": 2, "split": [0, 0]}
        assert finish(process)[0] == [expected]
    assert_gradients_close(two, one)
    assert_close(two, one, optimizer == "adamw")
    # One process goes on where two stood.
    checksums.delete(two / "checkpoints" / "5")
    training_run.run(**case(name, optimizer, two))
    assert_close(two, one, optimizer == "adamw")


@pytest.mark.slow
def test_two_processes_that_split_the_parameters_compute_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    split = case(SOUND, "sgd", two, "fsdp", min_split=64, gradients=True)
    split["changes"]["parallel__fsdp"] = 2
    both = two_processes([split])
    training_run.run(**case(SOUND, "sgd", one, gradients=True))
    for process in both:
        found = finish(process)[0][0]
        pieces = found.pop("split")
        assert found == {"devices": 2, "processes": 2} and pieces[0] == pieces[1] > 10
    assert_gradients_close(two, one)
    assert_close(two, one, adam=False)
    # One process, which splits nothing, goes on where two stood.
    checksums.delete(two / "checkpoints" / "5")
    training_run.run(**case(SOUND, "sgd", two))
    assert_close(two, one, adam=False)
