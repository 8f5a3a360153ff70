"""Python first: `av_mae.load` opens a model, wherever its weights come from.

    model = av_mae.load("runs/finetune")     # a workdir, a step, or a published file
    clip = av_mae.read_clip("concert.mp4")   # frames, sound, times
    model.predict(clip)                      # [("cello", .83), …]
    model.features(clip)                     # {"rgb": …, "spectrogram": …, "joint": …}
    model.reconstruct(clip, ratio=0.9)       # frames, spectrograms, masks, errors
    model.attention(clip)                    # where it looks, when it listens

Each takes a clip, the path of a file, or a list of them. With `every=SECONDS` a clip is
seen in windows, of which the answers are averaged or, with `average=False`, given one
by one. Programs are compiled once for a shape: a clip alone, or a batch of several.
"""

import collections
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from av_mae import (
    ConfigError,
    UserError,
    caveats,
    checkpoints,
    choose,
    classifier,
    clips,
    evaluation,
    finetune,
    importers,
    inputs,
    pretrain,
    representation,
    rollout,
    spectrogram,
)
from av_mae import reconstruction as reconstructions
from av_mae import run as runs
from av_mae.clips import Clip
from av_mae.transformer import size_of
from data import DataError

log = logging.getLogger(__name__)

BATCH = 8  # rows of a program for several clips or windows
SHORT_SIDE = 256  # pixels, to which `data.prepare` shrinks

# A clip, the path of a file, or a function that reads a clip when its turn comes.
Source = Clip | Path | str | Callable[[], Clip]


class Prediction(list):
    """Pairs (label, probability), the likeliest first: a list that says more.

    logits: float32 [classes], the mean over views (and windows); used: which modalities
    it is from; start, end: which seconds of the file it is of.
    """

    logits: np.ndarray
    used: tuple[str, ...]
    start: float
    end: float


class Features(dict):
    """{"rgb", "spectrogram", "joint": float32 array}, as far as the clip has them.

    used: the modalities; start, end: which seconds of the file it is of.
    """

    used: tuple[str, ...]
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Attention:
    """Which input tokens an encoder's output comes from, as shares that sum to 1.

    rollout[m][n]: of the pooled output of m (`joint`: the mean over those used), the
    shares of the tokens of n, float32 on the grid of n ([t h w] of rgb, [t f] of
    sound); what is missing to 1 went to CLS and bottleneck tokens. last: the same of
    the last layer alone. frames: uint8 [t h w 3], log_mel: float32 [t f], what was
    seen and heard, None for what was not; view: when that was; used: the modalities.
    """

    rollout: dict[str, dict[str, np.ndarray]]
    last: dict[str, dict[str, np.ndarray]]
    frames: np.ndarray | None
    log_mel: np.ndarray | None
    view: clips.View
    used: tuple[str, ...]

    def shares(self, output: str = "joint") -> dict[str, float]:
        """How much of an output comes from each modality."""
        return {m: float(x.sum()) for m, x in self.rollout[output].items()}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights.

    config: the whole config tree that it was trained by, or that its file implies;
    params: nested dict of numpy arrays; labels: the names of its classes, where known
    ({head: names} with several heads); caveats: sentences that belong beside its
    numbers.
    """

    config: ConfigDict
    params: dict[str, Any]
    labels: list[str] | dict[str, list[str]]
    caveats: tuple[str, ...] = ()

    @functools.cached_property
    def module(self):
        """The flax module: an Autoencoder (pretrain) or a Classifier (finetune)."""
        if self.config.trainer == "pretrain":
            return pretrain.build(self._config)
        return finetune.build(self._config, self.classes)

    @functools.cached_property
    def _config(self) -> ConfigDict:
        """The config without what only training wants: layers one by one."""
        config = self.config.copy_and_resolve_references()
        plain = {"scan": False, "remat": "none", "attention": "auto"}
        if "compute" in config:
            for name in plain.keys() & config.compute.keys():
                config.compute[name] = plain[name]
        if "spectrogram" in config and config.spectrogram.preset == "precomputed":
            config.spectrogram.preset = "scenic" if _knows_scenic() else "mbt"
            log.warning(
                "the model was trained on log-mels from records; those of a file are "
                "computed by the preset %r, which may differ.",
                config.spectrogram.preset,
            )
        return config

    @property
    def classes(self) -> int | dict[str, int]:
        """Number of classes; {head: number} with several heads."""
        heads = {
            k: v["bias"].shape[0] for k, v in self.params.items() if k[:4] == "head"
        }
        heads.pop("head_norm", None)
        if list(heads) == ["head"]:
            return heads["head"]
        return {name.removeprefix("head_"): count for name, count in heads.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that the model knows."""
        return tuple(self.config.modalities)

    @property
    def sample_rate(self) -> int:
        """Of the sound that it hears, in Hz."""
        return spectrogram.preset_of(self._config.spectrogram).sample_rate

    @property
    def window_seconds(self) -> float:
        """How much of a clip it sees at once: the length of a window."""
        return clips.window_seconds(self._config)

    # Reading.

    def read(self, path: Path | str, start=None, end=None) -> Clip:
        """A media file as `read_clip`, at the rates and size that the model wants."""
        return clips.read_clip(path, start, end, **self._reading)

    @property
    def _reading(self) -> dict:
        data = self.config.data
        side = max(SHORT_SIDE, data.short_side, data.size)
        return dict(fps=data.fps, short_side=side, sample_rate=self.sample_rate)

    def windows(self, source: Source, every: float) -> Iterator[Clip]:
        """Windows of `window_seconds`, one each `every` seconds; files as they go."""
        reading = self._reading
        return clips.windows(source, self.window_seconds, every, **reading)

    def _parts(self, source: Source, every: float | None) -> Iterator[Clip]:
        """The clip itself, or its windows."""
        if callable(source):
            source = source()
        if every is not None:
            yield from self.windows(source, every)
        else:
            yield source if isinstance(source, Clip) else self.read(source)

    def rows(self, views: int | None = None) -> clips.Rows:
        """What makes rows of a host batch of clips; see there."""
        return clips.Rows(self._config, self.sample_rate, views)

    # What a classifier says.

    def logits(self, batch: dict[str, np.ndarray]):
        """Logits [b classes] of a host batch, the mean over views and modalities.

        {head: logits} with several heads. Clips with a number in a data set (`index`)
        are degraded as `eval.corruption` says. Compiles once for a shape. Raises
        ConfigError for an autoencoder, which has none.
        """
        self.check_classifier()
        inputs = {k: batch[k] for k in batch if k not in ("label", "valid")}
        found = self._predict(self._device_params, inputs, jax.random.key(0))
        return jax.tree.map(np.asarray, found)

    def predict(
        self,
        source: Source | Sequence[Source],
        top: int | None = None,
        modalities: Sequence[str] | None = None,
        every: float | None = None,
        average: bool = True,
    ):
        """What a clip shows: a Prediction; of a list of clips, a list of them.

        top: how many classes, None for all; modalities: a subset to use, None for all
        that the clip has; every: seconds from one window to the next, None for the
        views that training's evaluation took (`data.views`, `data.crops`); average:
        with `every`, the mean over the windows (as `eval.average` says), False for a
        Prediction of each. Several heads: {head: Prediction}. Raises ConfigError for an
        autoencoder.
        """
        self.check_classifier()
        compute = lambda params, batch: self._predict(params, batch, jax.random.key(0))
        make = functools.partial(self._prediction, top)
        mean = self._average_windows if average else None
        return self._each(source, modalities, every, mean, None, compute, make)

    def _prediction(self, top, logits, used, start, end):
        if isinstance(logits, Mapping):
            names = self.labels or dict.fromkeys(logits, ())
            return {
                head: self._named(x, names[head], top, used, start, end)
                for head, x in logits.items()
            }
        return self._named(logits, self.labels, top, used, start, end)

    def _named(self, logits, labels, top, used, start, end) -> Prediction:
        x = logits.astype(np.float64)
        if self.config.objective.kind == "sigmoid":
            probability = 1 / (1 + np.exp(-x))
        else:
            probability = np.exp(x - x.max())
            probability /= probability.sum()
        order = np.argsort(-probability, kind="stable")[:top]
        known = len(labels) == len(logits)
        name = lambda i: labels[i] if known else f"class {i}"
        result = Prediction((name(i), float(probability[i])) for i in order)
        result.logits, result.used, result.start, result.end = logits, used, start, end
        return result

    def _average(self, logits):
        """Logits [b v k] of views or windows as those of clips [b k]."""
        kind = self._config.eval.average
        average = choose("eval.average", kind, evaluation.AVERAGES)
        return average(logits, self._config.objective.kind)

    def _average_windows(self, *logits):
        return np.asarray(self._average(jnp.stack(logits)[None]))[0]

    @functools.cached_property
    def _predict(self):
        predict = finetune.make_predict(self._config, self.module, missing=True)

        def by_clip(params, batch, rng):
            found = predict(params, batch, rng, False)
            count = len(next(iter(batch.values())))
            views = lambda x: x.reshape(count, -1, x.shape[-1])  # b v k, of (b v) k
            logits = classifier.combine(found.logits, found.present)
            return jax.tree.map(lambda x: self._average(views(x)), logits)

        return jax.jit(by_clip)

    # What an encoder says.

    def features(
        self,
        source: Source | Sequence[Source],
        layer: int = -1,
        pool: str = "mean",
        modalities: Sequence[str] | None = None,
        every: float | None = None,
        average: bool = True,
    ):
        """Features of a clip: Features; of a list of clips, a list of them.

        layer: from 0, or from -1, the encoder's output (others are before the last
        norm); pool: `mean` over patches and `cls`, float32 [d], the mean over views;
        `none` the tokens [n d] of the middle view; `joint` is the mean over the
        modalities used, with `none` all their tokens, and where widths differ they are
        side by side; other arguments as of `predict`.
        """
        mean = _mean_arrays if average else None
        return self._each(source, *self._how(layer, pool, modalities, every, mean))

    def stream_features(
        self,
        sources: Iterable[Source],
        layer: int = -1,
        pool: str = "mean",
        modalities: Sequence[str] | None = None,
        every: float | None = None,
        failed: Callable[[int, Exception], None] | None = None,
    ) -> Iterator[tuple[int, Features | list[Features]]]:
        """(number of the source, its Features) as they come, BATCH clips in memory.

        With `every` a list of Features, one a window. failed: is told of a source that
        cannot be read, which is then left out; None: the error is raised. Other
        arguments as of `features`.
        """
        how = self._how(layer, pool, modalities, every, None)
        return self._stream(sources, *how, failed)

    def _how(self, layer: int, pool: str, modalities, every, mean) -> tuple:
        """What `_stream` wants to know to give features."""
        number = representation.layer_number(self._config, layer)
        compute = self._encode(number, pool)
        views = 1 if pool == "none" else None

        def make(found, used, start, end):
            result = Features({m: found[m] for m in used if m in found})
            result["joint"] = _joint(list(result.values()), pool)
            result.used, result.start, result.end = used, start, end
            return result

        return modalities, every, mean, views, compute, make

    @functools.cached_property
    def _encode(self):
        """(layer, pool) → the jitted (params, batch) → {m: features by clip}."""
        prepare = inputs.make(self._config, missing=True)

        @functools.cache
        def encode(layer: int, pool: str):
            def by_clip(params, batch):
                patches, present = prepare(batch, jax.random.key(0), False)
                tokens = representation.tokens_of_layer(
                    *(self._config, self.module, params, patches, present, layer)
                )
                found = representation.pool(self._config, tokens, pool)
                count = len(next(iter(batch.values())))
                mean = lambda x: x.reshape(count, -1, *x.shape[1:]).mean(axis=1)
                return jax.tree.map(mean, found)

            return jax.jit(by_clip)

        return encode

    def attention(
        self,
        source: Source | Sequence[Source],
        modalities: Sequence[str] | None = None,
        start: float | None = None,
        every: float | None = None,
    ):
        """Where the encoder looks and when it listens: attention roll-out.

        Of the middle of a clip, or of the window that begins at `start` seconds: an
        Attention; with `every`, in place of `start`, a list, of a window each so many
        seconds; of a list of clips, a list.
        """
        look = functools.partial(self.attention, modalities=modalities)
        if _is_list(source):
            return [look(x, start=start, every=every) for x in source]
        if every is not None:
            windows = self._usable(self.rows(views=1), source, modalities, every)
            return [look(window) for window, _ in windows]
        clip, rows = self._window(source, start), self.rows(views=1)
        used, row = rows.used(clip, modalities), rows.of(clip, modalities)
        batch = {key: value[None] for key, value in row.items()}
        encoded, calls = self._look(self._device_params, batch)
        known = representation.known(self._config)
        used = tuple(m for m in used if m in known)
        if not used:
            raise ConfigError(
                f"only {', '.join(known)} goes through this model's attention: choose "
                "a clip and modalities with it."
            )
        counts = {m: encoded[m].shape[1] for m in known}
        depth = size_of(self._config.model).depth
        places = [
            {m: representation.place(self._config, m, i) for m in known}
            for i in range(depth)
        ]
        bottlenecks = max(p.bottlenecks for layer in places for p in layer.values())
        nodes = rollout.Nodes(counts, bottlenecks, used)
        matrices = []
        for layer in places:
            qkv = {
                m: np.asarray(calls[f"{p.stack}/{p.block}"][p.call][0])
                for m, p in layer.items()
            }
            matrices.append(rollout.layer_matrix(nodes, layer, qkv))
        maps = functools.partial(self._maps, nodes)
        return Attention(
            rollout=maps(lambda v: rollout.rollout(matrices, v)),
            last=maps(lambda v: v @ matrices[-1]),
            frames=row["rgb"][0] if "rgb" in used else None,
            log_mel=self._log_mel(row) if "spectrogram" in used else None,
            view=rows.views(clip)[0],
            used=used,
        )

    def _log_mel(self, row: dict) -> np.ndarray:
        sound = spectrogram.log_mel(
            row["waveform"][:1], self._config.spectrogram.preset
        )
        return np.asarray(sound[0, :, :, 0])

    def _maps(self, nodes: rollout.Nodes, share: Callable) -> dict:
        """{output: {m: shares on the grid of m}} by a function of output weights."""
        cuts, cls = inputs.layouts(self._config), bool(self.config.model.cls_token)
        first = self.config.trainer == "finetune" and self.config.model.pool == "token"
        weights = {}
        for m in nodes.used:
            weights[m] = np.zeros(nodes.size, np.float32)
            part = nodes.part(m)
            weights[m][part] = 0 if first else 1 / nodes.counts[m]
            weights[m][part.start] += 1 if first else 0
        weights["joint"] = sum(weights.values()) / len(weights)
        result = {}
        for output, v in weights.items():
            found = share(v)
            result[output] = {
                m: found[nodes.part(m)][int(cls) :].reshape(cuts[m].grid)
                for m in nodes.used
            }
        return result

    @functools.cached_property
    def _look(self):
        prepare = inputs.make(self._config, missing=True)

        def look(params, batch):
            patches, present = prepare(batch, jax.random.key(0), False)
            return representation.queries_and_keys(
                *(self._config, self.module, params, patches, present)
            )

        return jax.jit(look)

    # What an autoencoder makes of a clip.

    def reconstruct(
        self,
        source: Source | Sequence[Source],
        ratio: float | Mapping[str, float] | None = None,
        seed: int = 0,
        mask: Mapping[str, str] | None = None,
        modalities: Sequence[str] | None = None,
        start: float | None = None,
        oracle: bool = False,
        every: float | None = None,
    ):
        """A clip with most of it masked, and what the model makes of the rest.

        Of the middle of the clip, or of the window that begins at `start` seconds: a
        Reconstruction; with `every`, in place of `start`, a list, of a window each so
        many seconds; of a list of clips, a list. ratio: share that is masked, one or
        {modality: share}, None for the config's; mask: {modality: kind}, names of
        masking.KINDS; seed: of the masks; oracle: undo standardised targets by the true
        statistics of the masked patches, not by those of the visible ones. Raises
        ConfigError for a classifier.
        """
        self.check_autoencoder()
        common = dict(ratio=ratio, seed=seed, mask=mask, oracle=oracle)
        look = functools.partial(self.reconstruct, modalities=modalities, **common)
        if _is_list(source):
            return [look(x, start=start, every=every) for x in source]
        if every is not None:
            windows = self._usable(self.rows(views=1), source, modalities, every)
            return [look(window) for window, _ in windows]
        config = reconstructions.settings(self._config, ratio, mask)
        clip, rows = self._window(source, start), self.rows(views=1)
        used, row = rows.used(clip, modalities), rows.of(clip, modalities)
        reconstruct = self._reconstruct(reconstructions.key(config))
        batch = {key: value[None] for key, value in row.items()}
        found = reconstruct(self._device_params, batch, jax.random.key(seed))
        return reconstructions.finish(
            config, jax.device_get(found), row, clip, rows.views(clip)[0], used, oracle
        )

    @functools.cached_property
    def _reconstruct(self):
        @functools.cache
        def make(chosen):
            config = reconstructions.settings(self._config, *chosen)
            return jax.jit(reconstructions.make(config, self.module))

        return make

    # What they have in common.

    @functools.cached_property
    def _device_params(self):
        return jax.device_put(self.params)

    def check_classifier(self):
        """Raises ConfigError for a model without classes."""
        if self.config.trainer != "finetune":
            raise ConfigError(
                "this model is an autoencoder (trainer is 'pretrain') and has no "
                "classes: finetune it, or load a finetuned one."
            )

    def check_autoencoder(self):
        """Raises ConfigError for a model without a decoder."""
        if self.config.trainer != "pretrain":
            raise ConfigError(
                "this model is a classifier (trainer is 'finetune') and has no "
                "decoder: load the pretrained one to reconstruct."
            )

    def _window(self, source: Source, start: float | None) -> Clip:
        """The clip, or the window of it that begins at `start`."""
        if start is None:
            return next(self._parts(source, None))
        end = start + self.window_seconds
        if isinstance(source, Clip):
            return source.cut(start, end)
        return self.read(source, start, end)

    def _each(self, source, *how):
        """The results of `_stream`: one, or a list of them."""
        several = _is_list(source)
        found = [x for _, x in self._stream(source if several else [source], *how)]
        return found if several else found[0]

    def _stream(
        self, sources, modalities, every, mean, views, compute, make, failed=None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the source, `make` of what `compute` says of it or its windows).

        mean: of the arrays of a clip's windows, None for a result of each window;
        failed(number, error) is called for a source that cannot be read; None: raised.
        """
        rows, facts = self.rows(1 if every is not None else views), collections.deque()
        bad = set()

        def parts():
            for number, one in enumerate(sources):
                try:
                    for clip, used in self._usable(rows, one, modalities, every):
                        end = clip.start + clip.seconds
                        facts.append((number, used, clip.start, end))
                        yield rows.of(clip, modalities)
                except (UserError, DataError) as error:
                    if failed is None:
                        raise
                    bad.add(number)
                    failed(number, error)

        answers = self._by_batches(parts(), compute)
        told = ((facts.popleft(), answer) for answer in answers)
        for number, group in itertools.groupby(told, key=lambda pair: pair[0][0]):
            one = [(answer, *fact[1:]) for fact, answer in group]
            if number in bad:  # it failed in the middle
                continue
            if every is None:
                yield number, make(*one[0])
            elif mean is None:
                yield number, [make(*part) for part in one]
            else:
                yield number, make(*_over_windows(one, mean))

    def _usable(self, rows, source: Source, modalities, every) -> Iterator[tuple]:
        """(clip, modalities used) of the clip, or of its windows that have some."""
        lacking, some = None, False
        for clip in self._parts(source, every):
            try:
                used = rows.used(clip, modalities)
            except ConfigError as error:
                lacking = error
                continue
            some = True
            yield clip, used
        if not some:
            raise lacking

    def _by_batches(self, rows: Iterable[dict], compute) -> Iterator:
        """What `compute` says of each row; a row alone, or BATCH of them at once."""
        rows, size = iter(rows), 1
        first = list(itertools.islice(rows, 2))
        if len(first) == 2:
            size = BATCH
        rows = itertools.chain(first, rows)
        while chunk := list(itertools.islice(rows, size)):
            padded = chunk + [chunk[-1]] * (size - len(chunk))
            batch = {key: np.stack([row[key] for row in padded]) for key in chunk[0]}
            found = jax.device_get(compute(self._device_params, batch))
            for i in range(len(chunk)):
                yield jax.tree.map(lambda x, i=i: x[i], found)


def _is_list(source) -> bool:
    return not (isinstance(source, Clip | Path | str) or callable(source))


def _mean_arrays(*arrays: np.ndarray) -> np.ndarray:
    return np.mean(arrays, axis=0)


def _over_windows(parts: list[tuple], mean: Callable) -> tuple:
    """The mean of the answers of a clip's windows, and all that they used.

    Features of a modality that some windows lack: the mean over those that have it.
    """
    answers, used, starts, ends = zip(*parts, strict=True)
    every = tuple(dict.fromkeys(itertools.chain(*used)))
    if not isinstance(answers[0], Mapping):
        return mean(*answers), every, min(starts), max(ends)
    result = {}
    for m in answers[0]:
        pairs = zip(answers, used, strict=True)
        has = [a[m] for a, some in pairs if m in some or m not in every]
        result[m] = mean(*has)
    return result, every, min(starts), max(ends)


def _joint(features: list[np.ndarray], pool: str) -> np.ndarray:
    same = len({x.shape[-1] for x in features}) == 1
    if pool == "none" and same:
        return np.concatenate(features, axis=0)
    if same:
        return np.mean(features, axis=0)
    return np.concatenate([x.reshape(-1) for x in features])


def _knows_scenic() -> bool:
    return "scenic" in spectrogram.PRESETS


def load(path: Path | str, weights: str = "params") -> Model:
    """The model at `path`: a workdir, a checkpoint step, or a published file or folder.

    weights: `params`, or `ema` for their moving average, where a run keeps one. Raises
    CheckpointError for what is none of these, or is damaged.
    """
    if importers.find(path):
        found = importers.read(path)
        said = tuple(caveats.of_meta(found.meta))
        return Model(found.config, found.params, found.labels, said)
    params, config, meta = checkpoints.load(path, weights)
    said = tuple(caveats.of_meta(meta))
    return Model(runs.config_of(config), params, meta["labels"], said)
