"""The whole path on the built-in digits: data, pretraining, finetuning, a table.

    python -m av_mae.demo --workdir runs/demo

Makes the clips, prepares them, pretrains on picture and sound together, finetunes on
200 labels from scratch and from the pretrained weights, and prints what came out beside
linear classifiers and trivial predictors. Every part is kept in the workdir: run again,
it goes on where it stopped.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
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
    pretrain,
    report,
    spectrogram,
)
from data import DataError, pipeline

ROOT = Path(__file__).resolve().parents[1]
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


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The JSON at `path`, made (and timed) if it is not there."""
    if not path.exists():
        start = time.monotonic()
        result = make() | {"seconds": time.monotonic() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
    return json.loads(path.read_text())


def make_data(workdir: Path, clips: int, jobs: int, held_out: int = 0) -> dict:
    """Clips as files, then records, by the commands of a user.

    In processes of their own: workers started from here would import jax first.
    `held_out` clips are made like those to train on, and become the split `validation`.
    """
    workdir = workdir.resolve()
    source, out = str(workdir / "clips"), str(workdir / "data")
    counts = ["--train", str(clips + held_out), "--test", str(clips // 2)]
    workers = ["--jobs", str(jobs)] if jobs else []
    command("data.digits", "--out", source, *counts, *workers)
    hold_out(workdir / "clips" / "clips.csv", held_out)
    settings = ["--out", out, "--short-side", "source"]
    command("data.prepare", f"{source}/clips.csv", *settings, *workers)
    return {"train": clips, "test": clips // 2}


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
    """Pretrains, and measures three trivial predictors on the same masks."""
    errors = finished(pretrain.train(config, data, workdir))
    return errors | {"trivial": trivial_errors(config, data["eval"])}


def trivial_errors(config, dataset, clips: int = 256) -> dict[str, dict[str, float]]:
    """{predictor: {modality: masked error}} of held-out clips, in the loss's units."""
    prepare_batch = jax.jit(inputs.make(config, missing=False), static_argnums=2)
    layouts = inputs.layouts(config)
    sums: dict = {name: {} for name in baselines.PREDICTORS}
    batches = dataset.evaluate(config.eval.batch_size)
    for i, batch in zip(range(clips // config.eval.batch_size), batches, strict=False):
        rng = loop.key(config.seed, i, "eval")  # as the evaluation draws them
        patches, _ = prepare_batch(batch, loop.key(rng, 0, "augment"), False)
        masks = pretrain.draw_masks(
            config, loop.key(rng, 0, "mask"), len(batch["valid"])
        )
        for m, x in patches.items():
            x, (kept, masked) = np.asarray(x), map(np.asarray, masks[m])
            truth = np.take_along_axis(x, masked[..., None], axis=1)
            for name, predict in baselines.PREDICTORS.items():
                guess = predict(x, kept, masked, layouts[m].grid)
                sums[name].setdefault(m, []).append(np.mean((guess - truth) ** 2))
    return {
        name: {m: float(np.mean(values)) for m, values in each.items()}
        for name, each in sums.items()
    }


def run_finetuning(config, data: dict, workdir: Path) -> dict:
    """Finetunes; keeps a single modality's test logits for late fusion."""
    results = finished(finetune.train(config, data, workdir))
    if len(config.modalities) > 1:
        return results
    logits, labels = finetune.predict_all(config, data["eval"], workdir)
    np.savez(workdir / "logits.npz", logits=logits, labels=labels)
    return results


def late_fusion(first: Path, second: Path) -> float:
    """Top-1 of the mean of two models' logits."""
    one, two = (np.load(folder / "logits.npz") for folder in (first, second))
    guess = (one["logits"] + two["logits"]).argmax(axis=1)
    return float(np.mean(guess == one["labels"]))


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


def run(workdir: Path, clips: int, jobs: int, arg: str = "") -> str:
    """Everything; returns the text to print. `arg` is the configs' argument."""
    results = workdir / "results"
    once(results / "data.json", lambda: make_data(workdir, clips, jobs))

    config = config_of("pretrain", workdir, arg)
    test = load(config, config.eval.split, "class", cache=True)
    train = load(config, config.data.split, "none", config.data.cache)
    data = {"train": train, "eval": test}
    pretrained = workdir / "pretrain"
    masked = once(
        results / "pretrain.json", lambda: run_pretraining(config, data, pretrained)
    )

    config = config_of("finetune", workdir, arg)
    train = load(config, config.data.split, "class", cache=True)
    data = {"train": train, "eval": test}
    table = {
        "linear": once(results / "linear.json", lambda: linear_baselines(config, data))
    }
    layer_decay = config.optimizer.layer_decay
    for start, path in (("scratch", ""), ("pretrained", str(pretrained))):
        # It keeps the lower layers of pretrained weights; fresh ones have to learn.
        config.optimizer.layer_decay = layer_decay if path else 1.0
        table[start] = {}
        for name, modalities in SETS.items():
            config.modalities = modalities
            config.init_from.checkpoint_path = path
            folder = workdir / f"{start}_{name}"
            fit = lambda folder=folder: run_finetuning(config, data, folder)
            row = once(results / f"{start}_{name}.json", fit)
            table[start][name] = row["eval/top_1"]
        pair = (workdir / f"{start}_sound", workdir / f"{start}_picture")
        table[f"late fusion, {start}"] = {"both": late_fusion(*pair)}
    (results / "table.json").write_text(json.dumps(table, indent=1))
    shown = [pretrained, workdir / "scratch_both", workdir / "pretrained_both"]
    once(results / "report.json", lambda: write_report(workdir, shown))
    labels = config.data.limit or data["train"].num_clips
    return text(table, masked, labels, workdir) + "\n" + times(results)


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


def times(results: Path) -> str:
    """What each part took, from the files of `once`."""
    seconds = {path.stem: json.loads(path.read_text()) for path in results.glob("*")}
    seconds = {k: v["seconds"] for k, v in seconds.items() if "seconds" in v}
    parts = [
        f"{name} {loop.duration(seconds.pop(name))}"
        for name in ("data", "pretrain", "report")
        if name in seconds
    ]
    rest = loop.duration(sum(seconds.values()))
    return f"Time: {', '.join(parts)}, baselines and finetuning {rest}"


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
    parser.add_argument(
        "--clips", type=int, default=4000, help="to train on; half as many to test"
    )
    parser.add_argument("--jobs", type=int, default=0, help="0: one per processor")
    parser.add_argument("--smoke", action="store_true", help="seconds, for testing")
    options = parser.parse_args(argv)
    commandline.quiet_libraries()
    commandline.show_our_log()
    share_compiled(options.workdir)
    arg = "smoke" if options.smoke else ""
    try:
        print(run(options.workdir, options.clips, options.jobs, arg))
    except (UserError, DataError) as error:
        commandline.stop(error)


if __name__ == "__main__":
    main()
