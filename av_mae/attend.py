"""Shows where a model looks, and when it listens: attention roll-out over a clip.

    python -m av_mae.attend runs/finetune concert.mp4 --out pictures
    python -m av_mae.attend runs/finetune concert.mp4 --out pictures --start 12 \\
        --modalities rgb --layers last

Writes into DIR

    attention.png    for the outputs of picture, of sound and of both: what share comes
                     from each patch of the frames and of the spectrogram, and when
    attention.gif    the frames under the shares of all outputs together
    attention.json   the shares themselves, on the grids of tokens

and prints how much comes from picture, from sound, and from tokens of the model's own
(bottlenecks, CLS). Colours go from a row's least share (black) to its largest (light
yellow); `when` begins at zero. `rollout` goes through all layers (Abnar &
Zuidema 2020), `last` is the last layer's attention alone. Attention says where a model
takes its numbers from, not why it decides.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from av_mae import UserError, api, commandline, visualise
from av_mae.predict import modalities_of
from data import DataError

CELL = 160  # pixels: the least side of a frame
COLUMNS = 8  # frames in a row
NAMES = {"rgb": "picture's", "spectrogram": "sound's", "joint": "both"}


def frames_of(found: api.Attention, shares: np.ndarray) -> list[np.ndarray]:
    """The frames, uint8 [h w 3] each, under shares [t h w] of the tokens."""
    span = _span(shares)
    tubelet, large = len(found.frames) // len(shares), _large(found.frames)
    return [
        visualise.heat(frame, shares[min(i // tubelet, len(shares) - 1)], *span)
        for i, frame in enumerate(large)
    ]


def _span(shares: np.ndarray) -> tuple[float, float]:
    """What is shown darkest and lightest: the most extreme hundredth is cut."""
    low, high = np.percentile(shares, (0.5, 99.5))
    return float(low), float(high)


def sheet(found: api.Attention, layers: str, caption: str) -> np.ndarray:
    """Everything on one picture, uint8 [h w 3]."""
    maps, parts = getattr(found, layers), []
    outputs = [*found.used, "joint"] if len(found.used) > 1 else list(found.used)
    names = [
        f"{NAMES[m]}\noutput" if m != "joint" else "both\noutputs" for m in outputs
    ]
    if found.frames is not None:
        t = len(found.frames)
        chosen = np.unique(np.linspace(0, t - 1, min(t, COLUMNS)).round().astype(int))
        titles = [f"{found.view.frames[j]:.2f} s" for j in chosen]
        rows = [_large(found.frames[chosen])]
        for output in outputs:
            all_frames = frames_of(found, maps[output]["rgb"])
            rows.append([all_frames[j] for j in chosen])
        parts.append(visualise.sheet(rows, ["frames", *names], titles))
    if found.log_mel is not None:
        low, high = np.percentile(found.log_mel, (1, 99))
        picture = visualise.log_mel_picture(found.log_mel, low, high)
        wide = -(-640 // picture.shape[1]) * picture.shape[1]
        picture = visualise.to_size(picture, 128, wide)
        rows = [[picture]]
        for output in outputs:
            shares = np.flip(maps[output]["spectrogram"].T, axis=0)
            rows.append([visualise.heat(picture, shares, *_span(shares))])
        both = maps["joint"]["spectrogram"].sum(axis=1)
        rows.append([visualise.curve(both, 128, wide, float(both.max()))])
        seconds = len(found.log_mel) / visualise.ROWS_A_SECOND
        title = f"{seconds:.2f} s of sound, low frequencies at the bottom"
        parts.append(visualise.sheet(rows, ["sound", *names, "when"], [title]))
    return visualise.below(parts, caption)


def _large(frames: np.ndarray) -> list[np.ndarray]:
    times = max(1, -(-CELL // min(frames.shape[1:3])))
    return list(frames.repeat(times, axis=1).repeat(times, axis=2))


def numbers(found: api.Attention) -> dict:
    """All shares for JSON, and their sums."""
    listed = lambda maps: {
        output: {m: x.tolist() for m, x in parts.items()}
        for output, parts in maps.items()
    }
    return {
        "used": list(found.used),
        "frame_times": found.view.frames.tolist(),
        "sound_start": found.view.sound,
        "share_of": {output: found.shares(output) for output in found.rollout},
        "rollout": listed(found.rollout),
        "last": listed(found.last),
    }


def write(found: api.Attention, out: Path, layers: str, clip: str, fps: float):
    """All files of the command; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    how = {"rollout": "attention roll-out", "last": "the last layer's attention"}
    caption = f"{Path(clip).name}: {how[layers]}\n{shares_text(found)}"
    paths = [out / "attention.png"]
    Image.fromarray(sheet(found, layers, caption)).save(paths[-1])
    if found.frames is not None:
        paths.append(out / "attention.gif")
        film = frames_of(found, getattr(found, layers)["joint"]["rgb"])
        visualise.write_gif(np.stack(film), paths[-1], fps)
    paths.append(out / "attention.json")
    paths[-1].write_text(json.dumps(numbers(found)) + "\n", encoding="utf-8")
    return paths


def shares_text(found: api.Attention) -> str:
    """How much of each output comes from each modality, in a line each."""
    lines = []
    for output in found.rollout:
        shares = found.shares(output)
        own = 1 - sum(shares.values())
        shares |= {"own tokens": own} if own > 5e-3 else {}
        parts = ", ".join(f"{x:.0%} {m}" for m, x in shares.items())
        whose = "both outputs" if output == "joint" else f"{NAMES[output]} output"
        lines.append(f"{whose}: {parts}")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.attend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("clip", metavar="CLIP", help="a media file")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--start", type=float, help="second at which to look")
    parser.add_argument("--modalities", type=modalities_of)
    parser.add_argument("--layers", choices=("rollout", "last"), default="rollout")
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    return parser.parse_args(argv)


def main(argv=None):
    given = parse(argv)
    commandline.quiet_libraries()
    try:
        model = api.load(given.checkpoint, given.weights)
        found = model.attention(given.clip, given.modalities, given.start)
        fps = model.config.data.fps / model.config.data.stride
        paths = write(found, given.out, given.layers, given.clip, fps)
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(shares_text(found))
    print("written:", *paths, sep="\n  ")


if __name__ == "__main__":
    main()
