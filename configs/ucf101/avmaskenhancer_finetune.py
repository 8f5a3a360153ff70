"""UCF101 finetuning of AV-MaskEnhancer ViT-B (Diao, Cheng and Cheng, ICTAI 2023).

    python -m av_mae.main --config=configs/ucf101/avmaskenhancer_finetune.py:k400 \
        --workdir=runs/avmaskenhancer_finetune \
        --config.init_from.checkpoint_path=checkpoint.pth

    python -m av_mae.main --config=configs/ucf101/avmaskenhancer_finetune.py

on the data of avmaskenhancer_pretrain.py.

Variants: `:scratch` (the default); `:k400`, the video half from VideoMAE ViT-B of
Kinetics-400 (MCG-NJU's checkpoint.pth); `:pretrained`, from avmaskenhancer_pretrain.py
in its ViT-B. The published pretraining is a ViT-S and fits no ViT-B: which weights its
finetuning began with, beside K400's, is not told. 89,232,123 parameters; the pooled
video and the sound encoder's four vectors are joined by a linear layer before the head.

Data: split 1, 9,537 training and 3,783 test clips, of which those of about half of the
classes have sound; a clip without is classified by its picture. Published result: 98.8
top-1, 99.9 top-5. That is the accuracy on a random split of the clips that have sound,
where clips cut from one video lie on both sides: not comparable with numbers of the
official splits, whose groups keep them apart (VideoMAE ViT-B: 91.3, from K400 96.1).
The result of this config is reported on the official split; it has not been run at full
size. `:smoke` (`:k400,smoke`) is a run of seconds on a CPU.
"""

import ml_collections

# Words of `--config=FILE:word,word`; of those in one string at most one.
VARIANTS = ("scratch pretrained k400", "smoke")


def get_config(arg=""):
    words = chosen(arg)
    config = ml_collections.ConfigDict()
    config.trainer = "finetune"
    config.mode = "train"
    config.seed = 0
    config.modalities = ("rgb", "spectrogram")
    config.batch_size = 16  # on one GPU
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
        audio_seconds=20.48,
        audio_align="whole",
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
        randaugment="",
    )

    config.picture = dict(
        normalise="fixed", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    config.spectrogram = dict(preset="mfcc", normalise="none", mean=0.0, std=1.0)

    config.model = dict(
        variant="B/16x2",
        width=0,
        depth=0,
        heads=0,
        mlp=0,
        classes=101,
        label_heads=(),
        fusion="concat",
        fusion_layer=0,
        bottlenecks=0,
        bottlenecks_at_test=True,
        share_encoder=False,
        sound=dict(filters=(16, 32, 64, 128), blocks=(3, 4, 6, 3)),
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
        batch_size=16,
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

    if words.pretrained:
        config.init_from.checkpoint_path = "runs/avmaskenhancer"
    if words.k400:
        config.init_from.checkpoint_path = "checkpoint.pth"
    if words.smoke:
        config.steps = 4
        config.batch_size = config.eval.batch_size = 4
        config.data.num_frames, config.data.size, config.data.short_side = 4, 32, 32
        config.data.audio_seconds = 0.64
        config.data.threads = 2
        config.model.width, config.model.depth = 32, 3
        config.model.heads, config.model.mlp = 2, 64
        config.model.classes = 0
        config.model.sound.filters = (8, 8, 8, 8)
        config.model.sound.blocks = (1, 1, 1, 1)
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
