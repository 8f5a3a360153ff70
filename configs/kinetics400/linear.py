"""Linear probe on Kinetics-400: how good are features that are not trained on it.

    python -m av_mae.main --config=configs/kinetics400/linear.py:B \
        --workdir=runs/linear \
        --config.init_from.checkpoint_path=runs/pretrain

The protocol is MAE's (He et al., CVPR 2022; main_linprobe.py and FINETUNE.md of
facebookresearch/mae): a frozen encoder, 90 epochs with 10 of warm-up at .1 per 256, no
decay, no regulariser, random resized crops and mirroring alone. Ours differs in three
points: SGD with momentum .9 and 1,024 clips an update in place of LARS and 16,384; a
LayerNorm before the head in place of a BatchNorm without weights; the mean over tokens
in place of a class token, which VideoMAE has not. An earlier layer is probed by
`--config.model.depth=10`.

Data, prepared and tested as in kinetics400/finetune.py. Hardware of MAE's: 32 GPUs, for
pictures. Result: MAE publishes 68.0 / 75.8 / 76.6 top-1 of B / L / H on ImageNet; for
these data none is known to us. Variants: `:S`, `:B` (the default), `:L`, `:H`; `:smoke`
(`:S,smoke`), a run of seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("S B L H", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "finetune"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb",)
    config.batch_size = 1024
    config.epochs = 90.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/kinetics400",
        split="train",
        fps=30.0,
        num_frames=16,
        stride=4,
        sampling="stretched",
        size=224,
        short_side=224,
        crop="resized",
        audio_seconds=10.0,
        audio_align="proportional",
        samples_per_clip=1,
        views=5,
        crops=3,
        threads=16,
        workers=0,
        cache=False,
        resize="bilinear",
        missing_modalities=True,
        limit=0,
        source="records",
        skip_bad_records=0,
        prepared=dict(fps="source", short_side="320"),
        randaugment="",
    )

    config.picture = dict(
        normalise="fixed", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    config.spectrogram = dict(preset="mbt", normalise="none", mean=0.0, std=1.0)

    config.model = dict(
        variant="B/16x2",
        width=0,
        depth=0,
        heads=0,
        mlp=0,
        classes=400,
        label_heads=(),
        fusion="separate",
        fusion_layer=0,
        bottlenecks=4,
        bottlenecks_at_test=True,
        share_encoder=False,
        sound_channels=1,
        pool="mean",
        representation=0,
        head_norm=True,
        head_eps=1e-6,
        head_init=0.5,
        head_dropout=0.0,
        positions="sinusoidal",
        modality_embeddings=False,
        cls_token=False,
        block=dict(
            gelu="erf", eps=1e-6, key_bias=False, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=True,
        drop_path=0.0,
        drop_path_rescale=True,
    )
    config.probe = "linear"
    config.objective = dict(kind="softmax", label_smoothing=0.0)
    config.augment = dict(
        flip=0.5,
        time_shift=False,
        mixup=0.0,
        cutmix=0.0,
        mix_probability=1.0,
        mix_switch=0.5,
        mix_per_modality=False,
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
        name="sgd",
        b1=0.9,
        weight_decay=0.0,
        decay_rules=((".*", 0.0),),
        clip_norm=0.0,
        layer_decay=1.0,
    )
    config.schedule = dict(
        learning_rate_per_256=0.1, warmup_epochs=10.0, floor_per_256=0.0, kind="scenic"
    )

    config.ema = 0.0
    config.nonfinite = "stop"

    config.parallel = dict(data=-1, fsdp=1)
    config.compute = dict(
        dtype="bfloat16",
        accumulate=1,
        scan=False,
        remat="none",
        attention="auto",
    )

    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=100)
    config.eval = dict(
        every_epochs=25.0,
        split="validation",
        batch_size=64,
        average="probabilities",
        modalities=(),
        corruption="",
    )

    config.init_from = dict(
        checkpoint_path="",
        rgb=dict(checkpoint_path=""),
        spectrogram=dict(checkpoint_path=""),
        weights="params",
        allow_fresh=(),
        allow_unused=(),
    )

    for size in "SLH":
        if words[size]:
            config.model.variant = f"{size}/16x2"
            config.compute.scan = size != "S"
    if words.smoke:
        config.steps = 4
        config.batch_size = config.eval.batch_size = 4
        config.data.num_frames, config.data.size, config.data.short_side = 4, 32, 32
        config.data.audio_seconds = 0.64
        config.data.threads = 2
        config.model.width, config.model.depth = 32, 3
        config.model.heads, config.model.mlp = 2, 64
        config.model.classes = 0
        config.model.fusion_layer = 1
        config.compute.dtype = "float32"
        config.checkpoint.every_steps = config.log.every_steps = 2
    return config


def chosen(arg):
    """{word of VARIANTS: whether `arg`, words with commas between, names it}."""
    words = ml_collections.ConfigDict(dict.fromkeys(" ".join(VARIANTS).split(), False))
    for word in filter(None, arg.split(",")):
        try:
            words[word] = words[word] or True
        except KeyError as error:
            near = error.args[0].splitlines()[1:]  # did you mean …?
            text = [f"there is no variant {word!r} of this config.", *near]
            text.append(f"It has {', '.join(words)} (several with commas).")
            raise ValueError(" ".join(text)) from None
    for group in VARIANTS:
        if sum(words[word] for word in group.split()) > 1:
            raise ValueError(f"of the variants {group.replace(' ', ', ')} take one.")
    return words
