"""Python first: one call opens a workdir, a step, or an exported folder."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic
import toy
import toy_models
from ml_collections import ConfigDict

import av_mae
from av_mae import CheckpointError, ConfigError, api, clips, export, finetune
from data import MediaError, pipeline, prepare


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """(workdir of a finetuning run of 2 steps, its config, its data)."""
    workdir = tmp_path_factory.mktemp("finetune")
    config = synthetic.tiny("digits/finetune", steps=2)
    data = {
        name: synthetic.Dataset(config, first=first)
        for name, first in (("train", 0), ("eval", 1000))
    }
    finetune.train(config, data, workdir)
    return workdir, config, data


def test_a_workdir_gives_the_logits_of_the_evaluation(finetuned):
    workdir, config, data = finetuned
    model = av_mae.load(workdir)
    assert model.labels == list(data["eval"].label_names)
    assert model.classes == len(model.labels)
    wanted, _ = finetune.predict_all(config, data["eval"], workdir)
    found = []
    for batch in data["eval"].evaluate(config.eval.batch_size):
        found.append(model.logits(batch)[batch["valid"]])
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5, atol=1e-5)
    step = av_mae.load(workdir / "checkpoints" / "2")
    jax.tree.map(np.testing.assert_array_equal, step.params, model.params)


def test_what_was_exported_is_opened_too(finetuned, tmp_path):
    workdir, config, data = finetuned
    export.export(workdir, "safetensors", tmp_path / "out")
    model, original = av_mae.load(tmp_path / "out"), av_mae.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, model.params, original.params)
    assert model.labels == original.labels
    batch = next(data["eval"].evaluate(config.eval.batch_size))
    np.testing.assert_array_equal(model.logits(batch), original.logits(batch))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips: tone.mp4, other.mp4, silent.mp4 (another's picture alone), long.mp4."""
    folder = tmp_path_factory.mktemp("clips")
    toy.write_clip(folder / "tone.mp4", 1)
    toy.write_clip(folder / "other.mp4", 4)
    toy.write_clip(folder / "silent.mp4", 1, sound=False)
    toy.write_clip(folder / "long.mp4", 2, seconds=3.0)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of random weights."""
    config = toy_models.config("finetune", data__views=2)
    return av_mae.load(toy_models.write(tmp_path_factory.mktemp("c"), config))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An autoencoder of random weights."""
    config = toy_models.config("pretrain", mask__spectrogram__ratio=0.5)
    return av_mae.load(toy_models.write(tmp_path_factory.mktemp("a"), config))


class Compilations:
    """How many programs XLA compiled since the last look."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, name, *_, **__):
        self.count += "backend_compile" in name or "cache_retrieval" in name

    def since(self):
        count, self.count = self.count, 0
        return count


@pytest.fixture(scope="module")
def compilations():
    return Compilations()


def test_a_file_is_predicted_as_its_record_is_evaluated(tmp_path):
    """The user's way: prepare, evaluate the records; and the files by the API."""
    toy.write_folder(tmp_path / "clips", 4, silent=[2])
    prepare.prepare(tmp_path / "clips", tmp_path / "out", split={"test": 1.0}, jobs=1)
    config = toy_models.config("finetune", data__views=2, data__crops=3)
    config.data.dir, config.data.limit = str(tmp_path / "out"), 0
    config.eval.split, config.eval.batch_size = "test", 2
    workdir = toy_models.write(tmp_path / "run", config)
    dataset = pipeline.load(config.data, "test", label="class")
    wanted, _ = finetune.predict_all(config, dataset, workdir)
    model = av_mae.load(workdir)
    opened = pipeline.open_records(config.data.dir, "test")
    for i, name in enumerate(dataset.ids):
        record = opened.record(i)
        sound = record.waveform() if record.has_audio else None
        frames = record.frames(range(record.num_frames))
        exact = model.predict(clips.Clip(frames, record.fps, sound))
        np.testing.assert_allclose(exact.logits, wanted[i], rtol=1e-4, atol=1e-5)
        found = model.predict(tmp_path / "clips" / name)
        spread = np.ptp(wanted, axis=0).max()
        assert np.abs(found.logits - wanted[i]).max() < 0.1 * spread  # H.264 between
        assert found.used == (("rgb", "spectrogram") if record.has_audio else ("rgb",))


def test_programs_are_compiled_once_for_a_shape(
    folder, classifier, autoencoder, compilations
):
    tone, other = (classifier.read(folder / f"{x}.mp4") for x in ("tone", "other"))
    calls = [
        lambda clip: classifier.predict(clip),
        lambda clip: classifier.predict([clip, other, tone]),
        lambda clip: classifier.features(clip, layer=0),
        lambda clip: autoencoder.features([clip, tone]),
        lambda clip: autoencoder.reconstruct(clip, ratio=0.75, seed=len(clip.sound)),
        lambda clip: classifier.attention(clip),
    ]
    for call in calls:
        call(tone)
        assert compilations.since() > 0
        call(other)
        assert compilations.since() == 0
    # Other subsets of modalities, other lengths of a list: nothing new.
    classifier.predict(other, modalities=("rgb",))
    classifier.predict([tone] * 11)
    assert compilations.since() == 0


def test_predictions_say_what_they_are_from(folder, classifier):
    found = classifier.predict(folder / "tone.mp4")
    labels, probabilities = zip(*found, strict=True)
    assert set(labels) == set(toy_models.LABELS) and abs(sum(probabilities) - 1) < 1e-6
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert found.used == ("rgb", "spectrogram") and found.start == 0.0
    assert len(classifier.predict(folder / "tone.mp4", top=1)) == 1
    both, silent = classifier.predict([folder / "tone.mp4", folder / "silent.mp4"])
    np.testing.assert_allclose(both.logits, found.logits, atol=1e-5)
    assert silent.used == ("rgb",)
    # The same picture without its sound: what it said does not reach the answer.
    rgb = classifier.predict(folder / "tone.mp4", modalities=("rgb",))
    assert rgb.used == ("rgb",)
    np.testing.assert_allclose(rgb.logits, silent.logits, atol=0.02)
    assert np.abs(rgb.logits - found.logits).max() > 1e-3
    with pytest.raises(ConfigError, match="silent.mp4 has no sound"):
        classifier.predict(folder / "silent.mp4", modalities=("spectrogram",))


@pytest.mark.slow
def test_several_labels_have_probabilities_of_their_own(folder, classifier):
    config = classifier.config.copy_and_resolve_references()
    config.objective.kind = "sigmoid"
    model = api.Model(config, classifier.params, [])
    found = model.predict(folder / "tone.mp4")
    for name, probability in found:
        logit = found.logits[int(name.removeprefix("class "))]
        assert abs(probability - 1 / (1 + np.exp(-logit))) < 1e-6


def test_long_clips_are_seen_in_windows(folder, classifier):
    path = folder / "long.mp4"
    each = classifier.predict(path, every=0.6, average=False)
    assert [one.start for one in each[:3]] == [0.0, 0.6, 1.2]
    assert each[-1].end == 3.0 and each[0].end == classifier.window_seconds
    mean = classifier.predict(classifier.read(path), every=0.6)
    np.testing.assert_allclose(
        mean.logits, np.mean([one.logits for one in each], axis=0), atol=1e-5
    )
    assert (mean.start, mean.end) == (0.0, 3.0)
    config = classifier.config.copy_and_resolve_references()
    config.eval.average = "probabilities"
    model = api.Model(config, classifier.params, classifier.labels)
    found = model.predict(path, every=0.6)
    for name, probability in found:
        wanted = np.mean([dict(one)[name] for one in each])
        assert abs(probability - wanted) < 1e-5
    # A window is what a clip cut out of the file would be, with one view.
    config = classifier.config.copy_and_resolve_references()
    config.data.views = 1
    model = api.Model(config, classifier.params, classifier.labels)
    cut = model.read(path).cut(0.6, 0.6 + model.window_seconds)
    np.testing.assert_allclose(model.predict(cut).logits, each[1].logits, atol=1e-5)


def test_features_of_all_layers_and_pools(folder, classifier, autoencoder):
    tone, silent = folder / "tone.mp4", folder / "silent.mp4"
    for model in (classifier, autoencoder):
        found = model.features(tone)
        assert list(found) == ["rgb", "spectrogram", "joint"]
        np.testing.assert_allclose(
            found["joint"], (found["rgb"] + found["spectrogram"]) / 2, atol=1e-6
        )
        inner = model.features(tone, layer=0)
        assert np.abs(inner["rgb"] - found["rgb"]).max() > 1e-3
        only = model.features(silent)
        assert list(only) == ["rgb", "joint"] and only.used == ("rgb",)
        np.testing.assert_array_equal(only["rgb"], only["joint"])
    tokens = autoencoder.features(tone, pool="none")
    mean = autoencoder.features(tone)
    for m in ("rgb", "spectrogram"):
        np.testing.assert_allclose(tokens[m].mean(axis=0), mean[m], atol=1e-5)
    count = len(tokens["rgb"]) + len(tokens["spectrogram"])
    assert tokens["joint"].shape == (count, 16)
    # What the classifier's head sees of each modality is the mean of its tokens.
    one = api.Model(_one_view(classifier.config), classifier.params, classifier.labels)
    head = one.params["head"]
    wanted = one.features(tone)["joint"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(one.predict(tone).logits, wanted, atol=1e-4)


def _one_view(config):
    config = config.copy_and_resolve_references()
    config.data.views = 1
    return config


@pytest.mark.slow
def test_a_stream_of_features_goes_on_after_bad_clips(folder, classifier):
    told, nowhere = [], folder / "nowhere.mp4"
    sources = [folder / "tone.mp4", nowhere, folder / "silent.mp4"]
    found = classifier.stream_features(
        iter(sources),
        every=0.6,
        modalities=("spectrogram",),
        failed=lambda number, error: told.append((number, str(error))),
    )
    numbers = [number for number, windows in found if len(windows) > 1]
    assert numbers == [0] and [number for number, _ in told] == [1, 2]
    assert "nowhere.mp4" in told[0][1] and "has no sound" in told[1][1]
    with pytest.raises(MediaError, match="nowhere"):
        list(classifier.stream_features([nowhere]))


def test_attention_is_shared_out(folder, classifier, autoencoder):
    for model in (classifier, autoencoder):
        found = model.attention(folder / "tone.mp4")
        assert found.used == ("rgb", "spectrogram")
        assert found.rollout["joint"]["rgb"].shape == (2, 2, 2)
        for maps in (found.rollout, found.last):
            for output in ("rgb", "spectrogram", "joint"):
                total = sum(x.sum() for x in maps[output].values())
                assert 0 < total <= 1 + 1e-5
        one = model.attention(folder / "tone.mp4", modalities=("spectrogram",))
        assert list(one.rollout) == ["spectrogram", "joint"] and one.frames is None
    # Without bottlenecks nothing is lost.
    assert abs(sum(found.shares().values()) - 1) < 1e-5


def test_windows_and_lists_of_what_has_one_clip(folder, autoencoder):
    """Of windows and lists each is what it is alone."""
    path = folder / "tone.mp4"
    seconds = autoencoder.window_seconds
    starts = [window.start for window in autoencoder.windows(path, 0.4)]
    assert len(starts) > 1
    for call, part in (
        (autoencoder.attention, lambda x: x.rollout["joint"]["rgb"]),
        (autoencoder.reconstruct, lambda x: x.errors["rgb"]),
    ):
        windows, (alone,) = call(path, every=0.4), call([path])
        np.testing.assert_array_equal(part(alone), part(call(path)))
        cuts = [autoencoder.read(path).cut(x, x + seconds) for x in starts]
        for window, cut in zip(windows, cuts, strict=True):
            np.testing.assert_allclose(part(window), part(call(cut)), atol=1e-5)
        (several,) = call([path], every=0.4)
        np.testing.assert_array_equal(part(several[0]), part(windows[0]))


def test_trainers_are_told_apart(folder, classifier, autoencoder):
    assert type(autoencoder.module).__name__ == "Autoencoder"
    for call in (lambda: autoencoder.logits({}), lambda: autoencoder.predict("x.mp4")):
        with pytest.raises(ConfigError, match="an autoencoder .* has no classes"):
            call()
    with pytest.raises(ConfigError, match="a classifier .* has no decoder"):
        classifier.reconstruct(folder / "tone.mp4")


@pytest.mark.slow
def test_log_mels_of_records_are_computed_for_files(folder, classifier, caplog):
    config = classifier.config.copy_and_resolve_references()
    config.spectrogram.preset = "precomputed"
    model = api.Model(config, classifier.params, classifier.labels)
    found = model.predict(folder / "tone.mp4")
    assert "computed by the preset 'mbt'" in caplog.text
    wanted = classifier.predict(folder / "tone.mp4")
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)


def test_several_heads_are_counted():
    heads = {"head_verb": 3, "head_noun": 5, "head_norm": 16}
    params = {name: {"bias": np.zeros(n)} for name, n in heads.items()}
    assert api.Model(ConfigDict(), params, []).classes == {"verb": 3, "noun": 5}


@pytest.mark.slow
def test_several_heads_are_named(folder, tmp_path):
    labels = {"verb": ["cut", "stir"], "noun": ["egg", "pan", "oil"]}
    config = toy_models.config("finetune")
    config.model.label_heads = (("verb", 0), ("noun", 0))
    model = av_mae.load(toy_models.write(tmp_path, config, labels))
    found = model.predict(folder / "tone.mp4", top=2)
    assert set(found) == {"verb", "noun"} and len(found["noun"]) == 2
    assert {name for name, _ in found["verb"]} == {"cut", "stir"}
    assert found["noun"].used == ("rgb", "spectrogram")


def test_nothing_there_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        av_mae.load(tmp_path / "nowhere")


def test_importing_the_package_imports_no_jax():
    code = "import sys, av_mae; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(av_mae, "lode")  # noqa: B009
