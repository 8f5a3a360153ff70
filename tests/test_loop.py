"""What both trainers share: timing, logs, pre-emption, randomness."""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from av_mae import TrainingError, loop

ROOT = Path(__file__).resolve().parents[1]


# How long, and with which randomness.


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "epochs", "given", "expected"),
    [
        (8, 1, 2.0, 0, (12, 24)),
        (8, 2, 2.5, 0, (6, 15)),
        (8, 1, 2.0, 7, (12, 7)),
        (512, 1, 3.0, 0, (1, 3)),
        (8, 1, 0.0, 0, (12, 1)),
    ],
)
def test_steps_come_from_the_number_of_clips(
    batch_size, accumulate, epochs, given, expected
):
    config = ConfigDict(
        {
            "batch_size": batch_size,
            "epochs": epochs,
            "steps": given,
            "compute": {"accumulate": accumulate},
        }
    )
    assert loop.steps(config, 100) == expected


def test_keys_differ_by_step_and_purpose_and_come_again():
    def data(*args):
        return tuple(np.asarray(jax.random.key_data(loop.key(*args))).tolist())

    keys = {data(s, i, p) for s in (0, 1) for i in (0, 1) for p in ("mask", "flip")}
    assert len(keys) == 8
    traced = jax.jit(lambda i: loop.key(jax.random.key(1), i, "mask"))(jnp.int32(5))
    assert tuple(jax.random.key_data(traced).tolist()) == data(1, 5, "mask")


# Batches and the clock.


class Time:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_clock_leaves_pauses_out_and_tells_the_wait():
    now = Time()
    clock = loop.Clock(clips_per_step=8, step=10, total_steps=110, now=now)
    now.now += 3.0
    with clock.waiting():
        now.now += 1.0
    with clock.pause():
        now.now += 100.0
    assert clock.report(20) == {
        "clips_per_second": 20.0,
        "wait_share": 0.25,
        "seconds_per_step": 0.4,
        "seconds_left": 36.0,
    }
    now.now += 5.0
    assert clock.report(30)["clips_per_second"] == 16.0
    with clock.pause():  # what is left has such pauses too, 10 s for each 10 steps
        now.now += 10.0
    now.now += 5.0
    assert clock.report(40)["seconds_left"] == 70 * (5.0 + 15.0) / 20
    assert clock.report(110)["seconds_left"] == 0.0


def test_prefetch_keeps_order_and_puts_each_batch():
    threads = set()

    def put(x):
        threads.add(threading.current_thread().name)
        return x * 10

    assert list(loop.prefetch(range(20), put)) == [10 * i for i in range(20)]
    assert threads == {"prefetch"}


def test_prefetch_reads_ahead_by_its_depth_and_stops_when_closed():
    read = []

    def source():
        for i in range(1000):
            read.append(i)
            yield i

    batches = loop.prefetch(source(), lambda x: x, depth=3)
    assert next(batches) == 0
    time.sleep(0.3)
    assert len(read) == 1 + 3 + 1  # taken, waiting, and one in the reader's hand
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    assert len(read) <= 6


def test_prefetch_raises_the_reader_s_error_after_the_good_batches():
    def source():
        yield 1
        raise OSError("record 7 is damaged")

    batches = loop.prefetch(source(), lambda x: x)
    assert next(batches) == 1
    with pytest.raises(OSError, match="record 7"):
        next(batches)


@pytest.mark.parametrize(("slow", "least", "most"), [(0.05, 0.6, 1.0), (0.0, 0.0, 0.2)])
def test_wait_is_the_time_lost_for_lack_of_data(slow, least, most):
    def source():
        while True:
            time.sleep(slow)
            yield 1

    clock = loop.Clock(1, 0, 10)
    batches = loop.prefetch(source(), lambda x: x, clock=clock)
    for _ in range(10):
        next(batches)
        time.sleep(0.01)
    batches.close()
    assert least <= clock.report(10)["wait_share"] <= most


# Logs.


def lines_of(path):
    return [json.loads(line) for line in (path / loop.METRICS).read_text().splitlines()]


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path):
    tf = pytest.importorskip("tensorflow")
    writer = loop.MetricWriter(tmp_path)
    writer.write(10, {"loss": jnp.float32(0.5), "lr": 1e-3})
    assert lines_of(tmp_path) == [{"step": 10, "loss": 0.5, "lr": 1e-3}]
    writer.images(10, {"faces": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            found[value.tag] = event.step, tf.make_ndarray(value.tensor)
    assert found["loss"] == (10, 0.5)
    assert tf.image.decode_png(found["faces"][1][2]).shape == (4, 6, 3)


def test_without_clu_the_jsonl_goes_on_and_the_log_says_so_once(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "clu", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with caplog.at_level(logging.WARNING):
        writer = loop.MetricWriter(tmp_path)
        writer.write(1, {"loss": 1.0})
        writer.images(1, {"x": np.zeros((2, 2, 3), np.uint8)})
        writer.write(2, {"loss": 2.0})
        writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    assert caplog.text.count("No TensorBoard") == 1


def test_importing_the_loop_imports_no_tensorflow():
    code = """
import sys, av_mae.loop, av_mae.checkpoints
print("tensorflow" in sys.modules, "clu" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False False\n", done.stderr


def test_cut_metrics_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / loop.METRICS
    loop.cut_metrics(tmp_path, 5)  # nothing there: nothing to do
    good = '{"step": 1, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n'
    path.write_text(good + '{"step": 6, "loss": 0.5}\n{"step": 3, "lo')
    loop.cut_metrics(tmp_path, 5)
    assert path.read_text() == good
    assert not (tmp_path / loop.BEFORE).exists()
    loop.cut_metrics(tmp_path, -1)
    assert path.read_text() == ""
    more = '{"step": 1, "loss": 9.0}\n'
    path.write_text(more)
    loop.cut_metrics(tmp_path, 0)  # a second time: nothing is lost
    assert (tmp_path / loop.BEFORE).read_text() == good + more


def test_parameter_table():
    table = loop.parameter_table(
        {"head": {"kernel": jnp.zeros((30, 50)), "bias": jnp.zeros(50)}}
    )
    assert [line.split() for line in table.splitlines()] == [
        ["parameter", "shape", "elements"],
        ["head/bias", "(50,)", "50"],
        ["head/kernel", "(30,", "50)", "1,500"],
        ["total", "1,550"],
    ]


def test_progress_line():
    timing = {"clips_per_second": 812.3, "wait_share": 0.021, "seconds_left": 11520.0}
    losses = {"rgb": 0.41, "spectrogram": 0.73}
    assert loop.progress(1200, 48000, losses, 3e-4, timing) == (
        "step 1200/48000  loss rgb 0.41 spectrogram 0.73  lr 3.0e-04  812 clips/s  "
        "wait 2%  left 3 h 12 m"
    )
    slow = timing | {"clips_per_second": 1.234}
    assert "  1.23 clips/s  " in loop.progress(1, 2, losses, 1e-4, slow)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 m 0 s"), (3599, "59 m 59 s"), (187200, "2 d 4 h")],
)
def test_duration(seconds, text):
    assert loop.duration(seconds) == text


def test_provenance_names_versions_and_commit():
    facts = loop.provenance()
    assert facts["jax"] == jax.__version__
    assert len(facts["git_commit"].removesuffix("-dirty")) in (0, 40)


# Stopping.


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    old = signal.getsignal(signal.SIGTERM)
    preemption = loop.Preemption()
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2)
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) is old


AGREE = """
import os, signal, sys
from av_mae import loop, parallel
process = int(sys.argv[2])
parallel.initialize(f"localhost:{sys.argv[1]}", 2, process)
preemption = loop.Preemption(every=4)
for step in range(1, 30):
    if process == 1 and step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    if preemption.reached(step):
        break
print("stopped at", step)
"""


def test_processes_stop_at_the_same_step():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(port), str(process)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert out.endswith("stopped at 8\n"), err[-2000:]


def test_non_finite_loss_says_where_and_what_to_try():
    loop.check_finite({"loss": jnp.float32(1.0), "lr": 0.1}, 3, None)
    with pytest.raises(TrainingError, match="loss/rgb is nan at step 7") as error:
        loop.check_finite({"loss/rgb": jnp.float32(jnp.nan)}, 7, 5, "runs/a")
    text = str(error.value)
    assert "step 5 in runs/a" in text
    for hint in ("learning_rate", "compute.dtype=float32", "clip_norm"):
        assert hint in text
    with pytest.raises(TrainingError, match="inf at step 1; there is no checkpoint"):
        loop.check_finite({"loss": float("inf")}, 1, None)


def test_clips_of_a_bad_batch_are_noted_once(tmp_path):
    for _ in range(2):  # the second time as a run that went on from before
        loop.note_clips(tmp_path, 7, {"loss": math.nan}, ["a", "b"])
        loop.note_clips(tmp_path, 8, {"loss": math.inf}, ["c"])
    text = (tmp_path / "nonfinite.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 7, "numbers": {"loss": "nan"}, "clips": ["a", "b"]},
        {"step": 8, "numbers": {"loss": "inf"}, "clips": ["c"]},
    ]


def test_spikes_are_told_and_noise_is_not():
    draw = np.random.default_rng(0)
    falling = 5 * np.exp(-np.arange(2000) / 300) + 1 + draw.normal(0, 0.05, 2000)
    spikes = loop.Spikes()
    assert not any(spikes.see(loss) for loss in falling)
    assert "4 over a running mean of 1." in spikes.see(4.0)
    assert spikes.see(math.nan) == "" and not spikes.see(1.1)
    # A new level is a spike for a while only.
    told = [bool(spikes.see(2 + x)) for x in draw.normal(0, 0.05, 300)]
    assert told[0] and not any(told[150:])
    # The first losses fill the averages.
    assert not any(loop.Spikes().see(x) for x in (1.0, 1.0, 100.0))
