"""The local page: what it takes, what its functions give, and that it starts."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import toy

from av_mae import UserError, api, serve
from data import MediaError

GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="Gradio (the extra `serve`) is not installed",
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "clip.mp4"
    toy.write_clip(path, 0)
    return path


def test_a_clip_within_the_limits_is_taken(clip):
    assert serve.check(str(clip), serve.Limits()) == clip


def test_type_size_and_length_are_limited(clip, tmp_path):
    with pytest.raises(UserError, match="drop a file first"):
        serve.check(None, serve.Limits())
    with pytest.raises(UserError, match="at most 0.001 are taken"):
        serve.check(clip, serve.Limits(megabytes=0.001))
    with pytest.raises(UserError, match="lasts .* s; at most 1 are taken"):
        serve.check(clip, serve.Limits(seconds=1.0))
    program = tmp_path / "clip.py"
    program.write_bytes(clip.read_bytes())
    with pytest.raises(UserError, match="clip.py is none of .mp4"):
        serve.check(program, serve.Limits())
    fake = tmp_path / "page.mp4"
    fake.write_text("<html>no video at all</html>")
    with pytest.raises(MediaError, match="page.mp4"):
        serve.check(fake, serve.Limits())


def test_without_models_or_gradio_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give --classifier, --autoencoder, or both"):
        serve.desk_of("", "", serve.Limits(), tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'pip install -e ".\[serve\]"'):
        serve.library()


def test_files_of_yesterday_are_removed(tmp_path):
    desk = serve.Desk(None, None, serve.Limits(), tmp_path)
    old, new = desk._new(), desk._new()
    (old / "film.mp4").write_text("x")
    os.utime(old, (0, time.time() - serve.DAY - 60))
    latest = desk._new()
    assert set(tmp_path.iterdir()) == {new, latest}


@pytest.mark.slow
def test_functions_without_a_server(toy_run, clip, tmp_path):
    models = str(toy_run / "finetune"), str(toy_run / "pretrain")
    desk = serve.desk_of(*models, serve.Limits(), tmp_path)
    answer = desk.predict(str(clip))
    assert set(answer) == {"bell", "drum"} and sum(answer.values()) == pytest.approx(1)
    expected = dict(api.load(models[0]).predict(clip))
    assert answer == pytest.approx(expected)
    film, words = desk.reconstruct(str(clip), 0.75, 1)
    assert film.endswith(".mp4") and "rgb" in words
    picture, words = desk.attend(str(clip))
    assert picture.endswith(".png") and "rgb" in words
    assert {film, picture} <= {str(p) for p in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="of the other kind: give it as --classifier"):
        serve.desk_of("", models[0], serve.Limits(), tmp_path)


@GRADIO
@pytest.mark.slow
def test_the_page_starts_for_this_machine_alone(toy_run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(toy_run / "finetune")
    command = ("-m", "av_mae.serve", "--classifier", model, "--port", port)
    process = toy.start(*command, GRADIO_ANALYTICS_ENABLED="False")
    try:
        for line in process.stdout:
            if f"http://127.0.0.1:{port}" in line:
                break
        address = f"http://127.0.0.1:{port}/config"
        text = urllib.request.urlopen(address, timeout=60).read().decode()
        assert "What is it?" in text and "Mask and reconstruct" not in text
        listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True)
        if listening.returncode == 0:
            assert f"0.0.0.0:{port}" not in listening.stdout
    finally:
        process.terminate()
        process.wait(timeout=60)
