"""A local page: drop a video; see what it shows, its reconstruction, where one looks.

    pip install -e ".[serve]"
    python -m av_mae.serve --classifier runs/finetune --autoencoder runs/pretrain
    python -m av_mae.serve --classifier runs/finetune --port 7861

Either model may be left out, and its part of the page with it. The page is for this
machine alone (127.0.0.1) unless --host says otherwise; it has no password, so think
before you open it to a network. What may be uploaded is limited in type, size and
length, and is looked at before any model sees it; files are removed after a day.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from av_mae import UserError, api, attend, commandline, reconstruct
from data import DataError, media

TYPES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".wav", ".flac", ".mp3", ".ogg")
DAY = 24 * 3600  # seconds


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be uploaded: at most so many megabytes and seconds."""

    megabytes: float = 100.0
    seconds: float = 120.0


def check(path: str | Path | None, limits: Limits) -> Path:
    """The path, if it is a media file within the limits; else UserError or MediaError.

    The name's ending has to be one of TYPES, and the content has to open as media.
    """
    if not path:
        raise UserError("drop a file first.")
    path = Path(path)
    if path.suffix.lower() not in TYPES:
        raise UserError(f"{path.name} is none of {', '.join(TYPES)}.")
    size = path.stat().st_size / 1e6
    if size > limits.megabytes:
        raise UserError(
            f"{path.name} has {size:.0f} MB; at most {limits.megabytes:g} are taken."
        )
    seconds = media.length(path)
    if seconds > limits.seconds:
        raise UserError(
            f"{path.name} lasts {seconds:.0f} s; at most {limits.seconds:g} are taken."
        )
    return path


@dataclasses.dataclass
class Desk:
    """What the page asks for; each takes the path of an uploaded file.

    classifier, autoencoder: models of `av_mae.load`, or None; folder: where files for
    the browser are written.
    """

    classifier: api.Model | None
    autoencoder: api.Model | None
    limits: Limits
    folder: Path

    def predict(self, path, top: int = 5) -> dict[str, float]:
        """{label: probability} of the likeliest classes."""
        found = self.classifier.predict(self._clip(self.classifier, path), top=top)
        if not isinstance(found, list):
            return {f"{h}: {name}": p for h, each in found.items() for name, p in each}
        return dict(found)

    def attend(self, path) -> tuple[str, str]:
        """(a picture, words): which parts the answer comes from."""
        model = self.classifier or self.autoencoder
        found = model.attention(self._clip(model, path))
        name, fps = Path(path).name, _rate(model)
        files = attend.write(found, self._new(), "rollout", name, fps)
        return str(files[0]), attend.shares_text(found)

    def reconstruct(self, path, ratio: float = 0.9, seed: int = 0) -> tuple[str, str]:
        """(a film with sound, words): most of the clip masked, and guessed."""
        model = self.autoencoder
        clip = self._clip(model, path)
        found = model.reconstruct(clip, ratio=float(ratio), seed=int(seed))
        shown = [reconstruct.Shown("model", found, _rate(model))]
        caption = reconstruct.caption_of(shown, Path(path).name)
        files = reconstruct.write(shown, self._new(), caption)
        film = next(file for file in files if file.suffix == ".mp4")
        return str(film), reconstruct.table(shown)

    def _clip(self, model: api.Model, path):
        """The file as a clip; no more of it than is allowed, whatever it claims."""
        return model.read(check(path, self.limits), None, self.limits.seconds)

    def _new(self) -> Path:
        """A folder for the files of one answer; those of yesterday are removed."""
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another answer removes it too
                if time.time() - path.stat().st_mtime > DAY:
                    shutil.rmtree(path)
        return Path(tempfile.mkdtemp(dir=self.folder))


def _rate(model: api.Model) -> float:
    """Of the frames that it sees, a second."""
    return model.config.data.fps / model.config.data.stride


def page(desk: Desk):
    """The Gradio page (`gradio.Blocks`); UserError where Gradio is not installed."""
    gradio = library()

    def told(function):
        """The function, whose errors the page shows as a sentence."""

        def call(*arguments):
            try:
                return function(*arguments)
            except (UserError, DataError) as error:
                raise gradio.Error(str(error)) from error

        return call

    limits = desk.limits
    with gradio.Blocks(title="av_mae", delete_cache=(DAY, DAY)) as blocks:
        gradio.Markdown(
            f"# av_mae\nA clip of at most {limits.megabytes:g} MB and "
            f"{limits.seconds:g} s ({', '.join(TYPES)}). It stays on this machine."
        )
        file = gradio.File(label="clip", file_types=list(TYPES), type="filepath")
        if desk.classifier:
            button, label = gradio.Button("What is it?"), gradio.Label(label="answer")
            button.click(told(desk.predict), file, label, api_name="predict")
        if desk.autoencoder:
            ratio = gradio.Slider(0.1, 0.95, 0.9, step=0.05, label="share masked")
            seed = gradio.Number(0, label="seed of the mask", precision=0)
            button = gradio.Button("Mask and reconstruct")
            film, words = gradio.Video(label="reconstruction"), gradio.Textbox()
            wanted = [file, ratio, seed]
            call = told(desk.reconstruct)
            button.click(call, wanted, [film, words], api_name="reconstruct")
        button = gradio.Button("Where does it look, when does it listen?")
        image, words = gradio.Image(label="attention"), gradio.Textbox()
        button.click(told(desk.attend), file, [image, words], api_name="attend")
    return blocks.queue(max_size=8)


def library() -> Any:
    """Gradio; UserError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # all stays here
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f'the page needs Gradio ({error}): pip install -e ".[serve]".'
        ) from error
    return gradio


def desk_of(classifier: str, autoencoder: str, limits: Limits, folder: Path) -> Desk:
    """The models loaded, each where its path is given and of the right kind."""
    models = {"finetune": None, "pretrain": None}
    for field, path in (("finetune", classifier), ("pretrain", autoencoder)):
        if not path:
            continue
        models[field] = api.load(path)
        if models[field].config.trainer != field:
            option = "--autoencoder" if field == "finetune" else "--classifier"
            raise UserError(f"{path} is of the other kind: give it as {option}.")
    if not any(models.values()):
        raise UserError("give --classifier, --autoencoder, or both.")
    return Desk(models["finetune"], models["pretrain"], limits, folder)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--classifier", default="", help="a finetuned model")
    parser.add_argument("--autoencoder", default="", help="a pretrained model")
    parser.add_argument("--host", default="127.0.0.1", help="who may come: an address")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--megabytes", type=float, default=Limits.megabytes)
    parser.add_argument("--seconds", type=float, default=Limits.seconds)
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    limits = Limits(given.megabytes, given.seconds)
    with tempfile.TemporaryDirectory(prefix="av_mae_serve_") as folder:
        try:
            library()
            models = given.classifier, given.autoencoder
            blocks = page(desk_of(*models, limits, Path(folder)))
        except (UserError, DataError) as error:
            commandline.stop(error)
        blocks.launch(
            server_name=given.host,
            server_port=given.port,
            max_file_size=round(1e6 * given.megabytes),
            share=False,
        )


if __name__ == "__main__":
    sys.exit(main())
