"""EPIC-KITCHENS-100 finetuning of Audiovisual MAE L/16x2 (Georgescu et al., ICCV 2023).

    python -m data.prepare --dataset epic-kitchens-100 --videos VIDEOS --lists LISTS \
        --out datasets/epic-kitchens-100
    python -m av_mae.main --config=configs/epic_kitchens/finetune.py \
        --workdir=runs/epic_kitchens \
        --config.init_from.checkpoint_path=runs/pretrain

Two heads on the same features, 97 verbs and 300 nouns; the log has the top-1 of verb,
noun and action (both right). Data: 67,217 training and 9,668 validation segments, 25
frames a second, short side 256. The paper pretrains on AudioSet or VGGSound (their
pretrain.py); nothing is pretrained on these data.

The published recipe was never released. Here stands that of vggsound/finetune.py with
what the data ask for, which is our choice: 32 frames at stride 2 (2.56 s) and the 4 s
of sound about them, since most segments are short; no mirroring, for left and right
hands. Result, published: 71.4 top-1 of verbs, with picture and sound; of this config
none: it has not been run at full size. Hardware: not told.

Variants, several with commas between: `:audio`, `:video`, one modality alone. `:smoke`,
a run of seconds on a CPU.
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
    config.batch_size = 64
    config.epochs = 50.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/epic-kitchens-100",
        split="train",
        fps=25.0,
        num_frames=32,
        stride=2,
        sampling="dense",
        size=224,
        short_side=256,
        crop="jitter",
        audio_seconds=4.0,
        audio_align="window",
        samples_per_clip=1,
        views=4,
        crops=1,
        threads=16,
        workers=0,
        cache=False,
        resize="antialias",
        missing_modalities=True,
        limit=0,
        source="records",
        skip_bad_records=0,
        prepared=dict(fps="25", short_side="256"),
        randaugment="",
    )

    config.picture = dict(normalise="fixed", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.spectrogram = dict(preset="mbt", normalise="none", mean=0.0, std=1.0)

    config.model = dict(
        variant="L/16x2",
        width=0,
        depth=0,
        heads=0,
        mlp=0,
        classes=0,
        label_heads=(("verb", 97), ("noun", 300)),
        fusion="bottleneck",
        fusion_layer=16,
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
        positions="sinusoidal",
        modality_embeddings=False,
        cls_token=False,
        block=dict(
            gelu="tanh", eps=1e-6, key_bias=True, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=True,
        drop_path=0.3,
        drop_path_rescale=False,
    )
    config.probe = "full"
    config.objective = dict(kind="softmax", label_smoothing=0.3)
    config.augment = dict(
        flip=0.0,
        time_shift=False,
        mixup=0.5,
        cutmix=0.0,
        mix_probability=1.0,
        mix_switch=0.5,
        mix_per_modality=True,
        colour=0.8,
        grey=0.1,
        erase=0.0,
        frequency_masks=1,
        frequency_width=48,
        time_masks=0,
        time_width=0,
        corruption="",
    )

    config.optimizer = dict(
        name="sgd",
        b1=0.9,
        weight_decay=0.0,
        decay_rules=((".*", 0.0),),
        clip_norm=1.0,
        layer_decay=0.75,
    )
    config.schedule = dict(
        learning_rate_per_256=3.2, warmup_epochs=2.5, floor_per_256=0.0, kind="scenic"
    )

    config.ema = 0.0
    config.nonfinite = "stop"

    config.parallel = dict(data=-1, fsdp=1)
    config.compute = dict(
        dtype="bfloat16",
        accumulate=1,
        scan=True,
        remat="none",
        attention="auto",
    )

    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=100)
    config.eval = dict(
        every_epochs=5.0,
        split="validation",
        batch_size=64,
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
        config.model.width, config.model.depth = 32, 3
        config.model.heads, config.model.mlp = 2, 64
        config.model.label_heads = (("verb", 0), ("noun", 0))
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
