"""Pretraining on the built-in digits: minutes on two CPU cores.

    python -m data.digits --out datasets/digits_clips
    python -m data.prepare datasets/digits_clips/clips.csv --out datasets/digits \
        --short-side source
    python -m av_mae.main --config=configs/digits/pretrain.py --workdir=runs/pretrain

`make demo` does all of this. The result stands in the README. The encoder has no norms
(`model.norm`): where each modality has one before the joint layers, as published, these
layers learn on inputs that they do not meet in finetuning, where there is none; a few
hundred updates do not make up for that. Half of the picture is masked, not nine tenths:
with three quarters, 850 updates of noisy pictures do not get beyond the mean picture.

Variants: `:audio`, `:video`, one modality alone. `:inpaint`, each modality predicted
from the other (Georgescu et al., ICCV 2023). `:running_cell`, half of the masked tokens
of either decoded, by VideoMAE V2's running cells (Wang et al., CVPR 2023).
`:cross`, mask tokens that attend to the encoded ones alone (CrossMAE, Fu et al. 2024).
`:smoke` (`:cross,smoke`) is a run of seconds, for testing.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("audio video inpaint running_cell cross", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "pretrain"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 32
    config.epochs = 12.0
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
        limit=0,
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
        fusion="mid",
        fusion_layers=2,
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
    config.model.decoder = dict(
        kind="shared",
        width=96,
        depth=1,
        heads=3,
        mlp=384,
        positions="fourier",
        bias=True,
        eps=1e-6,
        norm=True,
    )

    config.mask = dict(
        rgb=dict(kind="random", ratio=0.5), spectrogram=dict(kind="random", ratio=0.7)
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
    config.augment = dict(
        flip=0.0,
        time_shift=True,
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
        learning_rate_per_256=1.6e-2,
        warmup_epochs=1.0,
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

    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=100, pictures=4)
    config.eval = dict(every_epochs=12.0, split="test", batch_size=128, modalities=())

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
    if words.inpaint:
        config.objective.kind = "inpaint"
    if words.running_cell:
        config.objective.decode = dict(kind="running_cell", share=0.5)
    if words.cross:
        config.model.decoder.kind = "cross"
    if words.smoke:
        config.steps = 4
        config.batch_size = config.eval.batch_size = 4
        config.data.num_frames, config.data.size, config.data.short_side = 4, 32, 32
        config.data.audio_seconds = 0.64
        config.data.threads = 2
        config.model.width, config.model.depth = 48, 3
        config.model.heads, config.model.mlp = 2, 64
        config.model.decoder.width, config.model.decoder.depth = 48, 1
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
