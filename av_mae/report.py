"""One page on one or several runs: config, data, curves, reconstructions, mistakes.

    python -m av_mae.report runs/pretrain runs/finetune --out report.html
    python -m av_mae.report runs/attention runs/concat runs/video --out ablation.html

The page needs no network and no other file. Runs are laid over one another in the
charts; a table says in what their configs differ. Where the data that a run was
evaluated on are there, the first clips are reconstructed and the whole split is
answered anew by the newest checkpoint; where they are not, the page says so.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_mae import (
    UserError,
    api,
    caveats,
    charts,
    checkpoints,
    commandline,
    datasets,
    loop,
    mistakes,
    page,
    visualise,
)
from av_mae.clips import Clip
from data import DataError
from data.sources import open_records

EXAMPLES = 3  # clips that are reconstructed
TRAINING = {  # a metric of metrics.jsonl: its chart
    "learning_rate": "Learning rate",
    "clips_per_second": "Clips a second",
    "wait_share": "Share of time waiting for data",
}


@dataclasses.dataclass
class Run:
    """A run's folder: its config tree, what its checkpoint tells, its numbers."""

    name: str
    folder: Path
    config: dict[str, Any]
    meta: dict[str, Any]
    rows: list[dict[str, Any]]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has the metric."""
        return [(row["step"], row[metric]) for row in self.rows if metric in row]

    @property
    def metrics(self) -> list[str]:
        """All there are, in the order in which they first occur."""
        return [k for k in dict.fromkeys(k for row in self.rows for k in row)]


def open_run(folder: Path, name: str) -> Run:
    """A run's workdir; UserError where there is neither checkpoint nor metrics."""
    _, config, meta = checkpoints.load(folder)
    return Run(name, folder, config, meta, loop.read_metrics(folder))


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for count in range(1, 1 + max(len(path.parts) for path in folders)):
        names = ["/".join(path.parts[-count:]) for path in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice.")


# Sections.


def curves(runs: Sequence[Run]) -> str:
    """Losses, scores, learning rate, speed: every run in every chart that it is in."""
    numbers = {run.name: i for i, run in enumerate(runs)}
    metrics = list(dict.fromkeys(m for run in runs for m in run.metrics))
    losses = [m for m in metrics if m == "loss" or m.startswith("loss_")]
    scores = [m for m in metrics if m.startswith("eval/")]
    titles = {m: m.replace("loss_", "Loss, ").replace("loss", "Loss") for m in losses}
    titles |= {m: f"Evaluation: {m.removeprefix('eval/')}" for m in scores}
    titles |= {m: title for m, title in TRAINING.items() if m in metrics}
    trainers = list(dict.fromkeys(run.config["trainer"] for run in runs))
    pieces = []
    for metric, title in titles.items():
        # A loss of pretraining and one of finetuning have no common scale.
        for trainer in trainers if len(trainers) > 1 and "oss" in title else [""]:
            series = {
                run.name: run.points(metric)
                for run in runs
                if run.config["trainer"] in (trainer or trainers)
            }
            series = {name: points for name, points in series.items() if points}
            if series:
                words = f"{title} ({trainer})" if trainer else title
                pieces.append(charts.lines(words, series, numbers=numbers))
    if not pieces:
        return page.note("The runs left no numbers (metrics.jsonl).")
    return page.legend(list(numbers)) + page.grid(pieces)


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a config tree."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def configs(runs: Sequence[Run]) -> str:
    """In what the configs differ, and each as a whole."""
    trees, pieces = [flat(run.config) for run in runs], []
    if len(runs) > 1:
        fields = sorted(set().union(*trees))
        rows = [[f, *(_value(tree, f) for tree in trees)] for f in fields]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        pieces.append(page.heading("What differs"))
        pieces.append(
            page.table(["field", *(run.name for run in runs)], rows)
            if rows
            else page.note("Nothing: the configs are the same.")
        )
    for run in runs:
        made = run.meta.get("provenance", {})
        words = ", ".join(f"{k} {v}" for k, v in made.items() if v)
        pieces.append(page.folded(f"{run.name}: config", run.config))
        pieces.append(page.note(f"{run.name}: {words}") if words else "")
    return "".join(pieces)


def _value(tree: Mapping, field: str) -> str:
    return json.dumps(tree[field]) if field in tree else "–"


def data_of(name: str, info: Mapping[str, Any]) -> str:
    """What a prepared data set's dataset.json says, with "n of N present"."""
    splits = info.get("splits", {})
    total = sum(counts["clips"] for counts in splits.values())
    listed = {name: x["listed"] for name, x in splits.items() if "listed" in x}
    wanted = sum(listed.values()) or info.get("settings", {}).get("clips", total)
    labels = info.get("labels") or []
    kinds = labels.values() if isinstance(labels, Mapping) else [labels]
    classes = " × ".join(str(len(each)) for each in kinds if each) or "no"
    words = f"{name}: {total} of {wanted} clips present, {classes} classes."
    shown = ("clips", "hours", "without_audio", "without_rgb", "failed")
    rows = [
        [
            split,
            _of(counts["clips"], listed.get(split)),
            *(counts.get(key, "–") for key in shown[1:]),
        ]
        for split, counts in splits.items()
    ]
    head = ["split", *(key.replace("_", " ") for key in shown)]
    return f"<p>{page.text(words)}</p>" + (page.table(head, rows) if rows else "")


def _of(count: int, listed: int | None) -> int | str:
    return count if listed is None else f"{count} of {listed}"


def answers(run: Run, model: api.Model) -> str:
    """Confusion matrix, average precision and hardest clips of a classifier."""
    config = model.config
    split = config.eval.split
    dataset = datasets.split(config, split)
    found = mistakes.answers(model, dataset, config.eval.batch_size)
    said = dict.fromkeys([*model.caveats, *caveats.of_data(config, dataset, split)])
    notes = "".join(page.note(f"{run.name}: {sentence}.") for sentence in said)
    return mistakes_of(run.name, split, found, config.eval.corruption) + notes


def mistakes_of(name: str, split: str, found: mistakes.Answers, damage="") -> str:
    """The same, of answers; damage: `eval.corruption`, by which clips were degraded."""
    words = f"{name}: {len(found.ids)} clips of {split}"
    pieces = [page.heading(f"{words}, degraded: {damage}" if damage else words)]
    if not found.several:
        table = mistakes.confusion(found)
        right = float(np.trace(table) / max(table.sum(), 1))
        pieces.append(f"<p>top-1 {right:.1%}</p>")
        chosen = np.arange(len(table))
        if len(table) > page.MOST_CLASSES:
            chosen = mistakes.most_confused(table, page.MOST_CLASSES)
            pieces.append(page.note(f"The {len(chosen)} classes most often confused."))
        names = [found.classes[i] for i in chosen]
        pieces.append(page.matrix(table[np.ix_(chosen, chosen)], names))
    precision = mistakes.average_precision(found)
    mean = np.nanmean(precision) if np.isfinite(precision).any() else np.nan
    by_class = dict(zip(found.classes, precision.tolist(), strict=True))
    pieces.append(page.bars(by_class, f"Average precision by class (mAP {mean:.3f})"))
    rows = [
        [x["id"], ", ".join(x["labels"]), x["guess"], x["probability"], x["loss"]]
        for x in mistakes.hardest(found)
    ]
    head = ["clip", "label", "answer", "its probability", "loss"]
    pieces += [page.heading("Hardest clips"), page.table(head, rows)]
    return "".join(pieces)


def clips_of(config, count: int, rate: int) -> list[Clip]:
    """The first clips of the split that a run evaluates on, as records hold them."""
    records = open_records(config.data.dir, config.eval.split, config.data.source)
    clips = []
    for number in range(min(count, len(records.index))):
        record = records.record(number)
        frames = record.frames(range(record.num_frames)) if record.has_rgb else None
        sound = record.waveform() if record.has_audio else None
        clips.append(Clip(frames, record.fps or 25.0, sound, rate, record.id))
    return clips


def reconstructions(run: Run, model: api.Model, count: int = EXAMPLES) -> str:
    """Clips of the evaluation split, masked and reconstructed, to look at and hear."""
    pieces = []
    for clip in clips_of(model.config, count, model.sample_rate):
        name = f"{run.name}: {clip.path}"
        look = lambda n=name, c=clip: reconstruction_of(n, model.reconstruct(c))
        pieces.append(_attempt(name, look))
    return "".join(pieces)


def reconstruction_of(name: str, found) -> str:
    """One `Reconstruction` with its sliders and players."""
    stacks, sounds, frames, fps = [], {}, 0, 1.0
    if found.frames is not None:
        stacks.append(page.stack(found.frames, f"{name}, frames", "frames"))
        frames = len(found.frames.original)
        steps = np.diff(found.times)
        fps = float(1 / steps.mean()) if len(steps) and steps.mean() > 0 else 1.0
    if found.spectrograms is not None:
        low, high = np.percentile(found.spectrograms.original, (1, 99))
        pictures = [
            visualise.log_mel_picture(x, float(low), float(high))
            for x in found.spectrograms
        ]
        stacks.append(page.stack(pictures, f"{name}, spectrogram", "sound"))
        parts = {"original": found.waveform}
        for version in ("masked", "reconstruction"):
            parts[version] = np.asarray(found.sound(version))
        sounds = {k: page.sound(x, found.sample_rate) for k, x in parts.items()}
    parts = [
        f"{m}: {found.ratio(m):.0%} masked, error {found.error[m]:.4g}"
        for m in found.masks
    ]
    kinds = set(found.statistics.values()) - {"none"}
    if kinds:
        parts.append(f"shown with {' and '.join(sorted(kinds))} statistics")
    return page.example(name, "; ".join(parts), stacks, sounds, frames, fps)


# The page.


def make(folders: Sequence[Path], title: str = "") -> str:
    """The page of these runs."""
    names = names_of(folders)
    runs = [open_run(path, name) for path, name in zip(folders, names, strict=True)]
    data, shown, wrong = [], [], []
    seen = set()
    for run in runs:
        model = api.load(run.folder)
        if len({run.config["data"]["dir"]} - seen):
            seen.add(run.config["data"]["dir"])
            data.append(_attempt(run.name, lambda m=model: _data(m)))
        if model.config.trainer == "pretrain":
            look = lambda r=run, m=model: reconstructions(r, m)
            shown.append(_attempt(run.name, look))
        else:
            wrong.append(_attempt(run.name, lambda r=run, m=model: answers(r, m)))
    sections = {
        "Curves": curves(runs),
        "Reconstructions": "".join(shown),
        "Answers and mistakes": "".join(wrong),
        "Data": "".join(data),
        "Config": configs(runs),
    }
    lead = f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(names)}"
    return page.page(title or f"Report on {', '.join(names)}", sections, lead)


def _data(model: api.Model) -> str:
    config = model.config
    dataset = datasets.split(config, config.eval.split)
    return data_of(config.data.dir, dataset.info)


def _attempt(name: str, part) -> str:
    """The part, or a sentence on why it is not there."""
    try:
        return part()
    except (UserError, DataError, OSError) as error:
        return page.note(f"{name}: {error}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs of runs")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="", help="of the page")
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        text = make([path.resolve() for path in given.runs], given.title)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(f"written: {given.out} ({len(text) / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
