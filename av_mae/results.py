"""Does pretraining pay? Paired seeds on the built-in digits → docs/digits.md.

    python -m av_mae.results --workdir runs/results --out docs/digits.md

For each seed (its own labelled clips, initialisation, order and pretraining): finetuned
from scratch and from pretrained weights on 50, 200 and 1,000 labels, each start with
the learning rate and length that a search of the same size, on clips held out of
training, found for it; late fusion; linear and nearest-neighbour classifiers on frozen
features, beside a random model; the picture that a sound makes an autoencoder of
`inpaint` see; longer training of one seed; all labels. Every part is kept in the
workdir: run again, it goes on where it stopped. One process a processor takes part
after part. The page is written after every part, with what is there by then; after
`--minutes` no further part begins: what is missing then are the last of the parts that
come after the pairs of all seeds.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from av_mae import (
    UserError,
    api,
    baselines,
    commandline,
    demo,
    featureset,
    finetune,
    inpainting,
    knn,
    parts,
    pretrain,
    results_page,
)
from av_mae.results_page import ALL, LONGER, SINGLE, STARTS, longer_name, part_name
from data import DataError, workers

log = logging.getLogger("av_mae.results")  # `__name__` may be "__main__"

LABELS = (50, 200, 1000)
SEARCH_SEED = 1000  # the search sees labelled clips and orders that no result sees
RATES, STEPS = (3.2e-3, 6.4e-3, 1.28e-2), (150, 300)
VARIANTS = {"both": "", "sound": "audio", "picture": "video", "inpaint": "inpaint"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large it is made: clips, epochs of pretraining on them, labels, the search's
    rates and lengths, epochs of training with all labels (in batches four times as
    large), the share of the sound that is masked where pictures are made of it; `arg`
    of the configs."""

    clips: int = 4000
    test: int = 2000
    held_out: int = 500
    epochs: float = 8.0
    labels: tuple[int, ...] = LABELS
    rates: tuple[float, ...] = RATES
    steps: tuple[int, ...] = STEPS
    epochs_of_all: float = 4.0
    sound_masked: float = 0.25
    arg: str = ""


SMOKE = Scale(100, 50, 20, 1.0, (20,), (1.28e-2,), (2,), arg="smoke")


# Parts that others need as files: their numbers alone do not stand for them.
FILES = re.compile("data|elsewhere|pretrain_.*|scratch_picture_all_0")


class Work:
    """The parts of one workdir, its data sets and configs."""

    def __init__(self, workdir: Path, scale: Scale, jobs: int):
        self.workdir, self.scale, self.jobs = workdir, scale, jobs
        self._parts = parts.Parts(workdir / "results")
        self.part, self.found = self._parts.make, self._parts.found
        self._sets: dict = {}

    def check(self):
        """UserError where the workdir holds the results of other settings."""
        configs = {k: self.config(k) for k in ("pretrain", "finetune")}
        for config in configs.values():
            config.data.dir = ""  # where they lie is no setting
        configs = {k: config.to_json() for k, config in configs.items()}
        self._parts.of(dataclasses.asdict(self.scale) | configs)

    def write_numbers(self, path: Path):
        """The setting and the numbers of every part, JSON."""
        numbers = {name: self.found(name) for name in self._parts.seconds()}
        for part in numbers.values():
            part.pop("folder", None)
        body = {"setting": self.found("setting"), "parts": numbers}
        parts.write_text(path, json.dumps(body, indent=1) + "\n")

    def take_numbers(self, path: Path):
        """What another workdir of the same setting has done, of its `write_numbers`.

        For a workdir in which nothing is done yet.
        """
        self.check()
        if not path.exists() or self._parts.seconds():
            return
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["setting"] != self.found("setting"):
            log.warning("%s is of other settings: all is done anew", path)
            return
        known = {k: x for k, x in body["parts"].items() if not FILES.fullmatch(k)}
        spent = {k: x["seconds"] for k, x in body["parts"].items() if k not in known}
        spent["data"] = self.jobs * spent.get("data", 0.0)  # it is made alone
        known["elsewhere"] = {"seconds": sum(spent.values())}
        for name, part in known.items():
            self._parts.put(name, part)

    def minutes(self) -> float:
        """What all parts took in this and earlier runs; `jobs` are made at a time."""
        seconds = self._parts.seconds()
        alone = seconds.pop("data", 0.0)
        return (alone + sum(seconds.values()) / self.jobs) / 60

    def config(self, name: str, variant: str = ""):
        """The digits config `name`, in a variant, on this workdir's data."""
        words = [word for word in (variant, self.scale.arg) if word]
        return demo.config_of(name, self.workdir, ",".join(words))

    def split(self, config, split: str, label: str):
        """A data set, kept for the next user of the same clips."""
        training = split == config.data.split
        limit = config.data.limit if training else 0
        seed = config.seed if training else 0  # its draw of clips, order and crops
        key = (split, label, limit, seed)
        if key not in self._sets:
            if training:  # one at a time: they take memory
                self._sets = {k: v for k, v in self._sets.items() if k[0] != split}
            settings = config.copy_and_resolve_references()
            settings.data.limit = limit
            self._sets[key] = demo.load(settings, split, label, cache=True)
        return self._sets[key]


def make_data(work: Work) -> dict:
    """Train, validation (of the training voices and scans) and test clips."""
    scale = work.scale
    return demo.make_data(
        work.workdir, scale.clips, scale.test, work.jobs, scale.held_out
    )


def pretrained(work: Work, seed: int, name: str) -> Path:
    """The workdir of a pretraining on both, sound or picture; of one that inpaints.

    The last has no layer in which sound and picture meet.
    """
    folder = work.workdir / f"pretrain_{name}_{seed}"

    def make() -> dict:
        config = work.config("pretrain", VARIANTS[name])
        if name == "inpaint":
            config.model.fusion = "separate"
            config.mask.spectrogram.ratio = work.scale.sound_masked
        config.seed, config.log.pictures = seed, 0
        config.epochs = work.scale.epochs
        data = {
            "train": work.split(config, config.data.split, "none"),
            "eval": work.split(config, config.eval.split, "class"),
        }
        return demo.finished(pretrain.train(config, data, folder))

    work.part(folder.name, make)
    return folder


def finetuned(
    work: Work,
    name: str,
    modalities: str,
    start: Path | None,
    seed: int,
    labels: int,
    rate: float,
    steps: int,
    split: str = "test",
) -> dict:
    """One finetuning: its top-1, and beside it the folder with its test logits."""
    folder = work.workdir / "finetune" / name

    def make() -> dict:
        config = work.config("finetune")
        config.seed, config.data.limit = seed, labels
        config.modalities = demo.SETS[modalities]
        config.schedule.learning_rate_per_256 = rate
        config.init_from.checkpoint_path = str(start or "")
        if not start:  # fresh lower layers have to learn
            config.optimizer.layer_decay = 1.0
        if labels == ALL:
            config.batch_size *= 4
            config.steps, config.epochs = 0, work.scale.epochs_of_all
        else:  # the same warm-up for any number of labels, in whole batches of them
            config.steps = steps
            config.schedule.warmup_epochs = (
                0.1 * steps / max(1, labels // config.batch_size)
            )
        config.eval.split = split
        config.eval.every_epochs = 1e9  # at the end alone
        data = {
            "train": work.split(config, config.data.split, "class"),
            "eval": work.split(config, split, "class"),
        }
        return demo.finished(finetune.train(config, data, folder)) | {
            "folder": str(folder)
        }

    return work.part(name, make)


def attempt(work: Work, start: str, modalities: str, rate: float, steps: int) -> float:
    """Top-1 on held-out clips with this rate and number of updates.

    At the middle number of labels; every start has as many tries.
    """
    name = f"search_{start}_{modalities}_{rate:g}_{steps}"
    if not (found := work.found(name)):
        labels = work.scale.labels[len(work.scale.labels) // 2]
        path = pretrained(work, 0, "both") if start == "pretrained" else None
        setting = (modalities, path, SEARCH_SEED, labels, rate, steps, "validation")
        found = finetuned(work, name, *setting)
    return found["eval/top_1"]


def tries(work: Work, start: str, modalities: str) -> Iterator[tuple[float, int]]:
    """(learning rate, updates): each rate at the first length, the best at the others.

    A rate is chosen when the tries before it are made.
    """
    first, *others = work.scale.steps
    for rate in work.scale.rates:
        yield rate, first
    found = {
        rate: attempt(work, start, modalities, rate, first) for rate in work.scale.rates
    }
    for steps in others:
        yield max(found, key=found.get), steps


def search(work: Work, start: str, modalities: str) -> tuple[float, int]:
    """The learning rate and the number of updates that do best on held-out clips."""
    found = {
        (rate, steps): attempt(work, start, modalities, rate, steps)
        for rate, steps in tries(work, start, modalities)
    }
    return max(found, key=found.get)


def pairs(seed: int, scale: Scale) -> Iterator[tuple[str, str, str, int]]:
    """(start, what it was pretrained on or '', modalities, labels) of a seed."""
    for labels, modalities in itertools.product(scale.labels, demo.SETS):
        yield "scratch", "", modalities, labels
        yield "pretrained", "both", modalities, labels


def jobs_of(work: Work, seeds: int) -> Iterator[Callable[[], object]]:
    """All there is to do; the pairs of all seeds first, the search before them."""
    job, scale = functools.partial, work.scale
    for start, modalities in itertools.product(STARTS, demo.SETS):
        yield job(search, work, start, modalities)
    for seed in range(seeds):
        for labels in scale.labels:
            yield job(linear, work, seed, labels)
        for setting in pairs(seed, scale):
            yield job(evaluated, work, seed, *setting)
        for labels in scale.labels:
            yield job(late, work, seed, "scratch", "", labels)
            yield job(late, work, seed, "pretrained", "both", labels)
        yield job(frozen, work, seed)
    yield job(inpainted, work)
    for start, modalities in itertools.product(STARTS, demo.SETS):
        yield job(longer, work, start, modalities)
    for seed in range(seeds):
        for modalities in demo.SETS:
            yield job(evaluated, work, seed, "scratch", "", modalities, ALL)
        yield job(late, work, seed, "scratch", "", ALL)
        for name, labels in itertools.product(SINGLE, scale.labels):
            yield job(evaluated, work, seed, "pretrained", name, name, labels)
        for labels in scale.labels:
            yield job(late, work, seed, "pretrained", "alone", labels)


def evaluated(work: Work, seed: int, start: str, source: str, modalities: str, labels):
    """A finetuning with what the search found."""
    name = part_name(start, source, modalities, labels, seed)
    if work.found(name):
        return
    rate, steps = search(work, start, modalities)
    path = pretrained(work, seed, source) if source else None
    finetuned(work, name, modalities, path, seed, labels, rate, steps)


def longer(work: Work, start: str, modalities: str):
    """The first seed at the most labels, LONGER times the longest of the search."""
    name = longer_name(work, start, modalities)
    if work.found(name):
        return
    rate, _ = search(work, start, modalities)
    path = pretrained(work, 0, "both") if start == "pretrained" else None
    labels, steps = max(work.scale.labels), LONGER * max(work.scale.steps)
    finetuned(work, name, modalities, path, 0, labels, rate, steps)


def inpainted(work: Work) -> dict:
    """What a classifier of real pictures reads in those that sound was made into."""

    def make() -> dict:
        folder = pretrained(work, 0, "inpaint")
        evaluated(work, 0, "scratch", "", "picture", ALL)
        reader = work.found(part_name("scratch", "", "picture", ALL, 0))["folder"]
        model = api.load(folder)
        data = work.split(work.config("finetune"), "test", "class")
        size = model.config.eval.batch_size
        inpainting.draw(model, data, size, folder / "pictures_of_sound.png")
        return inpainting.read(model, api.load(reader), data, size)

    return work.part("inpainted", make)


def late(work: Work, seed: int, start: str, source: str, labels: int) -> dict:
    """Top-1 of the mean of the logits of sound's and picture's models.

    source: as in `pairs`, `alone` for models that are pretrained on what they know.
    Raises parts.Busy until both are there.
    """

    def make() -> dict:
        models = [
            work.found(part_name(start, m if source == "alone" else source, m, *which))
            for m in SINGLE
        ]
        if not all(models):
            raise parts.Busy("the two models are being made.")
        if not all("folder" in x for x in models):  # of another workdir: only numbers
            return {}
        return {"top_1": demo.late_fusion(*(Path(x["folder"]) for x in models))}

    which = labels, seed
    return work.part(part_name(start, source, "late", *which), make)


def linear(work: Work, seed: int, labels: int) -> dict:
    """The linear baselines on this seed's labelled clips."""

    def make() -> dict:
        config = work.config("finetune")
        config.seed, config.data.limit = seed, labels
        data = {
            "train": work.split(config, config.data.split, "class"),
            "eval": work.split(config, "test", "class"),
        }
        return demo.linear_baselines(config, data)

    return work.part(f"linear_{labels}_{seed}", make)


def frozen(work: Work, seed: int) -> dict:
    """Linear and k-NN accuracy on features of the pretrained and of a random model.

    Of 200 labels, linear; of all, k-NN (cosine, k = 20).
    """

    def make() -> dict:
        folder = pretrained(work, seed, "both")
        labels = work.scale.labels[len(work.scale.labels) // 2]
        trained = api.load(folder)
        weights = pretrain.init(trained.config, trained.module, jax.random.key(seed))
        models = {
            "pretrained": trained,
            "random": dataclasses.replace(trained, params=jax.device_get(weights)),
        }
        config = work.config("finetune")
        config.seed, config.data.limit = seed, labels
        few = work.split(config, config.data.split, "class")
        config.data.limit = 0
        sets = [work.split(config, split, "class") for split in ("train", "test")]
        result: dict = {}
        for name, model in models.items():
            some, train, test = (
                featureset.compute(model, x, config.eval.batch_size)
                for x in (few, *sets)
            )
            result[name] = {"linear": {}, "k-NN": {}}
            for modalities, top_1 in knn.evaluate(train, test).items():
                result[name]["k-NN"][modalities] = top_1["top_1"]
                result[name]["linear"][modalities] = baselines.linear_accuracy(
                    *(some.features[modalities], some.labels),
                    *(test.features[modalities], test.labels),
                )
        return result

    return work.part(f"frozen_{seed}", make)


def write(work: Work, seeds: int, out: Path):
    """The page, and beside it the numbers of every part.

    Under the page's own tables stand those of other commands, kept as OUT/*.md without
    OUT's ending: docs/digits/*.md.
    """
    others = sorted(out.with_suffix("").glob("*.md"))
    text = [results_page.table(work, seeds)]
    text += [results_page.OTHERS] * bool(others)
    text += [path.read_text(encoding="utf-8") for path in others]
    parts.write_text(out, "\n".join(text))
    work.write_numbers(out.with_suffix(".json"))


def do(work: Work, seeds: int, minutes: float, out: Path):
    """All parts that no other process makes, the page after each."""

    def may_begin() -> bool:
        write(work, seeds, out)
        return work.minutes() < minutes

    parts.work_off(list(jobs_of(work, seeds)), may_begin)


def run(work: Work, seeds: int, minutes: float, out: Path):
    """All parts by `work.jobs` processes, and the page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work.take_numbers(out.with_suffix(".json"))
    work.part("data", lambda: make_data(work))
    if work.minutes() < minutes:
        function = (demo.member, do, work, logging.WARNING, seeds, minutes, out)
        parts.together(work.jobs, *function)
    write(work, seeds, out)
    spent = work.minutes()
    if spent >= minutes:
        log.warning("stopped after %.0f minutes: --minutes more goes on", spent)
    log.info("%s", out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/digits.md"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument("--jobs", type=int, default=0, help="0: one per processor")
    parser.add_argument("--smoke", action="store_true", help="seconds, for testing")
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    commandline.show_our_log()
    demo.share_compiled(given.workdir)
    scale = SMOKE if given.smoke else Scale()
    work = Work(
        given.workdir, scale, parts.processes(given.jobs or workers.processors())
    )
    try:
        run(work, given.seeds, given.minutes, given.out)
    except (UserError, DataError) as error:
        commandline.stop(error)


if __name__ == "__main__":
    main()
