"""Writes docs/config.md: every field of a config, its choices, its names elsewhere.

    JAX_PLATFORMS=cpu python docs/config.py

Defaults are read from the configs, choices from the program's own tables. Data are what
each field means, in a few words what some choices are, and what VideoMAE and Scenic
call a field. Sources of the latter, as stored in public copies: MCG-NJU/VideoMAE's
run_mae_pretraining.py and run_class_finetuning.py with what they call;
google-research/scenic's projects/av_mae, its configs and what reads them.
"""

import argparse
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from av_mae import (
    MODALITIES,
    ConfigError,
    attention,
    augment,
    autoencoder,
    classifier,
    corruption,
    depth,
    evaluation,
    finetune,
    fusion,
    losses,
    masking,
    optim,
    pretrain,
    probe,
    spectrogram,
    tokens,
    transformer,
)
from data import pipeline

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {"pretrain": pretrain, "finetune": finetune}

# What each field means, in the order of the page; a group begins with its first field.
MEANINGS = {
    "trainer": "Which trainer the config is for; it decides which fields there are.",
    "mode": "`train`, or `eval`: the newest checkpoint of the workdir (where there is "
    "none, of `init_from.checkpoint_path`) is evaluated on `eval.split`.",
    "seed": "Of first parameters, order of the clips and every random draw, the masks "
    "of an evaluation and the subset of `data.limit` among them.",
    "modalities": "What the model sees, one or both, in this order.",
    "batch_size": "Clips of a batch over all devices and hosts, a multiple of the "
    "number of devices; samples of a clip do not count.",
    "epochs": "How often the training clips are gone through; may be a fraction.",
    "steps": "Updates in all; 0: as many as `epochs` makes.",
    "dry_run": "Says what memory, FLOPs and time a run will take, and runs none.",
    "probe": "What is trained, the rest being kept as it is and encoding as at test.",
    "ema": "Decay of a moving average of the weights, evaluated beside them "
    "(`eval/ema_…`); 0.0: none.",
    "nonfinite": "What an update does whose loss, gradient or result is not finite.",
    # data
    "data.dir": "Folder of the data set (or a bucket), `tfds:NAME`, a pattern of "
    "TFRecords, or media files, see `data.source`.",
    "data.source": "What lies in `data.dir`.",
    "data.split": "The split that is trained on, `train` or another of the data set.",
    "data.fps": "Frames a second that `data.stride` counts in: prepared records that "
    "have others are told, files (`folder`) are read at it, and records that do not "
    "say are taken to have it.",
    "data.num_frames": "Frames of a view; what does not fill a tube is left out.",
    "data.stride": "Frames of the record from one frame of a view to the next.",
    "data.sampling": "Which frames a view takes.",
    "data.size": "Side of the square picture, pixels; patches have to divide it.",
    "data.short_side": "Short side that pictures are scaled to before they are "
    "cropped, pixels, at least `data.size`; the crops `multiscale` and `resized` are "
    "taken of the stored picture, so that it counts in evaluation alone.",
    "data.crop": "How a training picture is cropped, once for all frames of a window; "
    "evaluation takes the centre, or three (`data.crops`).",
    "data.resize": "How pictures are scaled; the second decodes JPEGs as TensorFlow "
    "does, too.",
    "data.audio_seconds": "Sound of a view, seconds.",
    "data.audio_align": "Which sound goes with the frames of a view; what runs off the "
    "end goes on at the beginning, except with `whole`.",
    "data.samples_per_clip": "Windows of a clip in a training batch, each with its own "
    "crop; with the sampling `stretched` or `segments` crops of one window (VideoMAE's "
    "repeated augmentation).",
    "data.views": "Windows of a clip in evaluation, over which results are averaged.",
    "data.crops": "Crops of each of these views, 1 in the centre or 3 along the longer "
    "side.",
    "data.threads": "Threads that make batches, for each process that reads; 0: none "
    "besides the reader's own.",
    "data.workers": "Processes that make batches; 0: threads of the main one alone.",
    "data.cache": "Keeps decoded clips in memory, up to a quarter of the machine's; "
    "wants `data.workers` 0.",
    "data.missing_modalities": "Whether clips may lack picture or sound; False: a data "
    "set with such clips is refused.",
    "data.limit": "Clips of `data.split` to take, equally many of each class as far as "
    "there are; 0: all.",
    "data.skip_bad_records": "Damaged records that may be passed over, of each split "
    "and in each process; one more ends the run.",
    "data.prepared.fps": "The `--fps` of data.prepare that the data set should have "
    "been made with, a number or `source`; empty: not looked at. With `data.source` "
    "`folder` and `source`, files are read at their own rates.",
    "data.prepared.short_side": "The same of `--short-side`, pixels; files (`folder`) "
    "are read at it, or at 256 where it is empty.",
    "data.randaugment": "RandAugment of whole training pictures as timm writes it, "
    "`rand-m7-n4-mstd0.5-inc1` (VideoMAE); empty: none. The parts are explained in "
    "data/randaugment.py.",
    # picture
    "picture.normalise": "What is done to pictures in [0, 1] before the model.",
    "picture.mean": "Mean of red, green and blue that is taken away, of values in [0, "
    "1]; .5 with deviation .5 gives [−1, 1] (Scenic), VideoMAE has ImageNet's.",
    "picture.std": "Deviation of the three that they are divided by.",
    # spectrogram
    "spectrogram.preset": "The front end: 16 kHz sound to rows of 10 ms. `scenic` is "
    "one more where `python -m av_mae.convert --frontend` has found it.",
    "spectrogram.normalise": "What is done to its rows before the model.",
    "spectrogram.mean": "Mean that `fixed` takes away, in natural logarithms; "
    "`dataset` fills it in.",
    "spectrogram.std": "Deviation that `fixed` divides by; `dataset` fills it in.",
    # model
    "model.variant": "Size of the encoder, a slash, patch side × frames of a tube: "
    "`L/16x2`. The letter is one of the choices; sound has square patches of the side.",
    "model.width": "Width of the encoder; 0: that of the variant.",
    "model.depth": "Layers of the encoder; 0: those of the variant. A probe of fewer "
    "looks at an earlier layer.",
    "model.heads": "Attention heads; 0: those of the variant.",
    "model.mlp": "Width of the MLPs; 0: four times `model.width`.",
    "model.classes": "Classes of a head; 0: as many as the data set has.",
    "model.label_heads": "Heads where clips have labels of several kinds: pairs (kind, "
    "classes or 0), `(('verb', 97), ('noun', 300))`; (): one kind.",
    "model.fusion": "How the modalities meet in the encoder. What counts from the "
    "first layer is for finetuning alone.",
    "model.fusion_layers": "Last layers of the encoder that are joint, with `mid`.",
    "model.fusion_layer": "First layer, from 0, in which the modalities meet, with "
    "`mid`, `bottleneck` and `cross`; the depth: never.",
    "model.bottlenecks": "Tokens through which they meet, with `bottleneck`.",
    "model.bottlenecks_at_test": "Whether they do so in evaluation too, with "
    "`bottleneck` (Scenic's test_with_bottlenecks).",
    "model.share_encoder": "Sends all modalities through the same layers, with "
    "`bottleneck` and `cross`.",
    "model.sound_channels": "Equal channels that sound is given in, 1 or 3 (Scenic's "
    "classifier of VGGSound).",
    "model.sound.filters": "Channels of the four stages of AV-MaskEnhancer's sound "
    "encoder; the group `model.sound` is there for its fusions alone.",
    "model.sound.blocks": "Residual units of each of these stages.",
    "model.pool": "How a modality's tokens become one vector; an attentive probe does "
    "without.",
    "model.representation": "Width of a dense layer with tanh before the heads "
    "(Scenic's pre_logits); 0: none.",
    "model.head_norm": "A LayerNorm after the pooling (VideoMAE's fc_norm).",
    "model.head_eps": "Its epsilon (1e-5 on Hugging Face).",
    "model.head_init": "Scale of a head's first kernel, itself of deviation .02, cut "
    "off at twice that (VideoMAE: 0.001); 0.0: it begins at zero (Scenic).",
    "model.head_dropout": "Dropout before the heads, in training.",
    "model.positions": "Position vectors that the encoder's tokens get.",
    "model.modality_embeddings": "Adds a learned vector to all tokens of a modality, "
    "in encoder and decoder (Scenic's use_modality_tokens).",
    "model.cls_token": "Puts a learned token before each modality's tokens (Scenic).",
    "model.block.gelu": "GELU by the tanh approximation (Scenic) or by erf (VideoMAE), "
    "in encoder and decoder, as all of `model.block`.",
    "model.block.eps": "Epsilon of the LayerNorms (Hugging Face's VideoMAE: 1e-12).",
    "model.block.key_bias": "Whether keys have a bias; VideoMAE's have none.",
    "model.block.layer_scale": "First value of a learned vector that each branch is "
    "multiplied by (an option of VideoMAE's code); 0.0: none.",
    "model.block.qkv_init": "First values of the kernels of queries, keys and values.",
    "model.norm": "LayerNorm after the encoder's last blocks; VideoMAE's classifier "
    "has none, but `model.head_norm`.",
    "model.drop_path": "Probability, in training, that a branch of the last layer is "
    "dropped for an example; it rises linearly from 0 in the first. Encoder alone.",
    "model.drop_path_rescale": "Divides what is not dropped by its probability, as "
    "timm and VideoMAE do; Scenic does not.",
    "model.decoder.kind": "How the modalities meet in the decoder.",
    "model.decoder.width": "Width of the decoder.",
    "model.decoder.depth": "Layers of the decoder.",
    "model.decoder.heads": "Attention heads of the decoder.",
    "model.decoder.mlp": "Width of its MLPs.",
    "model.decoder.positions": "Position vectors that its tokens get, as "
    "`model.positions`.",
    "model.decoder.bias": "Bias of the linear maps from the encoder into the decoder; "
    "VideoMAE has none.",
    "model.decoder.eps": "Epsilon of the LayerNorm after its last block (1e-5 on "
    "Hugging Face); its other norms have `model.block.eps`.",
    "model.decoder.norm": "Whether there is a LayerNorm after its last block.",
    # mask
    "mask.rgb.kind": "Which tokens of the picture are masked.",
    "mask.rgb.ratio": "Share of them, above 0 and below 1, rounded down: of all tokens "
    "(`random`), or of the places in a frame (`tube`).",
    "mask.spectrogram.kind": "Which tokens of the sound are masked.",
    "mask.spectrogram.ratio": "Share of them, rounded down: of all tokens (`random`), "
    "of the columns in time (`time`) or the rows in frequency (`frequency`).",
    # objective
    "objective.kind": "What training minimises.",
    "objective.inpaint_layout": "Places of the tokens, with `inpaint`.",
    "objective.target.rgb": "What is predicted of a patch of the picture.",
    "objective.target.spectrogram": "The same of a patch of the sound.",
    "objective.weights.rgb": "Multiple of the picture's loss in the sum.",
    "objective.weights.spectrogram": "Multiple of the sound's loss in the sum.",
    "objective.unmasked": "Predicts the kept tokens too, with `reconstruct` (Scenic's "
    "loss_unmasked_tokens).",
    "objective.l2": "Multiple of half the squares of all parameters but vectors, added "
    "to the loss (Scenic's l2_decay_factor).",
    "objective.decode.kind": "Which masked tokens are decoded in training; evaluation "
    "decodes all.",
    "objective.decode.share": "How many of them, above 0 to 1, rounded down; with "
    "`all` it is not looked at, and a running cell takes quarters.",
    "objective.masks_per_clip": "Masks drawn of each clip in a training step, which is "
    "read once; each is a pass of its own.",
    "objective.label_smoothing": "Share of a label's weight that is spread over all "
    "classes, in training.",
    # augment
    "augment.flip": "Probability that a clip is mirrored. This and all of `augment` "
    "are for training alone.",
    "augment.time_shift": "Turns the spectrogram by a random number of rows; what "
    "leaves comes in again (Scenic's circular_time_shift).",
    "augment.mixup": "α of Beta(α, α), from which the share is drawn by which a clip "
    "is blended with another of the batch; 0.0: none.",
    "augment.cutmix": "α of the area that a box of another clip takes (sound is "
    "blended by it); 0.0: none.",
    "augment.mix_probability": "Probability that a batch is mixed at all, or with "
    "`mix_per_modality` each modality of it.",
    "augment.mix_switch": "Probability of cutmix where both α are above 0.",
    "augment.mix_per_modality": "Each modality draws its own share (Scenic's mixmod).",
    "augment.colour": "Probability that a clip gets other brightness, saturation, "
    "contrast and hue (DMVR's ranges; Scenic finetunes with 0.8).",
    "augment.grey": "Probability that it loses its colours (Scenic: 0.1).",
    "augment.erase": "Probability that a box of 2 % to a third of the picture, the "
    "same in all frames, becomes noise (VideoMAE finetunes with 0.25).",
    "augment.frequency_masks": "SpecAugment: bands of frequency that become 0; 0: "
    "none.",
    "augment.frequency_width": "Bound of their widths in mel bins, each is below it; 0 "
    "exactly where there are no bands.",
    "augment.time_masks": "The same in time.",
    "augment.time_width": "Bound of their widths in rows of 10 ms.",
    "augment.corruption": "Degrades training input, KIND:LEVEL as in `blur:2`, empty: "
    "none; levels are explained in av_mae/corruption.py.",
    # optimizer
    "optimizer.name": "The rule of the update.",
    "optimizer.b1": "Decay of Adam's first moment; momentum of `sgd`.",
    "optimizer.b2": "Decay of Adam's second moment; `sgd` does without.",
    "optimizer.eps": "Added to Adam's divisor; `sgd` does without.",
    "optimizer.weight_decay": "Decay, times the learning rate, of what the rules name.",
    "optimizer.decay_rules": "Pairs (regex, multiple of the decay): the first that "
    "matches a parameter's whole name counts, and one has to.",
    "optimizer.clip_norm": "Largest norm of all gradients together; 0.0: any.",
    "optimizer.layer_decay": "Factor of the learning rate for each layer below the "
    "head; 1.0: none, and in pretraining the only value.",
    # schedule
    "schedule.learning_rate_per_256": "Highest learning rate for 256 clips an update; "
    "it is multiplied by `batch_size` · `compute.accumulate` / 256.",
    "schedule.warmup_epochs": "Epochs over which it rises linearly from 0; may be a "
    "fraction. A cosine follows.",
    "schedule.floor_per_256": "Learning rate at the end, likewise per 256 clips.",
    "schedule.kind": "When the rise is at its end.",
    # parallel
    "parallel.data": "Groups of `parallel.fsdp` devices that share the batch; `-1`: as "
    "many as there are.",
    "parallel.fsdp": "Devices over which parameters and optimiser state are split; 1: "
    "each device has all.",
    # compute
    "compute.dtype": "Type of activations and products; parameters and statistics of "
    "the softmax are float32.",
    "compute.accumulate": "Batches whose gradients are averaged for an update.",
    "compute.scan": "One traced layer serves all: compiles faster, changes no number "
    "beyond rounding.",
    "compute.remat": "What is computed again in the backward pass to save memory.",
    "compute.attention": "What computes attention.",
    # checkpoint
    "checkpoint.every_steps": "Updates from one checkpoint to the next; the last "
    "update and SIGTERM make one too.",
    "checkpoint.keep": "Newest checkpoints that are kept.",
    # log
    "log.every_steps": "Updates from one line of the log, metrics.jsonl and "
    "TensorBoard to the next.",
    "log.pictures": "Clips whose reconstruction is drawn at each evaluation; 0: none.",
    # eval
    "eval.every_epochs": "Epochs from one evaluation to the next; may be a fraction, "
    "and the last update is followed by one.",
    "eval.split": "The split that is evaluated.",
    "eval.batch_size": "Clips of its batches over all devices; each has `data.views` × "
    "`data.crops` views.",
    "eval.average": "What is averaged over the views of a clip.",
    "eval.modalities": "Subsets that are measured besides, the rest hidden: `('rgb', "
    "'spectrogram')` is each alone, `rgb+spectrogram` both.",
    "eval.corruption": "Degrades what is evaluated, as `augment.corruption`.",
    # init_from
    "init_from.checkpoint_path": "Where first weights come from while the workdir has "
    "no checkpoint: a workdir, one step of it, or a published file; empty: at random.",
    "init_from.rgb.checkpoint_path": "The same for what the picture has for itself, "
    "before joint layers; it wins over the above.",
    "init_from.spectrogram.checkpoint_path": "The same for the sound.",
    "init_from.weights": "Which weights of a checkpoint of ours: the last ones, or "
    "their moving average.",
    "init_from.allow_fresh": "Regexes of whole names: parameters that may be without a "
    "source.",
    "init_from.allow_unused": "Regexes of the source's parameters that may be left "
    "over.",
}


class Choices(NamedTuple):
    """What a field takes: names from a table, by trainer where they differ."""

    pretrain: tuple[Any, ...]
    finetune: tuple[Any, ...]


def same(table: Iterable) -> Choices:
    """The same choices for both trainers."""
    return Choices(tuple(table), tuple(table))


def told(field: str) -> Choices:
    """Those of a field without a table, as the program names them when it refuses."""
    config = config_of("folder/pretrain")
    config.update_from_flattened_dict({field: "?"})
    try:
        pretrain.check(config)
    except ConfigError as error:
        return same(re.findall(r"'(\w+)'", str(error).split("choose one of")[1]))
    raise ValueError(f"{field} takes any word")


def fusions() -> Choices:
    """Strategies whose own fields a config of the trainer has, and AV-MaskEnhancer's.

    What meets from a `fusion_layer` on is for finetuning (av_mae/fusion.py).
    """
    late = [x for x in fusion.FUSIONS if "fusion_layer" in fusion.SETTINGS.get(x, ())]
    early = [x for x in fusion.FUSIONS if x not in late]
    return Choices((*early, *pretrain.MODELS), (*fusion.FUSIONS, *finetune.MODELS))


@functools.cache
def choices() -> dict[str, Choices]:
    """{field: its choices}, of all fields that take one of a few."""
    found_here = spectrogram.found_presets()  # of this machine alone
    presets = [x for x in spectrogram.PRESETS if x not in found_here]
    tables = {f"data.{name}": names for name, names in pipeline.CHOICES.items()}
    tables |= {
        "trainer": TRAINERS,
        "modalities": MODALITIES,
        "probe": probe.TRAINED,
        "picture.normalise": augment.PICTURE_NORMALISATIONS,
        "spectrogram.preset": [*presets, "precomputed"],
        "spectrogram.normalise": augment.NORMALISATIONS,
        "model.variant": transformer.VARIANTS,
        "model.pool": classifier.POOLS,
        "model.positions": tokens.POSITIONS,
        "model.block.qkv_init": transformer.QKV_INITS,
        "model.decoder.kind": autoencoder.DECODERS,
        "model.decoder.positions": tokens.POSITIONS,
        "mask.rgb.kind": masking.KINDS["rgb"],
        "mask.spectrogram.kind": masking.KINDS["spectrogram"],
        "objective.inpaint_layout": autoencoder.LAYOUTS,
        "objective.target.rgb": losses.TARGETS,
        "objective.target.spectrogram": losses.SOUND_TARGETS,
        "objective.decode.kind": masking.DECODE,
        "augment.corruption": corruption.KINDS,
        "optimizer.name": optim.OPTIMIZERS,
        "schedule.kind": optim.KINDS,
        "compute.remat": depth.REMAT,
        "compute.attention": attention.KINDS,
        "eval.average": evaluation.AVERAGES,
        "eval.corruption": corruption.KINDS,
    }
    other = "nonfinite", "model.block.gelu", "compute.dtype", "init_from.weights"
    kinds = Choices(tuple(autoencoder.OBJECTIVES), tuple(evaluation.LOSSES))
    return (
        {field: same(table) for field, table in tables.items()}
        | {field: told(field) for field in other}
        | {"objective.kind": kinds, "model.fusion": fusions()}
    )


# What some choices are.
WORDS = {
    "probe": {
        "full": "everything: finetuning",
        "linear": "the heads, and `model.head_norm`",
        "attentive": "a pooling by cross-attention, and the heads",
    },
    "nonfinite": {
        "stop": "ends the run",
        "skip": "is left out, and its clips noted; 100 in a row end the run",
    },
    "data.source": {
        "records": "what data.prepare made",
        "dmvr": "TFRecords as Scenic's",
        "tfds": "a TensorFlow data set",
        "folder": "media files as they are, or a CSV of them",
    },
    "data.sampling": {
        "dense": "every `stride`-th from a random start, views evenly, Scenic",
        "held": "likewise, but a short clip's last frame is held, VideoMAE's "
        "pretraining and its views",
        "stretched": "evenly over `num_frames` · `stride`, VideoMAE's finetuning",
        "segments": "one of each of `num_frames` equal parts, VideoMAE on "
        "Something-Something",
    },
    "data.crop": {
        "random": "a square of `data.size` anywhere, Scenic",
        "center": "that in the middle",
        "jitter": "of a picture stretched by .9 to 1.33 each way, Scenic's finetuning",
        "multiscale": "sides 1 to .66 of the short side at 13 places, VideoMAE's "
        "pretraining",
        "resized": "8 to 100 % of the area, VideoMAE's finetuning",
    },
    "data.resize": {
        "antialias": "Pillow's bilinear",
        "bilinear": "TensorFlow's and DMVR's, without antialias, as published",
    },
    "data.audio_align": {
        "proportional": "as far into the sound as the first frame into the frames, "
        "views evenly over it, Scenic",
        "window": "centred on the frames",
        "whole": "from the clip's beginning, zeros after its end, AV-MaskEnhancer",
    },
    "picture.normalise": {
        "fixed": "by `mean` and `std`",
        "clip": "by each clip's own mean colour and deviation",
    },
    "spectrogram.preset": {
        "mbt": "128 log-mels, for AV-MAE",
        "kaldi": "128 log-mels, AST, AudioMAE and CAV-MAE",
        "mfcc": "13 cepstral coefficients, AV-MaskEnhancer",
        "precomputed": "log-mels that the records hold, Scenic's TFRecords",
    },
    "spectrogram.normalise": {
        "none": "nothing",
        "fixed": "by `mean` and `std`",
        "dataset": "by those of the data set's training split",
        "clip": "by each clip's own mean of a mel bin and deviation",
    },
    "model.fusion": {
        "early": "one stack over both",
        "shared": "one stack for each alone",
        "separate": "a stack each, they never meet",
        "mid": "separate, joint in the last layers",
        "bottleneck": "separate, meeting in a few tokens, MBT",
        "cross": "each attends to both in layers of its own, MBT without bottlenecks",
        "attention": "sound meets the decoder by attention, AV-MaskEnhancer",
        "concat": "by concatenation, AV-MaskEnhancer",
    },
    "model.pool": {
        "mean": "",
        "max": "",
        "sum": "",
        "token": "the CLS token, or the first patch's",
    },
    "model.positions": {
        "sinusoidal": "fixed, over the flattened index, as published",
        "sinusoidal_cls": "the same, place 0 is the CLS token's, Scenic's MBT",
        "learned": "",
        "sinusoidal_2d": "over height and width, or time and frequency, Scenic",
        "sinusoidal_3d": "over time, height and width, Scenic",
        "fourier": "for small grids",
        "learned_space_time": "one for each time plus one for each place, Scenic",
    },
    "model.block.qkv_init": {
        "xavier": "Xavier-uniform each, Scenic",
        "aligned": "keys equal queries, orthonormal in each head, so that like attends "
        "to like from the first step; after Trockman and Kolter 2023",
    },
    "model.decoder.kind": {
        "shared": "one stack for each alone",
        "separate": "a stack each",
        "joint": "one stack over both",
        "cross": "mask tokens attend to the encoded tokens alone, CrossMAE",
    },
    "mask.rgb.kind": {
        "random": "anywhere, MAE and AV-MAE",
        "tube": "the same places in all frames, VideoMAE",
    },
    "mask.spectrogram.kind": {
        "random": "anywhere",
        "time": "whole times",
        "frequency": "whole frequencies, both AudioMAE",
    },
    "objective.kind": {
        "reconstruct": "error of masked patches, decoded from tokens of their modality",
        "inpaint": "the same, decoded from those of the other modality",
        "softmax": "cross-entropy of one class",
        "sigmoid": "that of several",
    },
    "objective.inpaint_layout": {
        "own": "each token at its own place",
        "scenic": "the other's kept tokens at the first places, as its code has it",
    },
    "objective.target.rgb": {
        "raw": "what the model sees, Scenic",
        "standardised": "less its mean, by its deviation",
        "standardised_channels": "the same for each colour",
        "standardised_channels_unbiased": "VideoMAE's, of the picture in [0, 1]",
        "pixels": "the picture in [0, 1]",
        "central_frame": "frame number tube // 2 of a tube",
        "standardised_central_frame": "the same standardised",
        "grey": "its brightness",
    },
    "objective.decode.kind": {
        "all": "each",
        "random": "some, anywhere",
        "running_cell": "some of each cell of 2 × 2, going round, VideoMAE V2",
    },
    "optimizer.name": {
        "adamw": "decay beside the step",
        "adam": "decay after the step, Scenic's pretraining",
        "sgd": "momentum, Scenic's finetuning",
    },
    "schedule.kind": {
        "scenic": "at the first step after the warm-up",
        "videomae": "at the last step of the warm-up, and the next has the same rate",
    },
    "compute.remat": {
        "none": "nothing",
        "blocks": "all but what passes from layer to layer",
        "dots": "all but that and the products with weights",
    },
    "compute.attention": {
        "auto": "cuDNN where it can run and has 256 keys or more, else XLA",
        "xla": "",
        "cudnn": "",
        "dot": "the plain formula, heads first",
    },
    "eval.average": {"logits": "Scenic", "probabilities": "VideoMAE"},
}


class Name(NamedTuple):
    """An option of another program: `ours` are fields, perhaps with a value each."""

    theirs: str
    ours: str
    differs: str = ""


VIDEOMAE = [
    Name("--mask_ratio", "mask.rgb.ratio"),
    Name(
        *("--mask_type", "mask.rgb.kind"),
        "`random` is offered there, but only `tube` has a generator.",
    ),
    Name("--decoder_depth", "model.decoder.depth"),
    Name(
        *("--normlize_target", "objective.target.rgb=standardised_channels_unbiased"),
        "False is `pixels` here; there any word, `False` too, is read as True.",
    ),
    Name(
        *("--model", "model.variant model.decoder.width model.decoder.heads"),
        "The name says all; the decoder's sizes are fields here.",
    ),
    Name("--num_frames", "data.num_frames"),
    Name(
        *("--sampling_rate", "data.stride data.sampling"),
        "Of the file's own frames: data.prepare `--fps source`. `held` in pretraining, "
        "`stretched` in finetuning; Something-Something is finetuned with `segments`.",
    ),
    Name("--input_size", "data.size"),
    Name("--short_side_size", "data.short_side"),
    Name(
        *("--batch_size", "batch_size"),
        "Of a GPU there, of all devices here.",
    ),
    Name(
        *("--update_freq", "compute.accumulate"),
        "The same; of finetuning alone there.",
    ),
    Name(
        *("--lr", "schedule.learning_rate_per_256"),
        "The same number: both are multiplied by clips of an update / 256, and "
        "samples of a clip do not count.",
    ),
    Name("--min_lr", "schedule.floor_per_256", "Likewise per 256 clips."),
    Name(
        *("--warmup_epochs", "schedule.warmup_epochs schedule.kind=videomae"),
        "The rise begins at 0 in both: --warmup_lr is not used there.",
    ),
    Name("--epochs", "epochs"),
    Name("--opt", "optimizer.name", "`adamw` is the same, `adam` is Scenic's here."),
    Name(
        *("--opt_betas", "optimizer.b1 optimizer.b2"),
        "With --enable_deepspeed they are .9 and .999 there, whatever is said.",
    ),
    Name("--opt_eps", "optimizer.eps"),
    Name(
        *("--weight_decay", "optimizer.weight_decay optimizer.decay_rules"),
        "Of kernels alone in both; --weight_decay_end has no counterpart.",
    ),
    Name(
        *("--clip_grad", "optimizer.clip_norm"),
        "None is 0.0; not looked at there with --enable_deepspeed.",
    ),
    Name("--layer_decay", "optimizer.layer_decay", "The same; finetuning alone."),
    Name(
        *("--drop_path", "model.drop_path model.drop_path_rescale=True"),
        "In pretraining the decoder's blocks have it too there, the encoder's alone "
        "here.",
    ),
    Name("--fc_drop_rate", "model.head_dropout"),
    Name("--init_scale", "model.head_init"),
    Name("--use_cls", "model.pool=token", "With `model.norm`, no `model.head_norm`."),
    Name(
        *("--mixup", "augment.mixup"),
        "One draw for each GPU there, one for the batch here.",
    ),
    Name("--cutmix", "augment.cutmix", "Likewise; --cutmix_minmax is not there."),
    Name("--mixup_prob", "augment.mix_probability"),
    Name("--mixup_switch_prob", "augment.mix_switch"),
    Name("--mixup_mode", "", "As `batch`."),
    Name("--smoothing", "objective.label_smoothing"),
    Name("--reprob", "augment.erase", "As --remode pixel, --recount 1."),
    Name("--aa", "data.randaugment", "Policies that begin with `rand` alone."),
    Name("--num_sample", "data.samples_per_clip"),
    Name(
        *("--test_num_segment", "data.views"),
        "There of the test after training, here of every evaluation.",
    ),
    Name("--test_num_crop", "data.crops", "Likewise; 1 or 3."),
    Name(
        *("--model_ema", "ema"),
        "With --model_ema_decay's value, 0.9999 by default; there it is saved and "
        "never evaluated.",
    ),
    Name("--use_checkpoint", "compute.remat=blocks"),
    Name("--finetune", "init_from.checkpoint_path"),
    Name("--nb_classes", "model.classes", "0 takes the data set's."),
    Name("--data_path", "data.dir"),
    Name("--save_ckpt_freq", "checkpoint.every_steps", "Epochs there, updates here."),
    Name("--eval", "mode=eval"),
    Name("--seed", "seed"),
]

SCENIC = [
    Name(
        *("masked_feature_loss.masking_strategy", "mask.rgb.kind"),
        "`tube` is for its model of video alone; sound is always `random`.",
    ),
    Name(
        "masked_feature_loss.token_mask_probability_dict",
        "mask.rgb.ratio mask.spectrogram.ratio",
    ),
    Name("masked_feature_loss.target", "modalities"),
    Name(
        *("standardise_per_patch", "objective.target.rgb=standardised"),
        "Of both modalities there, each has its own here; False is `raw`.",
    ),
    Name(
        "standardise_per_patch_channels",
        "objective.target.rgb=standardised_channels",
        "Of the picture alone.",
    ),
    Name(
        *("select_central_frame", "objective.target.rgb=central_frame"),
        "Standardised too: `standardised_central_frame`.",
    ),
    Name("reconstruct_grayscale", "objective.target.rgb=grey", "Never standardised."),
    Name(
        *("modality_weight", "objective.weights.rgb objective.weights.spectrogram"),
    ),
    Name("loss_unmasked_tokens", "objective.unmasked"),
    Name("normalise_by_output_dimension", "", "Always."),
    Name("model.encoder_strategy='concat_and_encode'", "model.fusion=early"),
    Name("model.encoder_strategy='same_encoder'", "model.fusion=shared"),
    Name("model.encoder_strategy='separate_encoders'", "model.fusion=separate"),
    Name("model.encoder_strategy='separate_encoders_and_concat'", "model.fusion=mid"),
    Name("model.fusion_layers", "model.fusion_layers"),
    Name("model.decoder_strategy='same_decoder'", "model.decoder.kind=shared"),
    Name("model.decoder_strategy='separate_decoders'", "model.decoder.kind=separate"),
    Name("model.decoder_strategy='concat_and_decode'", "model.decoder.kind=joint"),
    Name(
        "decoder_config.hidden_size, num_layers, num_heads, mlp_dim",
        "model.decoder.width model.decoder.depth model.decoder.heads model.decoder.mlp",
    ),
    Name("decoder_config.use_projection_bias", "model.decoder.bias"),
    Name(
        *("model.use_inpainting", "objective.kind=inpaint"),
        "With `objective.inpaint_layout=scenic`; its shuffle_inpainted_tokens has no "
        "counterpart.",
    ),
    Name("model.use_modality_tokens", "model.modality_embeddings"),
    Name(
        *("model.normalise_encoder_output", "model.norm model.decoder.norm"),
        "One flag for both there.",
    ),
    Name(
        "model.positional_embedding, positional_embedding_decoder",
        "model.positions model.decoder.positions",
        "`sinusoidal_1d` is `sinusoidal`, `learned_1d` is `learned`.",
    ),
    Name(
        "model.hidden_size, num_layers, num_heads, mlp_dim, patches.size",
        "model.variant model.width model.depth model.heads model.mlp",
        "Tubes as with temporal_encoding_config.method '3d_conv'.",
    ),
    Name(
        *("model.use_bottleneck", "model.fusion=bottleneck"),
        "False is `cross`.",
    ),
    Name("model.n_bottlenecks", "model.bottlenecks"),
    Name("model.test_with_bottlenecks", "model.bottlenecks_at_test"),
    Name("model.share_encoder", "model.share_encoder"),
    Name("model.fusion_layer", "model.fusion_layer", "From the first layer in both."),
    Name("model.modality_fusion", "modalities"),
    Name(
        *("model.classifier", "model.pool"),
        "`gap` is `mean`, `gmp` `max`, `gsp` `sum`, `token` with `model.cls_token`.",
    ),
    Name("model.representation_size", "model.representation", "None is 0."),
    Name(
        *("model.freeze_backbone", "probe=linear"),
        "There a BatchNorm without parameters stands before the head, if it is not "
        "switched off, here a LayerNorm (`model.head_norm`).",
    ),
    Name(
        "model.stochastic_droplayer_rate",
        "model.drop_path model.drop_path_rescale=False",
    ),
    Name("model.dropout_rate, attention_dropout_rate", "", "0, as in its configs."),
    Name(
        *("mixup.alpha", "augment.mixup"),
        "One draw for each device there, one for the batch here.",
    ),
    Name("mixmod", "augment.mix_per_modality"),
    Name(
        "spec_augment_params.freq_mask_count, freq_mask_max_bins",
        "augment.frequency_masks augment.frequency_width",
    ),
    Name(
        "spec_augment_params.time_mask_count, time_mask_max_frames",
        "augment.time_masks augment.time_width",
        "Its configs say 4 and 48, but with time_mask_max_ratio 0 no band is made: 0 "
        "and 0 here.",
    ),
    Name("spec_augment_params.time_warp_…", "", "There is no warp here."),
    Name("circular_time_shift", "augment.time_shift"),
    Name("random_flip", "augment.flip", "True is 0.5."),
    Name(
        *("augmentation_params.do_jitter_scale", "data.crop=jitter"),
        "The factors are .9 and 1.33.",
    ),
    Name("augmentation_params.crop_and_resize_video_mae", "data.crop=multiscale"),
    Name(
        "augmentation_params.prob_color_augment, prob_color_drop",
        "augment.colour augment.grey",
    ),
    Name("dataset_configs.num_frames, stride", "data.num_frames data.stride"),
    Name(
        *("dataset_configs.train_frame_sampling_mode", "data.sampling"),
        "`random` is `dense`, `segment` is `segments`.",
    ),
    Name(
        *("dataset_configs.num_spec_frames", "data.audio_seconds"),
        "Pieces of 100 rows, which are seconds.",
    ),
    Name(
        "dataset_configs.min_resize_train, min_resize_test, crop_size",
        "data.short_side data.size",
        "One short side for both here.",
    ),
    Name(
        *("dataset_configs.zero_centering", "picture.mean picture.std"),
        "True is .5 and .5, False 0 and 1.",
    ),
    Name(
        "dataset_configs.normalization_mean_spec, normalization_std_spec",
        "spectrogram.mean spectrogram.std spectrogram.normalise=fixed",
    ),
    Name(
        *("dataset_configs.inflate_spectrograms", "model.sound_channels=3"),
        "True where it is not said there.",
    ),
    Name("dataset_configs.num_test_clips", "data.views"),
    Name("dataset_configs.do_three_spatial_crops", "data.crops=3"),
    Name("batch_size", "batch_size", "Of all devices in both."),
    Name("num_training_epochs", "epochs"),
    Name(
        *("lr_configs.base_learning_rate", "schedule.learning_rate_per_256"),
        "Of the whole batch there, per 256 clips here: 1.6 of 128 clips is 3.2.",
    ),
    Name(
        *("lr_configs.warmup_steps", "schedule.warmup_epochs schedule.kind=scenic"),
        "Updates there, epochs here.",
    ),
    Name(
        *("lr_configs.alpha", "schedule.floor_per_256"),
        "A fraction of the highest there, a learning rate per 256 clips here.",
    ),
    Name(
        *("optimizer='adam', explicit_weight_decay", "optimizer.name=adam"),
        "With `optimizer.weight_decay`; of kernels alone in both.",
    ),
    Name("optimizer='momentum', momentum", "optimizer.name=sgd optimizer.b1"),
    Name("optimizer_configs.layerwise_decay", "optimizer.layer_decay"),
    Name("max_grad_norm", "optimizer.clip_norm", "None is 0.0."),
    Name("l2_decay_factor", "objective.l2", "Pretraining alone here."),
    Name("label_smoothing", "objective.label_smoothing", "None is 0.0."),
    Name("model_dtype_str", "compute.dtype"),
    Name("init_from.checkpoint_path", "init_from.checkpoint_path"),
    Name(
        "checkpoint_steps, log_summary_steps",
        "checkpoint.every_steps log.every_steps",
    ),
    Name(
        "log_eval_steps, dataset_configs.log_test_epochs",
        "eval.every_epochs",
        "Updates in the first, epochs in the second.",
    ),
    Name("rng_seed", "seed"),
]


# The configs.


def config_of(name: str) -> ConfigDict:
    """The config of configs/<name>.py."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def fields(tree: Mapping, path: str = "") -> dict[str, Any]:
    """{full name of a field: its value}."""
    found = {}
    for key, value in tree.items():
        inside = isinstance(value, ConfigDict)
        found |= fields(value, f"{path}{key}.") if inside else {path + key: value}
    return found


@functools.cache
def defaults(trainer: str) -> dict[str, Any]:
    """A trainer's defaults: of configs/folder, and what AV-MaskEnhancer has besides."""
    own = fields(config_of(f"ucf101/avmaskenhancer_{trainer}"))
    return own | fields(config_of(f"folder/{trainer}"))


# The page.


def code(value: Any) -> str:
    """A value as it is written, text without quotes."""
    return f"`{value if isinstance(value, str) and value else repr(value)}`"


def default(trainer: str, field: str) -> str:
    found = defaults(trainer)
    return code(found[field]) if field in found else "—"


def choices_of(field: str) -> str:
    """The sentence on the choices of a field; '' where it has none."""
    if field not in choices():
        return ""
    found, words = choices()[field]._asdict(), WORDS.get(field, {})
    listed = []
    for name in dict.fromkeys(itertools.chain(*found.values())):
        takes = [trainer for trainer, names in found.items() if name in names]
        said = [words[name]] if words.get(name) else []
        if len(takes) < len(found):
            said.append(f"{takes[0]} alone")
        listed.append(code(name) + (f" ({', '.join(said)})" if said else ""))
    return f" Choices: {', '.join(listed)}."


def row(field: str) -> str:
    """A line of a group's table."""
    cells = [code(field), *(default(trainer, field) for trainer in TRAINERS)]
    return f"| {' | '.join(cells)} | {MEANINGS[field]}{choices_of(field)} |"


def group_of(field: str) -> str:
    return field.split(".")[0] if "." in field else "top level"


def section(group: str, names: Iterable[str]) -> str:
    """A heading and the table of a group's fields."""
    head = [
        "| field | pretrain | finetune | meaning and choices |",
        "|---|---|---|---|",
    ]
    return "\n".join([f"## {group}\n", *head, *map(row, names)])


def elsewhere(names: Iterable[Name]) -> str:
    """A table of other names."""
    head = ["| there | here | what differs |", "|---|---|---|"]
    rows = []
    for theirs, ours, differs in names:
        here = ", ".join(map(code, ours.split())) or "—"
        rows.append(f"| `{theirs}` | {here} | {differs} |")
    return "\n".join([*head, *rows])


TEXT = """\
# The fields of a config

Written by `JAX_PLATFORMS=cpu python docs/config.py`; do not edit it by hand.

Defaults are those of configs/folder/pretrain.py and configs/folder/finetune.py (of
`model.sound`, those of configs/ucf101/avmaskenhancer_*.py), — where the trainer has no
such field. Every config has every field of its trainer: change one on the command line,
`--config.data.stride=2`, `--config.modalities="('rgb',)"`. Another name, type or choice
is refused before anything runs.

{sections}

## Names elsewhere

### VideoMAE

Options of MCG-NJU/VideoMAE's run_mae_pretraining.py and run_class_finetuning.py.

{videomae}

### Scenic

Fields of google-research/scenic's projects/av_mae configs.

{scenic}
"""


def page() -> str:
    """The text of docs/config.md."""
    groups = itertools.groupby(MEANINGS, group_of)
    sections = "\n\n".join(section(group, names) for group, names in groups)
    return TEXT.format(
        sections=sections, videomae=elsewhere(VIDEOMAE), scenic=elsewhere(SCENIC)
    )


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    (ROOT / "docs" / "config.md").write_text(page(), encoding="utf-8")
    print(f"docs/config.md: {len(MEANINGS)} fields")


if __name__ == "__main__":
    main()
