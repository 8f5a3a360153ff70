"""How fast this machine runs what a config describes, and how well it is used.

    python -m av_mae.benchmark step --config=configs/audioset/pretrain.py
    python -m av_mae.benchmark step --config=configs/audioset/pretrain.py \\
        --config.batch_size=64 --config.compute.attention=xla --json=xla.json
    python -m av_mae.benchmark step --config=… --compare=xla.json
    python -m av_mae.benchmark step --config=… --vary=data.num_frames=8,16,32
    python -m av_mae.benchmark eval --config=configs/vggsound/finetune.py
    python -m av_mae.benchmark plan --config=… --device=H100
    python -m av_mae.benchmark input --config=configs/digits/pretrain.py
    python -m av_mae.benchmark prepare FOLDER

`step` times the jitted training step, preprocessing and optimiser included, on
synthetic batches that lie on the device; `eval` the evaluation of a batch; `plan`
compiles only and says what a run would take. These three need no data and no library
that reads any. `--vary` (several may be given) times the config as it is and with each
of a field's numbers, and prints how the cost grows, counted and measured. `input`
measures how fast a prepared data set is read, `prepare` how fast media files become
records.

Useful FLOPs are counted from the config (av_mae/flops.py); MFU is their rate over the
peak of the device, of the table in av_mae/peaks.py, on a CPU of a matrix product that
is measured in between.
"""

import ast
import functools
import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from av_mae import (
    UserError,
    commandline,
    flops,
    loop,
    parallel,
    peaks,
    plan,
    program,
)

dry_run = plan.dry_run  # what `config.dry_run` runs


def measure(config, kind: str, repeats: int, warm_up: int = 2) -> dict:
    """Times one program of the config; all numbers by name, in seconds and bytes."""
    make = {"step": program.step, "eval": program.evaluation}[kind]
    start = time.perf_counter()
    found = make(config)
    lowered = found.run.lower(*found.arguments())
    built = time.perf_counter()
    compiled = lowered.compile()
    numbers = {
        "build_seconds": built - start,
        "compile_seconds": time.perf_counter() - built,
    }
    seconds, product = _time(found, compiled, kind, repeats, warm_up)
    median, quartiles = np.median(seconds), np.percentile(seconds, (25, 75))
    numbers |= {
        "step_seconds": median,
        "step_seconds_quarter": quartiles[0],
        "step_seconds_three_quarters": quartiles[1],
        "clips": found.clips,
        "clips_per_second": found.clips / median,
        "host_to_device_bytes": program.bytes_of(found.batch),
    }
    numbers |= _use(config, kind, numbers["clips_per_second"], found.mesh.size, product)
    numbers |= {f"memory_{k}": v for k, v in _memory(compiled).items()}
    return {name: float(value) for name, value in numbers.items()}


def _time(found, compiled, kind: str, repeats: int, warm_up: int):
    """(seconds of each call, a timed product where no peak is known)."""
    put = functools.partial(parallel.put_batch, mesh=found.mesh)
    batches = [put(program.synthetic(found.batch, seed)) for seed in range(2)]
    state, seconds = found.first(), []
    product = None if plan.here() else peaks.Product()
    for i in range(warm_up + repeats):
        if product and i % 4 == 0:
            product.measure()
        start = time.perf_counter()
        if kind == "step":
            state, result = compiled(state, batches[i % 2], *found.rest)
        else:
            result = compiled(state, batches[i % 2], *found.rest)
        jax.block_until_ready(result)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:], product


def _use(config, kind: str, clips_per_second: float, devices: int, product) -> dict:
    """Useful FLOPs of a clip, and their rate as a share of the peak."""
    train = kind == "step"
    classes = None if config.trainer == "pretrain" else program.classes_of(config)
    each = flops.per_clip(config, train, classes)
    if product:  # CPUs share their peak among all devices that jax simulates
        peak = product.rate
    else:
        peak = peaks.flops(peaks.named(plan.here()), config.compute.dtype) * devices
    rate = each * clips_per_second
    return {
        "flops_per_clip": each,
        "flops_per_second": rate,
        "peak_flops_per_second": peak,
        "mfu": rate / peak,
    }


def _memory(compiled) -> dict:
    """XLA's analysis for each device, the backend's own peak, and the process's."""
    found = plan.memory_of(compiled)
    numbers = found._asdict() | {"total": found.total}
    backend = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in backend:
        numbers["device_peak"] = backend["peak_bytes_in_use"]
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers["process_peak"] = usage * (1 if sys.platform == "darwin" else 1024)
    return numbers


def table(numbers: dict[str, float], other: dict[str, float] | None = None) -> str:
    """A line each; with `other` those numbers too, and how many times them ours are."""
    rows = []
    for name, value in numbers.items():
        row = f"{name:<30} {value:>12.5g}"
        if other and other.get(name):
            row += f" {other[name]:>12.5g} × {value / other[name]:.3f}"
        rows.append(row)
    return "\n".join(rows)


def vary(config, kind: str, repeats: int, axes: Sequence[str]) -> dict[str, dict]:
    """{setting: numbers of `measure`} of the config as it is, and of each FIELD=A,B.

    One field is set at a time. Raises UserError for one that the config does not have,
    before anything is measured.
    """
    configs = {"as it is": config}
    for axis in axes:
        field, values = commandline.axis("--vary", axis)
        for value in values:
            other = type(config)(config.to_dict())
            other.lock()
            try:
                other.update_from_flattened_dict({field: ast.literal_eval(value)})
            except (KeyError, TypeError, ValueError, SyntaxError) as error:
                raise UserError(
                    f"--vary={axis}: {str(error).strip()}: write FIELD=A,B with a "
                    "field of the config and its values."
                ) from error
            configs[f"{field}={value}"] = other
    return {name: measure(one, kind, repeats) for name, one in configs.items()}


def growth(found: dict[str, dict]) -> str:
    """A Markdown row for each setting: FLOPs and time a clip, times those of the first.

    Beside them MFU, which stays where time grows as the count does.
    """
    first = next(iter(found.values()))
    rows = [
        "| | GFLOP a clip | × | s a clip | × | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for name, x in found.items():
        counted = x["flops_per_clip"] / first["flops_per_clip"]
        measured = first["clips_per_second"] / x["clips_per_second"]
        rows.append(
            f"| {name} | {x['flops_per_clip'] / 1e9:.4g} | {counted:.2f} | "
            f"{1 / x['clips_per_second']:.3g} | {measured:.2f} | {x['mfu']:.2f} |"
        )
    return "\n".join(rows)


def report(config, kind: str, options):
    """`step` and `eval`: measures, prints, compares and writes."""
    if options.vary:
        found = vary(config, kind, options.steps, options.vary)
        print(parallel.describe_devices())
        print(growth(found))
        return
    numbers = measure(config, kind, options.steps)
    other = None
    if options.compare:
        other = _read(options.compare)
    print(parallel.describe_devices())
    print(table(numbers, other))
    clips = options.clips or plan.clips_of(config)
    if kind == "step" and (clips or config.steps):
        rate = numbers["clips_per_second"]
        whole = plan.days(plan.run_seconds(config, clips, rate))
        hour = f"{3600 * rate / clips:.3g} epochs an hour, " if clips else ""
        print(f"{hour}the whole run ({config.epochs:g} epochs): {whole}")
    if options.json:
        provenance = loop.provenance() | {"device": parallel.describe_devices()}
        written = {"command": sys.argv, "made_by": provenance, "numbers": numbers}
        Path(options.json).write_text(json.dumps(written, indent=1), encoding="utf-8")


def _read(path: str) -> dict[str, float]:
    """The numbers of an earlier --json."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["numbers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--compare={path} is no file that --json wrote ({error}): give one."
        ) from error


def run(kind: str, config_flag, argv: Sequence[str]):
    """One sub-command that takes a config."""
    del argv
    config, options = config_flag.value, flags.FLAGS
    try:
        if kind in ("plan", "input") and (options.json or options.compare):
            raise UserError(
                f"--json and --compare are for step and eval: {kind} only prints."
            )
        alone = kind in ("step", "eval") and not (options.json or options.compare)
        if options.vary and not alone:
            raise UserError(
                "--vary is for step and eval, without --json and --compare."
            )
        commandline.quiet_libraries()
        commandline.show_our_log()
        # A program from the cache would tell nothing of the compiler.
        jax.config.update("jax_enable_compilation_cache", False)
        if kind == "plan":
            plan.dry_run(config, options.clips, options.device)
        elif kind == "input":
            _input(config, options.files)
        else:
            logging.getLogger("av_mae").setLevel(logging.WARNING)
            report(config, kind, options)
    except UserError as error:
        commandline.stop(error)


# What needs the packages that read and write data: imported here alone.


def _input(config, files: str):
    """Ways of reading clips, side by side (data/input_speed.py)."""
    import rich.console

    from av_mae import spectrogram
    from data import DataError, input_speed

    try:
        speeds = input_speed.compare(
            config.data,
            split=config.data.split,
            modalities=tuple(config.modalities),
            sample_rate=spectrogram.preset_of(config.spectrogram).sample_rate,
            files=files,
        )
    except DataError as error:
        raise UserError(str(error)) from error
    input_speed.show(speeds, rich.console.Console())


def _prepare(argv: list[str]):
    """Clips a second from media files to records, with one process and with all."""
    import tempfile

    from data import DataError, prepare, prepare_speed, workers

    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        commandline.stop(UserError("give one folder or CSV: benchmark prepare FOLDER."))
    cores = workers.processors()
    for jobs in sorted({1, cores}):
        with tempfile.TemporaryDirectory(prefix="prepare_speed_") as out:
            start = time.perf_counter()
            try:
                found = prepare.prepare(argv[0], out, name="clips", jobs=jobs)
            except DataError as error:
                commandline.stop(error)
            seconds = time.perf_counter() - start
        print(
            f"{jobs} of {cores} cores: {found['clips']} clips in {seconds:.1f} s, "
            f"{found['clips'] / seconds:.3g} clips/s"
        )
    for line in prepare_speed.lines(prepare_speed.compare(argv[0])):
        print(line)


def main(argv: Sequence[str] | None = None):
    argv = list(sys.argv if argv is None else argv)
    kind = argv[1] if len(argv) > 1 else ""
    if kind in ("", "-h", "--help", "help"):
        print(__doc__)
        return
    if kind == "prepare":
        _prepare(argv[2:])
        return
    if kind not in ("step", "eval", "plan", "input"):
        commandline.stop(
            UserError(
                f"benchmark has no sub-command {kind!r}: choose step, eval, plan, "
                "input or prepare."
            )
        )
    config = config_flags.DEFINE_config_file("config", None, "The config file.")
    flags.DEFINE_integer("steps", 10, "How many calls are timed.", lower_bound=1)
    flags.DEFINE_integer("clips", 0, "Clips of the training split; 0: as published.")
    flags.DEFINE_string("json", "", "Where to write the numbers.")
    flags.DEFINE_string("compare", "", "Numbers that --json wrote, to compare with.")
    flags.DEFINE_multi_string("vary", [], "FIELD=A,B: how the cost grows with it.")
    flags.DEFINE_string("files", "", "input: a folder of source files, to compare.")
    flags.DEFINE_string("device", "", "plan: a name of the table in peaks.py.")
    app.run(
        functools.partial(run, kind, config),
        argv=[argv[0], *argv[2:]],
        flags_parser=functools.partial(commandline.parse, config),
    )


if __name__ == "__main__":
    main()
