"""UCF101 pretraining of VideoMAE ViT-B (Tong et al., NeurIPS 2022), on UCF101 alone.

    python -m data.prepare --dataset ucf101 --videos VIDEOS --lists LISTS \
        --out datasets/ucf101
    python -m av_mae.main --config=configs/ucf101/pretrain.py --workdir=runs/pretrain

Video only, no mirroring, no colour. Data: the 9,537 training clips of split 1, as they
are (25 frames a second, short side 240). The recipe is MCG-NJU/VideoMAE's
scripts/ucf101/videomae_vit_base_patch16_224_tubemasking_ratio_0.75_epoch_3200, which
speaks of 8 GPUs. Result, published, after finetuning: 91.3 top-1.

Variants, several with commas between: `:av`, with 2.56 s of the sound of the clips that
have one (about half of the classes), joined in the last two layers as in AV-MAE;
measure it with `python -m av_mae.stats datasets/ucf101`. No published result.
`:1gpu`, the published 192 clips an update in eight parts of 24. `:smoke`, a run of
seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("av", "1gpu", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "pretrain"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb",)
    config.batch_size = 192
    config.epochs = 3200.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/ucf101",
        split="train",
        fps=25.0,
        num_frames=16,
        stride=4,
        sampling="held",
        size=224,
        short_side=240,
        crop="multiscale",
        audio_seconds=2.56,
        audio_align="window",
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
        prepared=dict(fps="source", short_side="source"),
        randaugment="",
    )

    config.picture = dict(
        normalise="fixed", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    config.spectrogram = dict(preset="mbt", normalise="dataset", mean=0.0, std=1.0)

    config.model = dict(
        variant="B/16x2",
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
            gelu="erf", eps=1e-6, key_bias=False, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=True,
        drop_path=0.0,
        drop_path_rescale=True,
    )
    config.model.decoder = dict(
        kind="separate",
        width=384,
        depth=4,
        heads=6,
        mlp=1536,
        positions="sinusoidal",
        bias=False,
        eps=1e-6,
        norm=True,
    )

    config.mask = dict(
        rgb=dict(kind="tube", ratio=0.75), spectrogram=dict(kind="random", ratio=0.7)
    )
    config.objective = dict(
        kind="reconstruct",
        inpaint_layout="own",
        target=dict(rgb="standardised_channels_unbiased", spectrogram="raw"),
        weights=dict(rgb=1.0, spectrogram=0.0),
        unmasked=False,
        l2=0.0,
        decode=dict(kind="all", share=1.0),
        masks_per_clip=1,
    )
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
        learning_rate_per_256=3e-4,
        warmup_epochs=40.0,
        floor_per_256=1e-5,
        kind="videomae",
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
    config.eval = dict(every_epochs=100.0, split="test", batch_size=192, modalities=())

    config.init_from = dict(
        checkpoint_path="",
        rgb=dict(checkpoint_path=""),
        spectrogram=dict(checkpoint_path=""),
        weights="params",
        allow_fresh=(),
        allow_unused=(),
    )

    if words.av:
        config.modalities = ("rgb", "spectrogram")
        config.model.fusion, config.model.decoder.kind = "mid", "shared"
        config.objective.weights = dict(rgb=0.5, spectrogram=0.5)
    if words["1gpu"]:
        config.batch_size, config.compute.accumulate = 24, 8
        config.eval.batch_size = 24
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
