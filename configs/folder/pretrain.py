"""Pretraining on your own folder of clips (S/16x2, one GPU).

    python -m data.prepare MY_FOLDER --out datasets/folder
    python -m av_mae.main --config=configs/folder/pretrain.py --workdir=runs/pretrain

MY_FOLDER holds video files, flat or in one sub-folder for each class, or is a CSV. The
sound of a sample is centred on its frames, so that long videos fit as well as short
ones. No expected result: the data are yours. Variants: `:audio`, `:video`, one modality
alone; `:smoke` (`:audio,smoke`), a run of seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("audio video", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "pretrain"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 64
    config.epochs = 200.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/folder",
        split="train",
        fps=25.0,
        num_frames=16,
        stride=4,
        sampling="dense",
        size=224,
        short_side=256,
        crop="random",
        audio_seconds=4.0,
        audio_align="window",
        samples_per_clip=1,
        views=1,
        crops=1,
        threads=8,
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
    config.spectrogram = dict(preset="mbt", normalise="dataset", mean=0.0, std=1.0)

    config.model = dict(
        variant="S/16x2",
        width=0,
        depth=0,
        heads=0,
        mlp=0,
        fusion="mid",
        fusion_layers=2,
        positions="sinusoidal",
        modality_embeddings=False,
        cls_token=False,
        block=dict(
            gelu="tanh", eps=1e-6, key_bias=True, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=True,
        drop_path=0.0,
        drop_path_rescale=False,
    )
    config.model.decoder = dict(
        kind="shared",
        width=192,
        depth=4,
        heads=3,
        mlp=768,
        positions="sinusoidal",
        bias=True,
        eps=1e-6,
        norm=True,
    )

    config.mask = dict(
        rgb=dict(kind="tube", ratio=0.9), spectrogram=dict(kind="random", ratio=0.7)
    )
    config.objective = dict(
        kind="reconstruct",
        inpaint_layout="own",
        target=dict(rgb="standardised", spectrogram="standardised"),
        weights=dict(rgb=0.5, spectrogram=0.5),
        unmasked=False,
        l2=0.0,
        decode=dict(kind="all", share=1.0),
        masks_per_clip=1,
    )
    config.augment = dict(
        flip=0.5,
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
        learning_rate_per_256=3e-4, warmup_epochs=10.0, floor_per_256=0.0, kind="scenic"
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
    config.log = dict(every_steps=100, pictures=4)
    config.eval = dict(
        every_epochs=10.0, split="validation", batch_size=64, modalities=()
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
        config.model.decoder.width, config.model.decoder.depth = 32, 1
        config.model.decoder.heads, config.model.decoder.mlp = 2, 64
        config.compute.dtype = "float32"
        config.checkpoint.every_steps = config.log.every_steps = 2
        config.log.pictures = 1
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
