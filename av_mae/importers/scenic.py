"""Scenic's AV-MAE checkpoints (Georgescu et al. 2023): pretraining and finetuning.

One file of flax's legacy msgpack layout. Pretraining runs keep the parameters at
`optimizer/target`, finetuning runs at `params`; moments and counters are skipped.
Sizes, heads, fusion and bottlenecks are read from names and shapes. What a file does
not tell (whether one stack served both modalities together or apart, the layer of
fusion, the input) is taken from the published configs, or from the options:

    model.fusion          early | shared, where there is one stack for two modalities
    model.decoder.kind    shared | joint, where there is one decoder (published: shared)
    model.fusion_layer    MBT's (published: 18 for AudioSet, 16 for VGGSound)
    data.*, spectrogram.*, objective.*, mask.*    the input and the objective

The models of one modality alone (`vivit`, `vit`) have the same names without suffix.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from av_mae import MODALITIES, CheckpointError
from av_mae.importers import flax_msgpack
from av_mae.importers.imported import Imported, Row, configure
from av_mae.transformer import VARIANTS

Shapes = Mapping[str, tuple[int, ...]]

_ATTENTION = "MultiHeadDotProductAttention_0"
_BLOCK = {
    "norm_1": ("LayerNorm_0",),
    "norm_2": ("LayerNorm_1",),
    "attention/qkv": tuple(f"{_ATTENTION}/{x}" for x in ("query", "key", "value")),
    "attention/out": (f"{_ATTENTION}/out",),
    "mlp/in": ("MlpBlock_0/Dense_0",),
    "mlp/out": ("MlpBlock_0/Dense_1",),
}
_HEAD = "ProjectionHeadAndClassifier_0/output_projection"
_REPRESENTATION = "ProjectionHeadAndClassifier_0/pre_logits"
_TOP = {
    *("accum_train_time", "global_step", "metadata", "model_state", "opt_state"),
    *("optimizer", "params", "rng"),
}


class Plan(NamedTuple):
    """How a file's parameters become ours, from its names and shapes alone.

    parts: our name → the names in the file that it is made of (three for QKV); left:
    name in the file → why it has no place here.
    """

    config: ConfigDict
    parts: dict[str, tuple[str, ...]]
    left: dict[str, str]
    notes: list[str]


def matches(path: Path) -> bool:
    """Whether a file begins as a msgpack map with a name that Scenic writes first."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(32)
    if not start or not 0x80 <= start[0] <= 0x8F:
        return False
    return any(start[2:].startswith(name.encode()) for name in _TOP)


def read(path: Path | str, **options) -> Imported:
    """A Scenic checkpoint; options are config fields by dotted name (see above).

    Raises CheckpointError for a damaged file, one of another model, or an option that
    contradicts it.
    """
    tree = flax_msgpack.arrays(Path(path))
    stored = _flat(_parameters(path, tree))
    try:
        made = plan({name: array.shape for name, array in stored.items()}, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    params: dict[str, Any] = {}
    rows = []
    for target, sources in made.parts.items():
        values = [stored[name].read() for name in sources]
        value, note = _as_ours(target, values)
        rows += [Row(name, target, note) for name in sources]
        *parents, last = target.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    rows += [Row(name, "", why) for name, why in made.left.items()]
    count = sum(array.size for array in stored.values())
    return Imported(made.config, params, rows, [*made.notes, _total(count)])


def _total(count: int) -> str:
    return f"The file holds {count:,} parameters of a Scenic AV-MAE model."


def _parameters(path, tree: dict) -> dict:
    """The parameters of either layout."""
    optimizer = tree.get("optimizer")
    found = tree.get("params") or (
        optimizer.get("target") if isinstance(optimizer, dict) else None
    )
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{path} holds neither `params` nor `optimizer/target`: give a checkpoint "
            "file that Scenic wrote."
        )
    return found


def _flat(tree: dict, prefix: str = "") -> dict[str, flax_msgpack.Stored]:
    flat: dict[str, flax_msgpack.Stored] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, flax_msgpack.Stored):
            flat[f"{prefix}{name}"] = value
    return flat


def _as_ours(target: str, values: list[np.ndarray]) -> tuple[np.ndarray, str]:
    """(our array in float32, what was changed)."""
    notes = []
    if values[0].dtype != np.float32:
        notes.append(f"{values[0].dtype} to float32")
        values = [value.astype(np.float32) for value in values]
    if len(values) == 3:
        notes.append("query, key, value side by side")
        return np.stack(values, 1 if target.endswith("kernel") else 0), ", ".join(notes)
    value = values[0]
    if target == "embed/spectrogram/kernel" and value.shape[-2] == 3:
        # The three input channels are copies of the one spectrogram.
        notes.append("3 equal input channels: their kernels are summed, which is exact")
        value = value.sum(axis=-2, keepdims=True)
    if target.startswith("embed/") and target.endswith("kernel"):
        value = value.reshape(-1, value.shape[-1])
        notes.append("patch flattened")
    if "/positions_" in target:
        value = value.reshape(-1, value.shape[-1])
    return value, ", ".join(notes)


def plan(shapes: Shapes, **options) -> Plan:
    """Config and mapping of a model with these parameters; nothing is read.

    Raises CheckpointError where names or shapes are of no model of Scenic's AV-MAE, or
    something that the config needs is neither in the file nor in the options.
    """
    finetuned = not any(name.startswith("mask_token") for name in shapes)
    source = (_Finetuned if finetuned else _Pretrained)(shapes)
    config, notes = source.config(options)
    parts = source.parts(config)
    left = source.left(set(shapes) - {n for names in parts.values() for n in names})
    return Plan(config, parts, left, notes)


class _Source:
    """Names and shapes of a file, and what both kinds of models have in common."""

    trainer: str

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self.embeddings = self.find_embeddings()
        if not self.embeddings:
            raise CheckpointError(
                "its parameters have no patch embedding: it is no AV-MAE model."
            )
        self.modalities = tuple(m for m in MODALITIES if m in self.embeddings)

    def has(self, layer: str) -> bool:
        return layer in self.shapes or any(
            name.startswith(f"{layer}/") for name in self.shapes
        )

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise CheckpointError(f"its parameter {name} is missing.")
        return tuple(self.shapes[name])

    def find_embeddings(self) -> dict[str, str]:
        """The layer that embeds the patches of each modality."""
        names = {m: f"embedding_{m}" for m in MODALITIES}
        found = {m: name for m, name in names.items() if self.has(name)}
        if self.has("embedding_spec"):
            found["spectrogram"] = "embedding_spec"
        if self.has("embedding"):
            channels = self.shape("embedding/kernel")[-2]
            found["rgb" if channels == 3 else "spectrogram"] = "embedding"
        return found

    def depth(self, stack: str, suffix: str = "") -> int:
        depth = 0
        while self.has(f"{stack}/encoderblock_{depth}{suffix}"):
            depth += 1
        return depth

    def sizes(self, stack: str) -> tuple[int, int]:
        """(heads, MLP width) of a stack."""
        block = f"{stack}/encoderblock_0"
        heads = self.shape(f"{block}/{_ATTENTION}/query/kernel")[1]
        return heads, self.shape(f"{block}/MlpBlock_0/Dense_0/kernel")[1]

    def patch(self) -> tuple[int, int, int]:
        """(side, tubelet, width); a picture's tubelet is 1, unknown ones are 2."""
        kernels = {m: self.shape(f"{n}/kernel") for m, n in self.embeddings.items()}
        kernel = kernels[self.modalities[0]]
        tubelet = 2
        if "rgb" in kernels:
            tubelet = kernel[0] if len(kernel) == 5 else 1
        return kernel[-3], tubelet, kernel[-1]

    def pictures(self) -> bool:
        """Whether it is a model of pictures (ImageNet's), not of video."""
        return self.patch()[1] == 1

    def fixed_positions(self) -> str:
        """The layout of the published config."""
        return "sinusoidal_2d" if self.pictures() else "sinusoidal"

    def encoder(self, stack: str, depth: int) -> dict[str, Any]:
        """Fields of the encoder's size."""
        side, tubelet, width = self.patch()
        heads, mlp = self.sizes(stack)
        names = {sizes: name for name, sizes in VARIANTS.items()}
        named = names.get((width, depth, heads))
        found = {"model.variant": f"{named or 'B'}/{side}x{tubelet}"}
        explicit = dict(width=width, depth=depth, heads=heads, mlp=mlp)
        if named and mlp == 4 * width:
            explicit = dict.fromkeys(explicit, 0)
        return found | {f"model.{name}": value for name, value in explicit.items()}

    def positions(self, ours: str, name: str, width: int) -> dict:
        """Parts of learned positions of this width, none where they are fixed."""
        tables = {
            "embedding": f"{name}/pos_embedding",
            "space": f"{name}/pos_embedding_space",
            "time": f"{name}/pos_embedding_time",
        }
        return {
            f"{ours}/{leaf}": (table,)
            for leaf, table in tables.items()
            if self.shapes.get(table, (0,))[-1] == width
        }

    def suffix(self, m: str) -> str:
        """What the names of a modality's layers end with."""
        return "" if self.embeddings[m] == "embedding" else f"_{m}"

    def input_positions(self, m: str) -> dict:
        width, name = self.patch()[-1], f"posembed_input{self.suffix(m)}"
        return self.positions(f"embed/positions_{m}", name, width)

    def learned(self) -> dict[str, str]:
        """The kind of positions; fixed ones leave no trace in a file."""
        kind = _kind(self.input_positions(self.modalities[0]))
        return {"model.positions": kind} if kind else {}

    def left(self, names: set[str]) -> dict[str, str]:
        """Why these have no place; CheckpointError where there is no reason."""
        why = {name: self.excuse(name) for name in sorted(names)}
        unknown = [name for name, reason in why.items() if not reason]
        if unknown:
            raise CheckpointError(
                f"it has parameters that no model of this release has: "
                f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}."
            )
        return why

    def excuse(self, name: str) -> str:
        return ""

    def layer(self, ours: str, *theirs: str, leaves=("kernel", "bias")) -> dict:
        """Parts of one layer; CheckpointError where the file lacks a leaf."""
        parts = {}
        for leaf in leaves:
            names = tuple(f"{name}/{leaf}" for name in theirs)
            for name in names:
                self.shape(name)
            parts[f"{ours}/{leaf}"] = names
        return parts

    def norm(self, ours: str, theirs: str) -> dict:
        if not self.has(theirs):
            return {}
        return self.layer(ours, theirs, leaves=("scale", "bias"))

    def block(self, ours: str, theirs: str) -> dict:
        parts = {}
        for part, layers in _BLOCK.items():
            leaves = ("scale" if part.startswith("norm") else "kernel", "bias")
            names = (f"{theirs}/{layer}" for layer in layers)
            parts |= self.layer(f"{ours}/{part}", *names, leaves=leaves)
        return parts

    def stack(self, ours: str, theirs: str) -> dict:
        """A whole stack with its norm."""
        parts = self.norm(f"{ours}/norm", f"{theirs}/encoder_norm")
        for i in range(self.depth(theirs)):
            parts |= self.block(f"{ours}/block_{i}", f"{theirs}/encoderblock_{i}")
        return parts

    def single(self, ours: str, theirs: str) -> dict:
        """A parameter that is no layer, where the file has it."""
        return {ours: (theirs,)} if theirs in self.shapes else {}

    def embed(self) -> dict:
        parts = {}
        for m, name in self.embeddings.items():
            parts |= self.layer(f"embed/{m}", name)
            parts |= self.input_positions(m)
            token = f"Encoder_modality_token_{m}"
            parts |= self.single(f"embed/modality_{m}", token)
        return parts


class _Pretrained(_Source):
    """The masked autoencoders, of two modalities or of one."""

    trainer = "pretrain"

    def fusion(self) -> str:
        """The encoder's strategy, '' where two are possible."""
        if self.has("Transformer_concat"):
            return "mid"
        return "" if self.has("Transformer") else "separate"

    def encoder_size(self) -> dict[str, Any]:
        if not self.has("Transformer_concat"):
            m = self.modalities[0]
            stack = "Transformer" if self.has("Transformer") else f"Transformer_{m}"
            return self.encoder(stack, self.depth(stack))
        joint = self.depth("Transformer_concat")
        first = self.depth(f"Transformer_{self.modalities[0]}")
        found = self.encoder("Transformer_concat", first + joint)
        return found | {"model.fusion_layers": joint}

    def decoder_size(self) -> dict[str, Any]:
        m = self.modalities[0]
        stack = "Decoder" if self.has("Decoder") else f"Decoder_{m}"
        projection = f"decoder_projection{self.suffix(m)}"
        heads, mlp = self.sizes(stack)
        width = self.shape(f"{projection}/kernel")[1]
        found = dict(
            width=width,
            depth=self.depth(stack),
            heads=heads,
            mlp=mlp,
            bias=f"{projection}/bias" in self.shapes,
            norm=self.has(f"{stack}/encoder_norm"),
        )
        if kind := _kind(self.decoder_positions(m, width)):
            found["positions"] = kind
        if stack != "Decoder":
            found["kind"] = "separate"
        return {f"model.decoder.{name}": value for name, value in found.items()}

    def decoder_positions(self, m: str, width: int) -> dict:
        """Scenic's models of two modalities call these `posembed_input` too."""
        names = [f"posembed_decoder{self.suffix(m)}"]
        if width != self.patch()[-1]:
            names.append(f"posembed_input{self.suffix(m)}")
        ours = f"decoder_embed/positions_{m}"
        tables = (self.positions(ours, name, width) for name in names)
        return next((parts for parts in tables if parts), {})

    def target(self) -> dict[str, Any]:
        """Which values of a patch are predicted, from their number."""
        if "rgb" not in self.modalities:
            return {}
        side, tubelet, _ = self.patch()
        projection = f"output_projection{self.suffix('rgb')}/kernel"
        values = self.shape(projection)[1]
        if values == 3 * side * side and tubelet > 1:
            return {"objective.target.rgb": "central_frame"}
        return {}

    def config(self, options):
        first = self.modalities[0]
        norms = [n for n in self.shapes if n.endswith("encoder_norm/scale")]
        found = {
            "modalities": self.modalities,
            **self.encoder_size(),
            **self.decoder_size(),
            "model.norm": any(not n.startswith("Decoder") for n in norms),
            **self.learned(),
            "model.modality_embeddings": self.has(f"Encoder_modality_token_{first}"),
            "model.cls_token": self.has("cls"),
        }
        assumed = self.published()
        if kind := self.fusion():
            found["model.fusion"] = kind
        elif len(self.modalities) == 1:
            assumed["model.fusion"] = "shared"
        elif options.get("model.fusion") not in ("early", "shared"):
            raise CheckpointError(
                "one stack serves both modalities, and the file does not tell whether "
                "together or apart: convert it (python -m av_mae.convert) with "
                "--config.model.fusion=early or --config.model.fusion=shared."
            )
        return configure(self.trainer, found, assumed | self.target(), options)

    def published(self) -> dict[str, Any]:
        """The published configs: `mid` is AudioSet's, `separate` VGGSound's."""
        audioset = self.fusion() != "separate"
        return {
            "model.positions": self.fixed_positions(),
            "model.decoder.kind": "shared",
            "model.decoder.positions": self.fixed_positions(),
            "objective.kind": "reconstruct",
            "objective.target.rgb": "raw",
            "objective.target.spectrogram": "raw",
            "mask.rgb.ratio": 0.9,
            "mask.spectrogram.ratio": 0.7 if audioset else 0.5,
            "data.num_frames": 1 if self.pictures() else 16,
            "data.stride": 4,
            "data.audio_seconds": 10.0 if audioset else 8.0,
            "data.resize": "bilinear",
            "spectrogram.normalise": "none",
        }

    def parts(self, config) -> dict[str, tuple[str, ...]]:
        parts = self.embed()
        if self.has("cls"):
            parts[f"embed/cls_{self.modalities[0]}"] = ("cls",)
        parts |= self.encoder_parts(config)
        decoder = config.model.decoder
        for m in self.modalities:
            suffix = self.suffix(m)
            leaves = ("kernel", "bias") if decoder.bias else ("kernel",)
            projection = f"decoder_projection{suffix}"
            parts |= self.layer(f"decoder_embed/{m}", projection, leaves=leaves)
            parts |= self.single(f"decoder_embed/mask_token_{m}", f"mask_token{suffix}")
            token = f"Decoder_modality_token_{m}"
            parts |= self.single(f"decoder_embed/modality_{m}", token)
            parts |= self.decoder_positions(m, decoder.width)
            parts |= self.layer(f"predict/{m}", f"output_projection{suffix}")
        stacks = {"shared": {"shared": "Decoder"}, "joint": {"joint": "Decoder"}}
        each = {m: f"Decoder_{m}" for m in self.modalities}
        for ours, theirs in stacks.get(decoder.kind, each).items():
            parts |= self.stack(f"decoder/{ours}", theirs)
        return parts

    def encoder_parts(self, config) -> dict[str, tuple[str, ...]]:
        fusion, parts = config.model.fusion, {}
        if fusion in ("early", "shared"):
            ours = "joint" if fusion == "early" else "shared"
            return self.stack(f"encoder/{ours}", "Transformer")
        for m in self.modalities:
            parts |= self.stack(f"encoder/{m}", f"Transformer_{m}")
        if fusion == "mid":
            parts |= self.stack("encoder/joint", "Transformer_concat")
        return parts


class _Finetuned(_Source):
    """The classifiers: MBT, and the models of one modality alone."""

    trainer = "finetune"

    def __init__(self, shapes: Shapes):
        super().__init__(shapes)
        self.head = _HEAD if self.has(_HEAD) else "output_projection"
        # The blocks of the first modality have no suffix.
        self.suffixes = dict.fromkeys(self.modalities, "")
        for m, suffix in (("spectrogram", "_spec"), ("rgb", "_rgb")):
            if self.has(f"Transformer/encoderblock_0{suffix}"):
                self.suffixes[m] = suffix
        self.meet = len(self.modalities) > 1

    def config(self, options):
        classes = self.shape(f"{self.head}/bias")[0]
        depth = self.depth("Transformer")
        found = {
            "modalities": self.modalities,
            **self.encoder("Transformer", depth),
            "model.classes": classes,
            "model.representation": self.representation(),
            **self.learned(),
            "model.norm": self.has("Transformer/encoder_norm"),
            "model.head_norm": self.has("encoder_norm"),
            "model.modality_embeddings": self.has(
                f"Encoder_modality_token_{self.modalities[0]}"
            ),
            "model.cls_token": self.has("cls"),
        }
        if self.has("cls"):
            found["model.pool"] = "token"
            if self.head == _HEAD:  # MBT gives its CLS tokens a position too
                found["model.positions"] = "sinusoidal_cls"
        if self.meet:
            found["model.share_encoder"] = not any(self.suffixes.values())
            found["model.fusion"] = "bottleneck" if self.has("bottleneck") else "cross"
        if self.meet and self.has("bottleneck"):
            found["model.bottlenecks"] = self.shape("bottleneck")[1]
        assumed = self.published(classes, depth)
        if self.meet and "model.fusion_layer" not in {**assumed, **options}:
            raise CheckpointError(
                f"a model of {classes} classes and {depth} layers is not a published "
                "one, and the file does not tell at which layer the modalities meet: "
                "convert it (python -m av_mae.convert) with "
                "--config.model.fusion_layer."
            )
        return configure(self.trainer, found, assumed, options)

    def representation(self) -> int:
        """Width of the layer before the head, 0 where there is none."""
        return (
            self.shape(f"{_REPRESENTATION}/bias")[0] if self.has(_REPRESENTATION) else 0
        )

    def published(self, classes: int, depth: int) -> dict[str, Any]:
        """The published configs, AudioSet's (527 classes) or VGGSound's (309)."""
        audioset, vggsound = classes == 527, classes == 309
        mbt_token = self.has("cls") and self.head == _HEAD
        assumed = {
            "model.positions": "sinusoidal_cls"
            if mbt_token
            else self.fixed_positions(),
            "model.pool": "mean",
            "model.drop_path": 0.3,
            "objective.kind": "sigmoid" if audioset else "softmax",
            "objective.label_smoothing": 0.3,
            "data.num_frames": 1 if self.pictures() else 32,
            "data.stride": 2,
            "data.audio_seconds": 8.0 if vggsound else 10.0,
            "data.views": 4,
            "data.resize": "bilinear",
            "spectrogram.normalise": "fixed" if audioset else "none",
        }
        if audioset:
            assumed |= {"spectrogram.mean": 1.102, "spectrogram.std": 2.762}
        if not self.meet:
            assumed["model.fusion"] = "bottleneck"
        elif depth == 24 and (audioset or vggsound):
            assumed["model.fusion_layer"] = 18 if audioset else 16
        return assumed

    def parts(self, config) -> dict[str, tuple[str, ...]]:
        parts = self.embed()
        shared = self.meet and config.model.share_encoder
        for m in ("shared",) if shared else self.modalities:
            suffix = self.suffixes.get(m, "")
            for i in range(self.depth("Transformer", suffix)):
                theirs = f"Transformer/encoderblock_{i}{suffix}"
                parts |= self.block(f"encoder/{m}/block_{i}", theirs)
        parts |= self.norm("encoder/norm", "Transformer/encoder_norm")
        if self.meet:
            parts |= self.single("encoder/bottleneck", "bottleneck")
        for i, m in enumerate(sorted(self.modalities, key=self.suffixes.get)):
            token = f"cls{m}" if i else "cls"
            parts |= self.single(f"embed/cls_{m}", token)
        parts |= self.norm("head_norm", "encoder_norm")
        if self.has(_REPRESENTATION):
            parts |= self.layer("representation", _REPRESENTATION)
        return parts | self.layer("head", self.head)

    def excuse(self, name: str) -> str:
        if name == "bottleneck":
            return "with one modality nothing passes through it"
        return ""


def _kind(positions: dict) -> str:
    """Our name of learned positions with these parts, '' where there are none."""
    if not positions:
        return ""
    return "learned" if len(positions) == 1 else "learned_space_time"


def count(shapes: Shapes) -> int:
    """Number of values in parameters of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())
