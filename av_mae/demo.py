"""The whole path on the built-in digits: data, pretraining, finetuning, a table.

    python -m av_mae.demo --workdir runs/demo

Makes the clips, prepares them, pretrains on picture and sound together, finetunes on
200 labels from scratch and from the pretrained weights, one process a processor, and
prints what came out beside linear classifiers and trivial predictors. Every part is
kept in the workdir: run again, it goes on where it stopped.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from av_mae import (
    TrainingError,
    UserError,
    baselines,
    commandline,
    finetune,
    inputs,
    loop,
    parts,
    pretrain,
    report,
    spectrogram,
)
from data import DataError, pipeline, workers

log = logging.getLogger("av_mae.demo")  # `__name__` may be "__main__"

ROOT = Path(__file__).resolve().parents[1]
TRAINING_MEAN = "mean of training clips"
SETS = {
    "sound": ("spectrogram",),
    "picture": ("rgb",),
    "both": ("rgb", "spectrogram"),
}


def config_of(name: str, workdir: Path, arg: str = ""):
    """configs/digits/<name>.py on the demo's own data set."""
    path = ROOT / "configs" / "digits" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.data.dir = str(workdir / "data")
    return config


def make_data(
    workdir: Path, train: int, test: int, jobs: int, held_out: int = 0
) -> dict:
    """Clips as files, then records, by the commands of a user.

    In processes of their own: workers started from here would import jax first.
    `held_out` clips are made like those to train on, and become the split `validation`.
    """
    workdir = workdir.resolve()
    source, out = str(workdir / "clips"), str(workdir / "data")
    counts = ["--train", str(train + held_out), "--test", str(test)]
    share = ["--jobs", str(jobs)] if jobs else []
    command("data.digits", "--out", source, *counts, *share)
    hold_out(workdir / "clips" / "clips.csv", held_out)
    settings = ["--out", out, "--short-side", "source"]
    command("data.prepare", f"{source}/clips.csv", *settings, *share)
    return {"train": train, "test": test}


def hold_out(manifest: Path, count: int) -> None:
    """Moves the last `count` training clips of the CSV to the split `validation`."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    places = [i for i, line in enumerate(lines) if line.endswith(",train")]
    for i in places[len(places) - count :]:
        lines[i] = lines[i].removesuffix("train") + "validation"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(module: str, *words: str) -> None:
    """`python -m module words…` from the project's folder; DataError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise DataError(
            f"python -m {module} failed (exit code {done.returncode}): mend what it "
            "says above and run the demo again."
        )


def load(config, split: str, label: str, cache: bool) -> pipeline.Dataset:
    """A split with both modalities, for every model; a cached one is decoded once."""
    settings = config.data.copy_and_resolve_references()
    settings.cache = cache
    return pipeline.load(settings, split, label=label, seed=config.seed)


def finished(results: dict) -> dict:
    """The results of a run; TrainingError where SIGTERM stopped it before the end."""
    if not results:
        raise TrainingError("The demo was stopped by SIGTERM: run it again to go on.")
    return dict(results)


def run_pretraining(config, data: dict, workdir: Path) -> dict:
    """Pretrains, and measures trivial predictors on the same masks."""
    errors = finished(pretrain.train(config, data, workdir))
    return errors | {"trivial": trivial_errors(config, data)}


def trivial_errors(config, data: dict, clips: int = 256) -> dict[str, dict[str, float]]:
    """{predictor: {modality: masked error}} of held-out clips, in the loss's units.

    Those of `baselines`, and the mean over as many training clips, place by place.
    """
    layouts = inputs.layouts(config)
    known = {m: [] for m in layouts}
    for _, valid, patches in _patches(config, data["train"], clips):
        for m, x in patches.items():
            known[m].append(x[valid])
    mean = {m: np.concatenate(values).mean(0) for m, values in known.items()}
    sums: dict = {name: {} for name in (TRAINING_MEAN, *baselines.PREDICTORS)}
    for rng, valid, patches in _patches(config, data["eval"], clips):
        masks = pretrain.draw_masks(
            config, loop.key(rng, 0, "mask"), config.eval.batch_size
        )
        for m, x in patches.items():
            x, kept, masked = (np.asarray(part)[valid] for part in (x, *masks[m]))
            truth = np.take_along_axis(x, masked[..., None], axis=1)
            guesses = {
                name: predict(x, kept, masked, layouts[m].grid)
                for name, predict in baselines.PREDICTORS.items()
            }
            guesses[TRAINING_MEAN] = mean[m][masked]
            for name, guess in guesses.items():
                errors = np.mean((guess - truth) ** 2, axis=(1, 2))
                sums[name].setdefault(m, []).append(errors)
    return {
        name: {m: float(np.concatenate(x).mean()) for m, x in each.items()}
        for name, each in sums.items()
    }


def _patches(config, dataset, clips: int):
    """Yields (random key, valid [b], {m: patches [b n f]}) as evaluations see them."""
    prepare = jax.jit(inputs.make(config, missing=False), static_argnums=2)
    batches = dataset.evaluate(config.eval.batch_size)
    count = max(1, clips // config.eval.batch_size)
    for i, batch in zip(range(count), batches, strict=False):
        rng = loop.key(config.seed, i, "eval")
        patches, _ = prepare(batch, loop.key(rng, 0, "augment"), False)
        yield rng, batch["valid"], jax.tree.map(np.asarray, patches)


def late_fusion(first: Path, second: Path) -> float:
    """Top-1 of the mean of the logits with which two finetunings ended."""
    one, two = (np.load(folder / finetune.PREDICTIONS) for folder in (first, second))
    guess = (one["logits"] + two["logits"]).argmax(axis=1)
    return float(np.mean(guess == one["label"]))


def linear_baselines(config, data: dict) -> dict[str, float]:
    """Test accuracy of logistic regression on log-mels, on one frame, on both."""
    log_mel = jax.jit(lambda x: spectrogram.log_mel(x, config.spectrogram.preset))

    def features(dataset):
        rows: dict = {"sound": [], "picture": [], "label": []}
        for batch in dataset.evaluate(100):
            valid = batch["valid"]
            sound = baselines.sound_features(
                np.asarray(log_mel(batch["waveform"][:, 0]))
            )
            rows["sound"].append(sound[valid])
            rows["picture"].append(baselines.frame_features(batch["rgb"])[valid])
            rows["label"].append(batch["label"][valid])
        rows = {name: np.concatenate(parts) for name, parts in rows.items()}
        return rows | {"both": np.concatenate([rows["sound"], rows["picture"]], axis=1)}

    train, test = features(data["train"]), features(data["eval"])
    return {
        name: baselines.linear_accuracy(
            train[name], train["label"], test[name], test["label"]
        )
        for name in SETS
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """One demo: where it is made, and the argument of its configs."""

    workdir: Path
    arg: str = ""

    @property
    def done(self) -> parts.Parts:
        """What there is of it."""
        return parts.Parts(self.workdir / "results")

    def config(self, name: str):
        """configs/digits/<name>.py on this demo's data."""
        return config_of(name, self.workdir, self.arg)


def do_pretraining(work: Work):
    """The part `pretrain`."""
    config = work.config("pretrain")

    def make() -> dict:
        data = {
            "train": load(config, config.data.split, "none", config.data.cache),
            "eval": load(config, config.eval.split, "class", cache=True),
        }
        return run_pretraining(config, data, work.workdir / "pretrain")

    work.done.make("pretrain", make)


# Longest first; of two processes none compiles a step that the other is compiling.
FINETUNINGS = (
    *(("scratch", "both"), ("scratch", "picture"), ("pretrained", "both")),
    *(("pretrained", "picture"), ("scratch", "sound"), ("pretrained", "sound")),
)


def do_finetunings(work: Work):
    """The parts `linear` and `<start>_<modalities>`, with whoever else makes them."""
    config = work.config("finetune")
    data = {
        "train": load(config, config.data.split, "class", cache=True),
        "eval": load(config, config.eval.split, "class", cache=True),
    }

    def one(start: str, name: str):
        config = work.config("finetune")
        config.modalities = SETS[name]
        if start == "pretrained":
            config.init_from.checkpoint_path = str(work.workdir / "pretrain")
        else:  # it keeps lower layers of pretrained weights; fresh ones have to learn
            config.optimizer.layer_decay = 1.0
        folder = work.workdir / f"{start}_{name}"
        fit = lambda: finished(finetune.train(config, data, folder))
        if not work.done.found(folder.name):
            top_1 = work.done.make(folder.name, fit)["eval/top_1"]
            log.warning("%s, %s: top-1 %.1f%%", start, name, 100 * top_1)

    jobs = [functools.partial(one, *names) for names in FINETUNINGS]
    linear = functools.partial(linear_baselines, config, data)
    parts.work_off([*jobs, lambda: work.done.make("linear", linear)])


def run(work: Work, train: int, test: int, jobs: int) -> str:
    """Everything; returns the text to print."""
    done, workdir = work.done, work.workdir
    configs = {k: work.config(k).to_json() for k in ("pretrain", "finetune")}
    done.of({"train": train, "test": test} | configs)
    done.make("data", lambda: make_data(workdir, train, test, jobs))
    stage(work, "pretraining", 1, do_pretraining, logging.INFO)
    processes = parts.processes(jobs or workers.processors(), most=1 + len(FINETUNINGS))
    stage(work, "finetuning", processes, do_finetunings, logging.WARNING)
    table = {"linear": done.found("linear")}
    table["linear"] = {name: table["linear"][name] for name in SETS}
    for start in ("scratch", "pretrained"):
        folders = {name: workdir / f"{start}_{name}" for name in SETS}
        table[start] = {
            name: done.found(path.name)["eval/top_1"] for name, path in folders.items()
        }
        both = late_fusion(folders["sound"], folders["picture"])
        table[f"late fusion, {start}"] = {"both": both}
    (done.folder / "table.json").write_text(json.dumps(table, indent=1))
    shown = [workdir / name for name in ("pretrain", "scratch_both", "pretrained_both")]
    done.make("report", lambda: write_report(workdir, shown))
    config = work.config("finetune")
    labels = config.data.limit or done.found("data")["train"]
    masked = done.found("pretrain")
    return text(table, masked, labels, workdir) + "\n" + times(done.seconds())


def stage(work: Work, name: str, processes: int, function: Callable, level: int):
    """The part `name`: that so many processes have done with `function`."""

    def make() -> dict:
        parts.together(processes, member, function, work, level)
        return {"processes": processes}

    work.done.make(name, make)


def member(function: Callable, work, level: int, *arguments):
    """What a process of its own does: `function(work, …)`, faults in one sentence."""
    commandline.quiet_libraries()
    commandline.show_our_log(level)
    share_compiled(work.workdir)
    try:
        function(work, *arguments)
    except (UserError, DataError) as error:
        commandline.stop(error)


def write_report(workdir: Path, runs: list[Path]) -> dict:
    """report.html on the runs, for the eye."""
    page = report.make(runs, "The demo")
    (workdir / "report.html").write_text(page, encoding="utf-8")
    return {"runs": [str(run) for run in runs]}


def text(table: dict, masked: dict, labels: int, workdir: Path) -> str:
    """The two tables and where the pictures lie, in Markdown."""
    lines = [f"Top-1 on the test clips, {labels} labels, one seed:", ""]
    lines += ["| | sound | picture | both |", "|---|---|---|---|"]
    for name, row in table.items():
        cells = [f"{row[k]:.1%}" if k in row else "" for k in SETS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Masked error on test clips (mean squared, normalised values):", ""]
    lines += ["| | picture | sound |", "|---|---|---|"]
    ours = {m: masked[f"eval/loss_{m}"] for m in ("rgb", "spectrogram")}
    for name, row in {"the autoencoder": ours, **masked["trivial"]}.items():
        lines.append(f"| {name} | {row['rgb']:.4f} | {row['spectrogram']:.4f} |")
    lines += ["", f"Reconstructions: {workdir / 'pretrain' / 'pictures'}"]
    lines += [f"All on one page: {workdir / 'report.html'}"]
    return "\n".join(lines)


def times(seconds: dict[str, float]) -> str:
    """What each stage took."""
    names = ("data", "pretraining", "finetuning", "report")
    said = [f"{k} {loop.duration(seconds[k])}" for k in names if k in seconds]
    return f"Time: {', '.join(said)}"


def share_compiled(workdir: Path) -> None:
    """Runs of one modality set share one compiled step, in this and later processes."""
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--train", type=int, default=2200, help="clips to train on")
    parser.add_argument("--test", type=int, default=2000, help="clips to test on")
    parser.add_argument("--jobs", type=int, default=0, help="0: one per processor")
    parser.add_argument("--smoke", action="store_true", help="seconds, for testing")
    options = parser.parse_args(argv)
    commandline.quiet_libraries()
    commandline.show_our_log()
    share_compiled(options.workdir)
    work = Work(options.workdir, "smoke" if options.smoke else "")
    try:
        print(run(work, options.train, options.test, options.jobs))
    except (UserError, DataError) as error:
        commandline.stop(error)


if __name__ == "__main__":
    main()
