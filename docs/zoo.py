"""Writes docs/zoo.md and the README's table of published models.

    JAX_PLATFORMS=cpu python docs/zoo.py

What others published (names, addresses, results) is the data below; parameters and
multiply-adds are computed from our own config of each model, nothing is typed in.
Sources, as stored in public copies: MODEL_ZOO.md of MCG-NJU/VideoMAE and of
innat/VideoMAE, README.md of google-research/scenic's projects/av_mae with its configs,
transformers' convert_videomae_to_pytorch.py for the names on the Hugging Face hub.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from av_mae import convert, flops
from av_mae.importers import configure, videomae

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by docs/zoo.py -->", "<!-- end of what docs/zoo.py wrote -->"


class Data(NamedTuple):
    """A data set as the published models were trained and tested on it."""

    name: str
    classes: int
    views: str  # clips × crops at test
    score: str
    mask: float = 0.9  # of video, in pretraining
    options: str = ""  # what a file does not tell, for the test
    seconds: float = 0.0  # of sound
    fusion_layer: int = 0
    sound_channels: int = 1


SSV2_TEST = " --config.data.sampling=segments --config.data.views=2"
DATA = {
    "k400": Data("Kinetics-400", 400, "5 × 3", "top-1 / top-5"),
    "ssv2": Data(
        "Something-Something v2", 174, "2 × 3", "top-1 / top-5", options=SSV2_TEST
    ),
    "ucf101": Data("UCF101", 101, "5 × 3", "top-1 / top-5", mask=0.75),
    "audioset": Data("AudioSet", 527, "4 × 1", "mAP", seconds=10.0, fusion_layer=18),
    "vggsound": Data(
        *("VGGSound", 309, "4 × 1", "top-1"),
        seconds=8.0,
        fusion_layer=16,
        sound_channels=3,
    ),
}


class Model(NamedTuple):
    """A pretrained model and its classifier, with all files of each.

    Files are (edition, local name, address), those of the pretrained model first.
    `heard` are the classifier's modalities (AV-MAE), `pretrained` the autoencoder's.
    """

    system: str
    size: str
    data: str
    epochs: int
    result: str
    pretrained_files: tuple[tuple[str, str, str], ...]
    files: tuple[tuple[str, str, str], ...]
    pretrained: tuple[str, ...] = ("rgb",)
    heard: tuple[str, ...] = ("rgb",)


HUB = "https://huggingface.co/MCG-NJU/"
DRIVE = "https://drive.google.com/file/d/"
KERAS = "https://github.com/innat/VideoMAE/releases/download/"
BUCKET = "https://storage.googleapis.com/scenic-bucket/av_mae/"


def _mcg(size: str, data: str, epochs: int, kind: str, key: str):
    name = f"mcg-{size.lower()}-{data}-{epochs}e-{kind}.pth"
    return ("MCG-NJU", name, DRIVE + key) if key else None


def _hub(name: str):
    return ("Hugging Face", name, HUB + name) if name else None


def _keras(h5: str, saved: str):
    """The .h5 file and the SavedModel, each by its name in the releases."""
    found = []
    if h5:
        found.append(("Keras, h5", f"{h5}.h5", f"{KERAS}v1.0/{h5}.h5"))
    if saved:
        found.append(("Keras, SavedModel", saved, f"{KERAS}v1.1/{saved}.zip"))
    return found


def _videomae(size, data, epochs, result, mcg, hub=("", ""), keras=None) -> Model:
    both = []
    for i, kind in enumerate(("pretrained", "finetuned")):
        files = [_mcg(size, data, epochs, kind, mcg[i]), _hub(hub[i])]
        both.append([f for f in files if f] + (keras[i] if keras else []))
    files = [tuple(x) for x in both]
    return Model("VideoMAE", size, data, epochs, result, *files)


def _released(name: str, h5: str = ""):
    """Keras's pair for pretraining and finetuning, where both have plain names."""
    pretrained, finetuned = f"TFVideoMAE_{name}_PT", f"TFVideoMAE_{name}_FT"
    return _keras(pretrained, pretrained), _keras(h5 or finetuned, finetuned)


HUGE = [
    ("Keras, h5", "keras-h-k400.h5", DRIVE + "1ZS7fWw3SbgKpLAdN7QQLm9_pIomwYEtI"),
    (
        "Keras, SavedModel",
        "keras-h-k400",
        "https://drive.google.com/drive/folders/1DdwGd-EXD0Rc-05mirZOU3W7b8LlHYJ7",
    ),
]
VIDEOMAE = [
    _videomae(
        *("S", "k400", 1600, "79.0 / 93.8"),
        ("1nU-H1u3eJ-VuyCveU7v-WIOcAVxs5Hww", "1ygjLRm1kvs9mwGsP3lLxUExhRo6TWnrx"),
        hub=("", "videomae-small-finetuned-kinetics"),
        keras=_released("S_K400_16x224", "TFVideoMAE_S_16x224_FT"),
    ),
    _videomae(
        *("B", "k400", 800, "80.0 / 94.4"),
        ("1JfrhN144Hdg7we213H1WxwR3lGYOlmIn", "18EEgdXY9347yK3Yb28O-GxFMbk41F6Ne"),
        hub=("videomae-base-short", "videomae-base-short-finetuned-kinetics"),
    ),
    _videomae(
        *("B", "k400", 1600, "81.5 / 95.1"),
        ("1tEhLyskjb755TJ65ptsrafUG2llSwQE1", "1MzwteHH-1yuMnFb8vRBQDvngV1Zl-d3z"),
        hub=("videomae-base", "videomae-base-finetuned-kinetics"),
        keras=_released("B_K400_16x224"),
    ),
    _videomae(
        *("L", "k400", 1600, "85.2 / 96.8"),
        ("1qLOXWb_MGEvaI7tvuAe94CV7S2HXRwT3", "1jX1CiqxSkCfc94y8FRW1YGHy-GNvHCuD"),
        hub=("videomae-large", "videomae-large-finetuned-kinetics"),
        keras=(
            _released("L_K400_16x224")[0],
            _keras("TFVideoMAE_L_K400_16x224_FT", ""),
        ),
    ),
    _videomae(
        *("H", "k400", 1600, "86.6 / 97.1"),
        ("1AJQR1Rsi2N1pDn9tLyJ8DQrUREiBA1bO", "104ouJZxSVPSAm0LwJXd6IzjdA_RGLqZi"),
        hub=("", "videomae-huge-finetuned-kinetics"),
        keras=([], HUGE),
    ),
    _videomae(
        *("S", "ssv2", 2400, "66.8 / 90.3"),
        ("1p_I1aaONOeUvRmRQw1UT3-L2H8XJClHu", "1ajlMrT06jiiM-5YjNI2X_UFyzsuYbbtZ"),
        hub=("", "videomae-small-finetuned-ssv2"),
        keras=_released("S_SSv2_16x224"),
    ),
    _videomae(
        *("B", "ssv2", 800, "69.6 / 92.0"),
        ("181hLvyrrPW2IOGA46fkxdJk0tNLIgdB2", "1xZCiaPF4w7lYmLt5o1D5tIZyDdLtJAvH"),
        hub=("videomae-base-short-ssv2", "videomae-base-short-finetuned-ssv2"),
    ),
    _videomae(
        *("B", "ssv2", 2400, "70.8 / 92.4"),
        ("1I18dY_7rSalGL8fPWV82c0-foRUDzJJk", "1dt_59tBIyzdZd5Ecr22lTtzs_64MOZkT"),
        hub=("videomae-base-ssv2", "videomae-base-finetuned-ssv2"),
        keras=_released("B_SSv2_16x224"),
    ),
    _videomae(
        *("B", "ucf101", 3200, "91.3 / 98.5"),
        ("1BHev4meNgKM0o_8DMRbuzAsKSP3IpQ3o", "1MSyon6fPpKz7oqD6WDGPFK4k_Rbyb6fw"),
        keras=_released("B_UCF_16x224"),
    ),
]

BOTH, SOUND, PICTURE = ("rgb", "spectrogram"), ("spectrogram",), ("rgb",)
WORD = {BOTH: "audiovisual", SOUND: "audio", PICTURE: "video"}


def _avmae(data: str, pretrained, heard, result: str) -> Model:
    stem = f"{'as2m' if data == 'audioset' else data}_selfsup_{WORD[pretrained]}"
    file = lambda name: (("Scenic", name, f"{BUCKET}{data}/{name}/checkpoint"),)
    finetuned = f"{stem}_finetuned_{WORD[heard]}"
    first = file(stem)
    return Model(
        *("AV-MAE", "L", data, 0, result, first, file(finetuned)),
        pretrained,
        heard,
    )


AVMAE = [
    _avmae("audioset", BOTH, BOTH, "51.8"),
    _avmae("audioset", BOTH, SOUND, "46.6"),
    _avmae("audioset", BOTH, PICTURE, "31.1"),
    _avmae("audioset", SOUND, SOUND, "46.4"),
    _avmae("vggsound", BOTH, BOTH, "65.0"),
    _avmae("vggsound", BOTH, SOUND, "57.2"),
    _avmae("vggsound", BOTH, PICTURE, "50.3"),
]
MODELS = [*AVMAE, *VIDEOMAE]


# Our config of each, and what is computed from it.


def config_of(model: Model, trainer: str):
    """Our config of the autoencoder ("pretrain") or the classifier ("finetune")."""
    data = DATA[model.data]
    if model.system == "VideoMAE":
        config = videomae.published(trainer, model.size, data.classes)
        if trainer == "pretrain":
            config.mask.rgb.ratio = data.mask
        return config
    found = {"model.variant": f"{model.size}/16x2", "data.audio_seconds": data.seconds}
    if trainer == "pretrain":
        audioset = model.data == "audioset"
        found |= {
            "modalities": model.pretrained,
            "model.fusion": "mid" if audioset else "separate",
            "mask.spectrogram.ratio": 0.7 if audioset else 0.5,
        }
        return configure(trainer, found, {}, {})[0]
    found |= {
        "modalities": model.heard,
        "data.num_frames": 32,
        "model.fusion": "bottleneck",
        "model.fusion_layer": data.fusion_layer,
        "model.classes": data.classes,
        "model.sound_channels": data.sound_channels,
    }
    return configure(trainer, found, {}, {})[0]


class Size(NamedTuple):
    """What a model weighs: parameters, and multiply-adds of a forward pass."""

    parameters: int
    multiply_adds: int


@functools.cache
def size_of(model: Model, trainer: str) -> Size:
    return _size(config_of(model, trainer).to_json())


@functools.cache
def _size(settings: str) -> Size:
    """Of a config as JSON, so that the same model is built once."""
    config = ConfigDict(json.loads(settings))
    leaves = jax.tree.leaves(convert.abstract(config))
    counts = flops.multiply_adds(config)
    return Size(sum(math.prod(x.shape) for x in leaves), sum(counts.values()))


# The pages.


def gmac(size: Size) -> str:
    """Thousands of millions of multiply-adds, with four digits."""
    value = size.multiply_adds / 1e9
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def frames(model: Model, trainer: str) -> str:
    """Frames, clips and crops, as a classifier is tested; what an autoencoder sees."""
    heard = model.pretrained if trainer == "pretrain" else model.heard
    count = config_of(model, trainer).data.num_frames
    sound = f"{DATA[model.data].seconds:.0f} s" if "spectrogram" in heard else ""
    seen = [f"{count}"] if "rgb" in heard else []
    text = " + ".join(seen + ([sound] if sound else []))
    if trainer == "pretrain":
        return text
    text = f"({text})" if "+" in text else text
    return f"{text} × {DATA[model.data].views}"


def title(model: Model) -> str:
    heard = {BOTH: "both", SOUND: "sound", PICTURE: "picture"}
    if model.system == "VideoMAE":
        return f"VideoMAE {model.size}, {model.epochs} epochs"
    before = f"{heard[model.pretrained]} → {heard[model.heard]}"
    return f"AV-MAE {model.size}, {before}"


def summary_row(model: Model) -> str:
    """A line of the README: a classifier and what it was pretrained as."""
    pretrained, finetuned = size_of(model, "pretrain"), size_of(model, "finetune")
    data = DATA[model.data]
    editions = [edition for edition, *_ in model.files]
    cells = [
        title(model),
        data.name,
        frames(model, "finetune"),
        f"{pretrained.parameters / 1e6:.1f}, {finetuned.parameters / 1e6:.1f}",
        f"{gmac(pretrained)}, {gmac(finetuned)}",
        f"{model.result} {data.score}",
        ", ".join(dict.fromkeys(edition.split(",")[0] for edition in editions)),
    ]
    return f"| {' | '.join(cells)} |"


def summary(models=MODELS) -> str:
    head = [
        "| model | data set | frames × clips × crops | M parameters: autoencoder, "
        "classifier | GMAC: the same, one view | published | files |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(summary_row, models)])


def file_rows(model: Model) -> list[str]:
    """Lines of docs/zoo.md: a file each."""
    lines = []
    data = DATA[model.data]
    for trainer, files in (
        ("pretrain", model.pretrained_files),
        ("finetune", model.files),
    ):
        size, result = size_of(model, trainer), "(pretrained)"
        options = data.options if trainer == "finetune" else ""
        if trainer == "finetune":
            result = f"{data.name}: {model.result} {data.score}"
        elif data.mask != 0.9:
            options = f" --config.mask.rgb.ratio={data.mask}"
        for edition, name, address in files:
            out = name.removesuffix(".pth").removesuffix(".h5")
            if name.endswith(".h5"):
                out += "-h5"
            command = f"python -m av_mae.convert {name} --out weights/{out}{options}"
            cells = [
                f"`{name}`",
                f"{model.size}, {data.name}" if trainer == "pretrain" else model.size,
                edition,
                frames(model, trainer),
                f"{size.parameters:,}",
                gmac(size),
                result,
                address,
                f"`{command}`",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def files(models) -> str:
    """The table of files; a pretrained file of several classifiers is there once."""
    head = [
        "| save as | size | edition | frames × clips × crops | parameters | GMAC | "
        "published | address | read it with |",
        "|---|---|---|---|--:|--:|---|---|---|",
    ]
    rows = dict.fromkeys(row for model in models for row in file_rows(model))
    return "\n".join([*head, *rows])


TEXT = """\
# Published models

Written by `python docs/zoo.py`; do not edit it by hand. Every checkpoint that we know
of, of the three systems that av_mae reads. Download the address under the name in the
first column (unpack a .zip; a Hugging Face model is the folder with config.json, as
`hf download MCG-NJU/NAME --local-dir NAME` or a git clone gives it), then run the
command, which prints where every parameter went, or give the file itself to
`--config.init_from.checkpoint_path`.

- **frames × clips × crops**: what is put in, and of how many views the published result
  is the mean. 10 s and 8 s are of sound. Autoencoders have no test.
- **parameters**: of our model, by `jax.eval_shape`. They equal those of the published
  program, except where a note below says what the file has more.
- **GMAC**: 10⁹ multiply-adds of one view's forward pass, by `av_mae/flops.py`; an
  autoencoder's encoder sees the kept tokens only. VideoMAE's published counts for S, B,
  L and H are 56.9, 180.3, 596.8 and 1191; ours agree to 0.1 %, so both count the same
  products.
- **published**: what the publishers report, in per cent. We have not reproduced these
  scores: no published file was at hand, and the numbers that are compared are those of
  docs/parity.md.

## AV-MAE (Scenic)

{avmae}

TensorFlow SavedModels lie beside these, as `tf_saved_model.zip` instead of
`checkpoint`; they hold the log-mel front end, which the checkpoints do not:
`python -m av_mae.convert --frontend FOLDER --trust` compares our presets with it. The
readme gives mAP or accuracy in one column; AudioSet's is mAP. The classifiers of one
modality and the autoencoder of sound are read by rules that were not checked against a
file. A classifier of one modality holds 4,096 more parameters, bottleneck tokens that
nothing passes through. VGGSound's classifiers hear sound in three equal channels
(`model.sound_channels`): so they are counted here, and so configs/vggsound/finetune.py
trains one; `convert` sums the three, which is exact, and makes a model of 524,288
parameters fewer.

## VideoMAE

{videomae}

Results are those of MCG-NJU's MODEL_ZOO.md; the other editions are conversions of the
same weights. The hub's own cards give older ones in places (80.9 / 94.7 for
videomae-base-finetuned-kinetics, as quoted elsewhere; the others were not at hand).

- S on the hub: transformers' conversion script gives this size 16 heads, where
  MCG-NJU's has 6. We take what config.json says, as transformers does; whether that
  model has the results above was not checked. MCG-NJU's own file has them.
- B, Kinetics-400 and Something-Something v2, 800 epochs: finetuned without repeated
  augmentation.
- H, pretrained: the file holds the encoder alone (MCG-NJU/VideoMAE issue 89), and the
  report of `convert` says so; parameters and GMAC are those of the whole autoencoder.
- L, finetuned, Keras: the list gives the .h5 file where a SavedModel should be.
- Licence: MCG-NJU's code, and the cards on the hub, say CC BY-NC 4.0.

## AV-MaskEnhancer

None: its repository has no checkpoint in the copy that was at hand, and its readme
names none. Files that its code writes are read (`python -m av_mae.convert
checkpoint.pth --out weights/avmaskenhancer`). It reports 98.8 top-1 on UCF101, on a
random split of the clips that have sound, which is not comparable with results on the
official splits.
"""


def page(avmae=AVMAE, video=VIDEOMAE) -> str:
    """The text of docs/zoo.md."""
    return TEXT.format(avmae=files(avmae), videomae=files(video))


def readme(text: str) -> str:
    """The README with its tables as they are now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    title = "<details><summary>Every file, address and command</summary>"
    tables = f"{summary()}\n\n{title}\n\n{files(MODELS)}\n\n</details>"
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    (ROOT / "docs" / "zoo.md").write_text(page(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"docs/zoo.md and README.md: {len(MODELS)} models")


if __name__ == "__main__":
    main()
