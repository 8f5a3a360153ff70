"""UCF101 finetuning of VideoMAE ViT-B (Tong et al., NeurIPS 2022).

    python -m data.prepare --dataset ucf101 --videos VIDEOS --lists LISTS \
        --out datasets/ucf101
    python -m av_mae.main --config=configs/ucf101/finetune.py --workdir=runs/finetune \
        --config.init_from.checkpoint_path=runs/pretrain

Data: split 1, 9,537 training and 3,783 test clips, as they are (25 frames a second,
short side 240). The recipe is MCG-NJU/VideoMAE's
scripts/ucf101/videomae_vit_base_patch16_224_tubemasking_ratio_0.75_epoch_3200, which
speaks of 8 GPUs. Result, published: 91.3 top-1 from ucf101/pretrain.py, 96.1 from
Kinetics-400, with 5 clips x 3 crops.

Variants, several with commas between: `:av`, with 2.56 s of the sound of the clips that
have one, meeting in 4 bottlenecks from layer 8 on; no published result. `:smoke`, a run
of seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("av", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "finetune"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb",)
    config.batch_size = 128
    config.epochs = 100.0
    config.steps = 0
    config.dry_run = False

    config.data = dict(
        dir="datasets/ucf101",
        split="train",
        fps=25.0,
        num_frames=16,
        stride=4,
        sampling="stretched",
        size=224,
        short_side=224,
        crop="resized",
        audio_seconds=2.56,
        audio_align="window",
        samples_per_clip=2,
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
        prepared=dict(fps="source", short_side="source"),
        randaugment="rand-m7-n4-mstd0.5-inc1",
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
        classes=101,
        label_heads=(),
        fusion="separate",
        fusion_layer=8,
        bottlenecks=4,
        bottlenecks_at_test=True,
        share_encoder=False,
        sound_channels=1,
        pool="mean",
        representation=0,
        head_norm=True,
        head_eps=1e-6,
        head_init=0.001,
        head_dropout=0.5,
        positions="sinusoidal",
        modality_embeddings=False,
        cls_token=False,
        block=dict(
            gelu="erf", eps=1e-6, key_bias=False, layer_scale=0.0, qkv_init="xavier"
        ),
        norm=False,
        drop_path=0.2,
        drop_path_rescale=True,
    )
    config.probe = "full"
    config.objective = dict(kind="softmax", label_smoothing=0.1)
    config.augment = dict(
        flip=0.5,
        time_shift=False,
        mixup=0.8,
        cutmix=1.0,
        mix_probability=1.0,
        mix_switch=0.5,
        mix_per_modality=False,
        colour=0.0,
        grey=0.0,
        erase=0.25,
        frequency_masks=0,
        frequency_width=0,
        time_masks=0,
        time_width=0,
        corruption="",
    )

    config.optimizer = dict(
        name="adamw",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        decay_rules=((".*kernel", 1.0), (".*", 0.0)),
        clip_norm=0.0,
        layer_decay=0.7,
    )
    config.schedule = dict(
        learning_rate_per_256=5e-4,
        warmup_epochs=5.0,
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
    config.log = dict(every_steps=100)
    config.eval = dict(
        every_epochs=10.0,
        split="test",
        batch_size=128,
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

    if words.av:
        config.modalities = ("rgb", "spectrogram")
        config.model.fusion = "bottleneck"
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
