"""Linear probe on digits: what a frozen pretrained model knows of them.

    python -m av_mae.main --config=configs/digits/linear.py --workdir=runs/linear \
        --config.init_from.checkpoint_path=runs/pretrain

The labels of digits/finetune.py, the protocol of MAE (He et al., CVPR 2022) as told in
kinetics400/linear.py: 90 epochs with 10 of warm-up, no decay, no regulariser, a
LayerNorm before the head; the rate per 256 clips is that of MAE times 8, since an
update has 20. Result: docs/digits.md has linear classifiers on frozen features, beside
those of a random encoder, by another protocol. Variants: `:audio`, `:video`, one
modality alone; `:smoke`, a run of seconds.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("audio video", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "finetune"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 20
    config.epochs = 90.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/digits",
        split="train",
        fps=25.0,
        num_frames=8,
        stride=3,
        sampling="dense",
        size=64,
        short_side=64,
        crop="center",
        audio_seconds=2.0,
        audio_align="window",
        samples_per_clip=1,
        views=1,
        crops=1,
        threads=2,
        workers=0,
        cache=True,
        resize="antialias",
        missing_modalities=True,
        limit=200,
        source="records",
        skip_bad_records=0,
        prepared=dict(fps="25", short_side="source"),
        randaugment="",
    )

    config.picture = dict(
        normalise="clip", mean=(0.24, 0.24, 0.24), std=(0.16, 0.16, 0.16)
    )
    config.spectrogram = dict(preset="mbt", normalise="clip", mean=0.0, std=1.0)

    config.model = dict(
        variant="Ti/16x2",
        width=96,
        depth=4,
        heads=3,
        mlp=384,
        classes=10,
        label_heads=(),
        fusion="bottleneck",
        fusion_layer=2,
        bottlenecks=4,
        bottlenecks_at_test=True,
        share_encoder=False,
        sound_channels=1,
        pool="mean",
        representation=0,
        head_norm=True,
        head_eps=1e-6,
        head_init=0.0,
        head_dropout=0.0,
        positions="fourier",
        modality_embeddings=False,
        cls_token=False,
        block=dict(
            gelu="tanh", eps=1e-6, key_bias=True, layer_scale=0.0, qkv_init="aligned"
        ),
        norm=False,
        drop_path=0.0,
        drop_path_rescale=True,
    )
    config.probe = "linear"
    config.objective = dict(kind="softmax", label_smoothing=0.0)
    config.augment = dict(
        flip=0.0,
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
        learning_rate_per_256=0.8,
        warmup_epochs=10.0,
        floor_per_256=0.0,
        kind="scenic",
    )

    config.ema = 0.0
    config.nonfinite = "stop"

    config.parallel = dict(data=-1, fsdp=1)
    config.compute = dict(
        dtype="float32",
        accumulate=1,
        scan=False,
        remat="none",
        attention="auto",
    )

    config.checkpoint = dict(every_steps=200, keep=2)
    config.log = dict(every_steps=20)
    config.eval = dict(
        every_epochs=90.0,
        split="test",
        batch_size=128,
        average="logits",
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

    if words.audio:
        config.modalities = ("spectrogram",)
    if words.video:
        config.modalities = ("rgb",)
    if words.smoke:
        config.steps = 4
        config.batch_size = config.eval.batch_size = 4
        config.data.num_frames, config.data.size, config.data.short_side = 4, 32, 32
        config.data.audio_seconds = 0.64
        config.data.threads = 2
        config.model.width, config.model.depth = 48, 3
        config.model.heads, config.model.mlp = 2, 64
        config.model.classes = 0
        config.data.limit = 20
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
