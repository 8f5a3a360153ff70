"""A SavedModel's front end is found inside it and compared with ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from av_mae import CheckpointError, ConfigError, convert, frontend, spectrogram

ROOT = Path(__file__).parents[1]


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "av_mae.convert", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment,
        capture_output=True,
        text=True,
    )


def test_sounds():
    sounds = frontend.sounds(16000)
    assert sounds.shape == (8, 16000) and sounds.dtype == np.float32
    assert np.abs(sounds).max() <= 1 and np.abs(sounds).max(axis=1).min() > 1e-4
    np.testing.assert_array_equal(sounds, frontend.sounds(16000))


def test_a_tensor_that_is_a_preset_is_met():
    sound = frontend.sounds(1600)
    values = np.asarray(spectrogram.log_mel(sound, "kaldi"))
    for same in (values, values[..., 0], values[..., 0].swapaxes(1, 2)):
        errors = dict(frontend._errors("x", sound, same))
        assert errors["kaldi"].worst < 0.01 < 1 < errors["mbt"].mean
        assert errors["kaldi"].tensor == "x" and "mfcc" not in errors


def test_what_looks_like_mels():
    like = frontend._like_mels
    assert like((8, 100, 128, 1), 16000) and like((None, 128, 100), 16000)
    assert like((None, None, None), 16000)
    assert not like((8, 100, 128, 3), 16000)
    assert not like((8, 98, 128), 16000) and not like((8, 100, 64), 16000)


def test_the_best_is_stored_if_it_is_the_same(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "presets.json"
    monkeypatch.setenv("AV_MAE_PRESETS", str(path))
    near = frontend.Error("mbt", 1e-5, 0.009, "f/Log:0")
    far = frontend.Error("kaldi", 1.0, 9.0, "f/Log:0")
    assert frontend.store([far, near], "model") is None and not path.exists()
    assert frontend.store([near, far], "model") == path
    entry = json.loads(path.read_text())["scenic"]
    assert entry == {"same_as": "mbt", "source": "model", "error": 0.009}
    assert spectrogram.found_presets() == {"scenic": spectrogram.PRESETS["mbt"]}
    # Another process has the preset, and a config that names it builds.
    code = (
        "from av_mae import inputs, spectrogram; from av_mae.importers import template;"
        "c = template('pretrain'); c.spectrogram.preset = 'scenic';"
        "print(inputs.layouts(c)['spectrogram'].n, 'scenic' in spectrogram.PRESETS)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == "496 True", run.stderr
    path.write_text("{")
    with pytest.raises(ConfigError, match="presets.json cannot be written"):
        frontend.store([near], "model")


def test_it_runs_nothing_without_trust(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(["--frontend", str(tmp_path)])
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == ""
    assert "a SavedModel is a program" in told.err and "--trust" in told.err


# TensorFlow takes seconds to import.


def front_end(tf, window: int, offset: float):
    """Waveform [b s 1] to log-mel [b t 128 1] in TensorFlow's words."""

    def log_mel(x):
        x = tf.pad(tf.squeeze(x, -1), [[0, 0], [120, 400]])
        frames = tf.signal.frame(x, window, 160)[:, :100]
        frames *= tf.signal.hann_window(window)
        power = tf.abs(tf.signal.rfft(frames, [1024])) ** 2
        mels = tf.signal.linear_to_mel_weight_matrix(128, 513, 16000, 20.0, 8000.0)
        return tf.math.log(tf.tensordot(power, mels, 1) + offset)[..., None]

    return log_mel


def saved_model(path: Path, log_mel, tf):
    """A model as the released ones: its front end inside, normalised, then weights."""

    class Model(tf.Module):
        def __init__(self):
            self.head = tf.Variable(tf.random.normal([100 * 128, 5]))

        @tf.function(input_signature=[tf.TensorSpec([None, 16000, 1], tf.float32)])
        def front(self, x):
            return log_mel(x)

        @tf.function(
            input_signature=[
                {
                    "waveform": tf.TensorSpec([None, 16000, 1], tf.float32),
                    "rgb": tf.TensorSpec([None, 4, 8, 8, 3], tf.float32),
                }
            ]
        )
        def __call__(self, x):
            rows = (self.front(x["waveform"]) - 1.102) / 2.762
            logits = tf.reshape(rows, [-1, 100 * 128]) @ self.head
            return logits + tf.reduce_mean(x["rgb"])

    tf.saved_model.save(Model(), str(path))


@pytest.mark.slow
def test_the_front_end_of_a_saved_model(tmp_path):
    tf = pytest.importorskip("tensorflow")
    presets = tmp_path / "presets.json"
    saved_model(tmp_path / "same", front_end(tf, 400, 1e-6), tf)
    run = command(
        *("--frontend", tmp_path / "same", "--trust"), AV_MAE_PRESETS=str(presets)
    )
    assert run.returncode == 0, run.stderr
    first, *_, last = run.stdout.splitlines()
    assert first.startswith("mbt ") and "mean error 0.000" in first
    assert last == f"preset `scenic` is now mbt on this machine ({presets})."
    assert json.loads(presets.read_text())["scenic"]["same_as"] == "mbt"
    presets.unlink()
    saved_model(tmp_path / "other", front_end(tf, 512, 1e-3), tf)
    run = command(
        *("--frontend", tmp_path / "other", "--trust"), AV_MAE_PRESETS=str(presets)
    )
    assert run.returncode == 0, run.stderr
    assert "no preset is the same" in run.stdout and not presets.exists()


@pytest.mark.slow
def test_what_has_no_front_end(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(CheckpointError, match="saved_model.pb cannot be read"):
        frontend.compare(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="is no SavedModel"):
        frontend.compare(tmp_path)
    saved_model(tmp_path / "none", lambda x: x[:, :12800, 0], tf)
    with pytest.raises(CheckpointError, match="no tensor that follows from the wave"):
        frontend.compare(tmp_path / "none")
