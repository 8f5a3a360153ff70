"""How accuracy falls as picture or sound gets worse, by modality: table and pictures.

    python -m av_mae.robustness runs/av runs/video --out runs/robustness
    python -m av_mae.robustness runs/av --kinds blur,mute \\
        --levels blur=1,2,4 --levels mute=.5,1

Each classifier is evaluated on its own `eval.split` with `eval.corruption` KIND:LEVEL
(av_mae/corruption.py says what a level means), as a whole and with only picture or only
sound, the other missing (AV-MaskEnhancer's never without picture). OUT gets
robustness.md, robustness.json and an SVG for each kind; what is in the JSON already is
not evaluated again.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from av_mae import (
    ConfigError,
    UserError,
    api,
    caveats,
    charts,
    checkpoints,
    choose,
    commandline,
    datasets,
    finetune,
    report,
    representation,
)
from data import DataError

LEVELS = {  # the tests of severity, from mild to severe
    "blur": (1.0, 2.0, 4.0, 8.0),
    "low_resolution": (2.0, 4.0, 8.0, 16.0),
    "noise": (16.0, 32.0, 64.0, 128.0),
    "frame_drop": (0.25, 0.5, 0.75, 1.0),
    "mute": (0.25, 0.5, 0.75, 1.0),
    "audio_noise": (20.0, 10.0, 0.0, -10.0),
}
NOTHING = {"low_resolution": 1.0, "audio_noise": None}  # the level of no harm; else 0
METRICS = ("top_1", "mAP")
CLEAN = ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that is tested: its name in the table, its folder, its newest step.

    seal: what tells the step from another training's; data: another prepared data set
    than the run's.
    """

    name: str
    folder: Path
    step: int
    seal: str = ""
    data: str = ""

    def key(self, what: str) -> str:
        """Where an evaluation on degraded input, or its notes, stand in the JSON."""
        data = f" on {self.data}" if self.data else ""
        return f"{self.folder} step {self.step} {self.seal}{data} {what or 'clean'}"


def subsets(config) -> tuple[str, ...]:
    """For `eval.modalities`: each modality that is enough for the model, and all."""
    alone = tuple(config.modalities)
    if len(alone) == 1:
        return alone
    known = representation.known(config)
    return (*(m for m in alone if m in known), "+".join(alone))


def levels_of(kinds: Sequence[str], given: Sequence[str]) -> dict[str, tuple]:
    """{kind: levels}; `given` are KIND=A,B. Raises ConfigError for an unknown kind."""
    found = {kind: choose("--kinds", kind, LEVELS) for kind in kinds}
    for text in given:
        kind, values = commandline.axis("--levels", text)
        choose("--levels", kind, found)
        try:
            found[kind] = tuple(float(value) for value in values)
        except ValueError as error:
            raise ConfigError(
                f"--levels {text!r}: write KIND=A,B as in --levels blur=1,2."
            ) from error
    return found


def evaluate(folder: Path, corruptions: Sequence[str], data: str = ""):
    """Yields (corruption, {subset: metrics}, notes) of the newest checkpoint of a run.

    data: another prepared data set; notes: what belongs beside the numbers. Raises
    ConfigError for an autoencoder.
    """
    model = api.load(folder)
    config = model.config
    if config.trainer != "finetune":
        raise ConfigError(f"{folder} is an autoencoder: only classifiers are tested.")
    if data:
        config.data.dir = data
    config.eval.modalities = names = subsets(config)
    dataset = datasets.split(config, config.eval.split)
    for corruption in corruptions:
        config.eval.corruption = corruption
        found, said = finetune.measured(config, {"eval": dataset}, folder)
        said = [x for x in said if x not in caveats.of_corruption(config)]
        numbers = {name: _numbers(found, name, len(names)) for name in names}
        yield corruption, numbers, said


def _numbers(found: Mapping[str, float], subset: str, subsets: int) -> dict[str, float]:
    """The metrics of a subset, without `eval/` and the subset's name."""
    start = f"eval/{subset}/" if subsets > 1 else "eval/"
    numbers = {
        k.removeprefix(start): v for k, v in found.items() if k.startswith(start)
    }
    return {k: v for k, v in numbers.items() if "/" not in k}


def test(subjects: Sequence[Subject], levels: Mapping, out: Path):
    """Evaluates what is not in OUT/robustness.json yet; returns what is then there."""
    file = out / "robustness.json"
    done = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    wanted = [CLEAN, *(f"{k}:{x:g}" for k, each in levels.items() for x in each)]
    out.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        todo = [c for c in wanted if subject.key(c) not in done]
        if not todo:
            continue
        for corruption, found, notes in evaluate(subject.folder, todo, subject.data):
            done |= {subject.key(corruption): found, subject.key("notes"): notes}
            file.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            shown = "  ".join(f"{k} {score(v):.3f}" for k, v in found.items())
            print(f"{subject.name}  {corruption or 'clean'}: {shown}", flush=True)
    return done


def score(numbers: Mapping[str, float]) -> float:
    """Top-1, or mAP where clips have several labels."""
    name = next((m for m in METRICS if m in numbers), None)
    if name is None:
        raise ConfigError("a classifier with several heads has no one score.")
    return numbers[name]


def series(subjects: Sequence[Subject], done: Mapping, kind: str, levels) -> dict:
    """{run, subset: points (level, score)}; first the clean one, if it has a level."""
    nothing, found = NOTHING.get(kind, 0.0), {}
    for subject in subjects:
        clean = done[subject.key(CLEAN)]
        for subset in clean:
            points = [] if nothing is None else [(nothing, score(clean[subset]))]
            for level in levels:
                numbers = done[subject.key(f"{kind}:{level:g}")][subset]
                points.append((float(level), score(numbers)))
            found[_name(subject, subset)] = points
    return found


def _name(subject: Subject, subset: str) -> str:
    return f"{subject.name}, {subset}"


def markdown(subjects: Sequence[Subject], done: Mapping, levels: Mapping) -> str:
    """A table for each kind: runs and subsets down, levels across; then the notes."""
    parts = []
    for kind, each in levels.items():
        lines = [
            f"| {kind} | clean | {' | '.join(f'{level:g}' for level in each)} |",
            "|---" * (len(each) + 2) + "|",
        ]
        found = series(subjects, done, kind, each)
        for subject in subjects:
            for subset, clean in done[subject.key(CLEAN)].items():
                name = _name(subject, subset)
                values = [score(clean), *(y for _, y in found[name][-len(each) :])]
                cells = " | ".join(f"{100 * value:.1f}" for value in values)
                lines.append(f"| {name.replace('|', '/')} | {cells} |")
        parts.append("\n".join(lines) + "\n")
    notes = [(x.name, note) for x in subjects for note in done[x.key("notes")]]
    if notes:
        parts.append("".join(f"- NOTE ({name}): {note}.\n" for name, note in notes))
    return "\n".join(parts)


def draw(subjects: Sequence[Subject], done: Mapping, levels: Mapping, out: Path):
    """OUT/<kind>.svg for each kind."""
    for kind, each in levels.items():
        lines = series(subjects, done, kind, each)
        options = dict(x_label=kind.replace("_", " "), marks=True, standalone=True)
        text = charts.lines("Accuracy", lines, **options)
        (out / f"{kind}.svg").write_text(text, encoding="utf-8")


def _step(folder: Path) -> tuple[int, str]:
    """The newest good step of a run, and a hash that tells it from another's."""
    place, step = checkpoints.find(folder)
    sums = (place / str(step) / "checksums-0.json").read_bytes()
    return step, hashlib.sha256(sums).hexdigest()[:8]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs of classifiers")
    parser.add_argument("--kinds", default=",".join(LEVELS), help="separated by commas")
    parser.add_argument("--levels", action="append", default=[], metavar="KIND=A,B")
    parser.add_argument("--data", default="", help="a data set; default: the run's")
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"))
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        levels = levels_of(given.kinds.split(","), given.levels)
        folders = [path.resolve() for path in given.runs]
        subjects = [
            Subject(name, folder, *_step(folder), data=given.data)
            for name, folder in zip(report.names_of(folders), folders, strict=True)
        ]
        done = test(subjects, levels, given.out)
        text = markdown(subjects, done, levels)
        (given.out / "robustness.md").write_text(text, encoding="utf-8")
        draw(subjects, done, levels, given.out)
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(f"\n{text}\nwritten: {given.out}/robustness.md, robustness.json, KIND.svg")


if __name__ == "__main__":
    sys.exit(main())
