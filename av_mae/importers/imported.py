"""What reading a published file gives, and how its config is put together.

A config has three sources, in this order: what the file tells (shapes and names), what
the user says by an option, and what the publication says. The neutral rest is in
`template`. Nothing is guessed silently: `configure` writes a sentence on what it had to
assume.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from av_mae import CheckpointError, ConfigError


class Row(NamedTuple):
    """A parameter of the source, of ours, or both; '' where one has no counterpart."""

    source: str  # its name in the file; where several become one, each has its row
    target: str  # our '/'-joined name
    note: str  # how it was changed, or why it is left out


@dataclasses.dataclass(frozen=True)
class Imported:
    """A published model as one of ours.

    config: a complete config tree; params: nested dict of numpy arrays by our names;
    rows: every parameter of the source and of ours; notes: sentences for the report;
    labels: names of the classes in the order of the head, where the source has them
    ({head: names} of several); meta: what a folder of ours tells beside them.
    """

    config: ConfigDict
    params: dict[str, Any]
    rows: list[Row]
    notes: list[str]
    labels: list[str] | dict[str, list[str]] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def report(self) -> str:
        """The rows as a table, then the notes, as text for a terminal."""
        lines = [("source", "ours", "")]
        lines += [
            (r.source or "(none)", r.target or "(left)", r.note) for r in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
        table = [
            f"{source:<{widths[0]}}  {target:<{widths[1]}}  {note}".rstrip()
            for source, target, note in lines
        ]
        return "\n".join([*table, *self.notes])


def template(trainer: str) -> ConfigDict:
    """The whole config tree of a trainer ('pretrain' or 'finetune') at neutral values.

    A clip of 16 frames at stride 4 and 224 pixels with 10 s of sound, float32, AdamW.
    """
    config = ConfigDict()
    config.trainer = trainer
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 8
    config.epochs = 1.0
    config.steps = 0
    config.dry_run = False
    config.data = _data()
    config.picture = dict(normalise="fixed", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.spectrogram = dict(preset="mbt", normalise="none", mean=0.0, std=1.0)
    config.model = _model()
    config.augment = dict(
        flip=0.0,
        time_shift=False,
        colour=0.0,
        grey=0.0,
        erase=0.0,
        frequency_masks=0,
        frequency_width=0,
        time_masks=0,
        time_width=0,
        corruption="",
    )
    config.optimizer = dict(
        name="adamw",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        decay_rules=((".*kernel", 1.0), (".*", 0.0)),
        clip_norm=0.0,
        layer_decay=1.0,
    )
    config.schedule = dict(
        learning_rate_per_256=1e-3, warmup_epochs=0.0, floor_per_256=0.0, kind="scenic"
    )
    config.parallel = dict(data=-1, fsdp=1)
    config.ema = 0.0
    config.nonfinite = "stop"
    config.compute = dict(
        dtype="float32", accumulate=1, scan=False, remat="none", attention="auto"
    )
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=100)
    config.eval = dict(every_epochs=1.0, split="test", batch_size=8, modalities=())
    config.init_from = dict(
        checkpoint_path="",
        rgb=dict(checkpoint_path=""),
        spectrogram=dict(checkpoint_path=""),
        weights="params",
        allow_fresh=(),
        allow_unused=(),
    )
    {"pretrain": _pretraining, "finetune": _finetuning}[trainer](config)
    return config


def _data() -> dict:
    return dict(
        dir="",
        split="train",
        fps=25.0,
        num_frames=16,
        stride=4,
        sampling="dense",
        size=224,
        short_side=256,
        crop="random",
        audio_seconds=10.0,
        audio_align="proportional",
        samples_per_clip=1,
        views=1,
        crops=1,
        threads=16,
        workers=0,
        cache=False,
        resize="antialias",
        missing_modalities=True,
        limit=0,
        source="records",
        skip_bad_records=0,
        prepared=dict(fps="", short_side=""),
        randaugment="",
    )


def _model() -> dict:
    return dict(
        variant="B/16x2",
        width=0,
        depth=0,
        heads=0,
        mlp=0,
        fusion="separate",
        block=dict(
            gelu="tanh", eps=1e-6, key_bias=True, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=True,
        positions="sinusoidal",
        modality_embeddings=False,
        cls_token=False,
        drop_path=0.0,
        drop_path_rescale=False,
    )


def _pretraining(config: ConfigDict):
    config.model.fusion_layers = 2
    config.model.decoder = dict(
        kind="shared",
        width=512,
        depth=4,
        heads=8,
        mlp=2048,
        positions="sinusoidal",
        bias=True,
        eps=1e-6,
        norm=True,
    )
    config.mask = dict(
        rgb=dict(kind="random", ratio=0.9), spectrogram=dict(kind="random", ratio=0.7)
    )
    config.objective = dict(
        kind="reconstruct",
        inpaint_layout="own",
        target=dict(rgb="raw", spectrogram="raw"),
        weights=dict(rgb=0.5, spectrogram=0.5),
        unmasked=False,
        l2=0.0,
        decode=dict(kind="all", share=1.0),
        masks_per_clip=1,
    )
    config.log.pictures = 4


def _finetuning(config: ConfigDict):
    config.model.update(
        classes=0,
        label_heads=(),
        fusion_layer=0,
        bottlenecks=4,
        bottlenecks_at_test=True,
        share_encoder=False,
        sound_channels=1,
        pool="mean",
        representation=0,
        head_norm=False,
        head_eps=1e-6,
        head_init=0.0,
        head_dropout=0.0,
    )
    config.probe = "full"
    config.objective = dict(kind="softmax", label_smoothing=0.0)
    config.eval.update(average="logits", corruption="")
    config.augment.update(
        mixup=0.0,
        cutmix=0.0,
        mix_probability=1.0,
        mix_switch=0.5,
        mix_per_modality=False,
    )


def configure(
    trainer: str,
    found: Mapping[str, Any],
    assumed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[ConfigDict, list[str]]:
    """(config, sentences on what was assumed), all fields by dotted name.

    found: what the file tells; assumed: what the publication says; options: what the
    user says. Raises ConfigError for an option that is no field or of another type,
    CheckpointError for one that contradicts the file.
    """
    config = template(trainer)
    for name, value in options.items():
        if name in found and _plain(found[name]) != _plain(value):
            raise CheckpointError(
                f"{name} is {value!r}, but the file says {found[name]!r}: leave the "
                "option out."
            )
    for name, value in {**assumed, **options, **found}.items():
        _set(config, name, value)
    left = [
        f"{name}={_plain(value)!r}"
        for name, value in assumed.items()
        if name not in found and name not in options
    ]
    text = f"Not in the file, taken from the publication: {', '.join(left)}."
    return config, [text] if left else []


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _set(config: ConfigDict, name: str, value):
    """Sets a field by dotted name; the type of a field does not change."""
    *parents, last = name.split(".")
    place = config
    for parent in parents:
        place = place[parent] if parent in place else None
        if not isinstance(place, ConfigDict):
            break
    if not isinstance(place, ConfigDict) or last not in place:
        raise ConfigError(f"{name} is no field of a {config.trainer} config.")
    if isinstance(place[last], ConfigDict):
        raise ConfigError(f"{name} is a group of fields: set one of them.")
    try:
        place[last] = value
    except TypeError as error:
        kind = type(place[last]).__name__
        raise ConfigError(
            f"{name} is {value!r}: it has to be of type {kind}."
        ) from error
