"""VGGSound pretraining of Audiovisual MAE L/16x2 (Georgescu et al., ICCV 2023).

    python -m data.prepare --dataset vggsound --videos VIDEOS --lists LISTS \
        --out datasets/vggsound
    python -m av_mae.main --config=configs/vggsound/pretrain.py --workdir=runs/pretrain

Data: 172,427 training clips when it was published, 8 s of sound of each, at 25 frames a
second with a short side of 256. The recipe is Scenic's
projects/av_mae/configs/vggsound/pretrain.py: the encoders never meet, and are trained
together by the one decoder. Hardware: not told. Result, published,
after finetuning: 65.0 / 57.2 / 50.3 top-1 with both / sound / picture.

Variants, several with commas between: `:audio`, `:video`, one modality alone.
`:consistent`, the log-mels less the data set's mean and by its deviation
(`python -m av_mae.stats datasets/vggsound`), here and in finetuning, where both are raw
as published: it divides the loss of sound by their variance, which shifts the balance
with that of the picture. `:smoke`, a run of seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("audio video", "consistent", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "pretrain"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 512
    config.epochs = 400.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/vggsound",
        split="train",
        fps=25.0,
        num_frames=16,
        stride=4,
        sampling="dense",
        size=224,
        short_side=256,
        crop="random",
        audio_seconds=8.0,
        audio_align="proportional",
        samples_per_clip=1,
        views=1,
        crops=1,
        threads=16,
        workers=0,
        cache=False,
        resize="bilinear",
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
        fusion="separate",
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
        rgb=dict(kind="random", ratio=0.9), spectrogram=dict(kind="random", ratio=0.5)
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
        name="adam",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        decay_rules=((".*kernel", 1.0), (".*", 0.0)),
        clip_norm=0.0,
        layer_decay=1.0,
    )
    config.schedule = dict(
        learning_rate_per_256=1.5e-4,
        warmup_epochs=4.0,
        floor_per_256=0.0,
        kind="scenic",
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
    config.log = dict(every_steps=100, pictures=4)
    config.eval = dict(every_epochs=20.0, split="test", batch_size=512, modalities=())

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
    if words.consistent:
        config.spectrogram.normalise = "dataset"
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
