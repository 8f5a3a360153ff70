"""Every shipped config: parsed as a user would, built at full size, one step run."""

import ast
import functools
import json
import math

import jax
import pytest
import synthetic
from absl import flags
from ml_collections import ConfigDict, config_flags

from av_mae import finetune, inputs, optim, pretrain
from av_mae import run as runs

CONFIGS = synthetic.ROOT / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix()[:-3] for p in CONFIGS.glob("*/*.py"))
VARIANTS = ("", "smoke")
TRAINERS = {"pretrain": pretrain, "finetune": finetune}

# Parameters at full size (with 10 classes where the data set says how many; without
# running statistics), and the tokens of a clip: rgb, spectrogram.
SIZES = {
    "audioset/finetune": (607_002_127, 3136, 496),
    "audioset/pretrain": (595_849_984, 1568, 496),
    "digits/finetune": (1_068_490, 64, 96),
    "digits/pretrain": (1_148_512, 64, 96),
    "folder/finetune": (43_282_186, 1568, 200),
    "folder/pretrain": (42_003_328, 1568, 200),
    "ucf101/avmaskenhancer_finetune": (89_232_123, 1568, 2048),
    "ucf101/avmaskenhancer_pretrain": (28_146_262, 1568, 2048),
}


def parse(name: str, arg: str = "", *options: str) -> ConfigDict:
    """The config as the command line gives it."""
    values = flags.FlagValues()
    file = f"{CONFIGS / name}.py" + (f":{arg}" if arg else "")
    argv = ["main", f"--config={file}", *options]
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    values(argv)
    return holder.value


def shapes(config: ConfigDict):
    """(parameters, layer_of and num_layers for the optimiser), nothing allocated."""
    if config.trainer == "pretrain":
        model, layers = pretrain.build(config), {}
        init = functools.partial(pretrain.init, config, model)
    else:
        model = finetune.build(config, config.model.classes or 10)
        depth = model.encoder.depth
        layer_of = functools.partial(finetune.layer_of, depth)
        layers = dict(layer_of=layer_of, num_layers=depth)
        init = functools.partial(finetune.init, config, model)
    return jax.eval_shape(init, jax.random.key(0)), layers


def fields(tree, path: str = "") -> dict[str, type]:
    """{full name of a field: its type}."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            found |= fields(value, f"{path}{key}.")
        else:
            found[path + key] = type(value)
    return found


def common(found: dict[str, type]) -> dict[str, type]:
    """Without the fields that an optimiser, and AV-MaskEnhancer, have of their own."""
    own = ("optimizer.", "model.sound.")
    return {name: kind for name, kind in found.items() if not name.startswith(own)}


def test_the_table_has_every_config():
    assert sorted(SIZES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_full_size(name):
    config = parse(name)
    params, layers = shapes(config)
    leaves = {k: math.prod(leaf.shape) for k, leaf in optim.named(params).items()}
    count = sum(leaves.values())
    statistics = sum(n for k, n in leaves.items() if k.endswith(("/mean", "/variance")))
    tokens = {m: layout.n for m, layout in inputs.layouts(config).items()}
    found = (count - statistics, tokens["rgb"], tokens["spectrogram"])
    assert found == SIZES[name]
    # The optimiser too, at the size of its state: every parameter has its rule.
    schedule, _ = optim.learning_rate(config.schedule, config.batch_size, 100, 1000)
    tx = optim.make(config.optimizer, schedule, params, **layers)
    state = jax.eval_shape(tx.init, params)
    moments = {"adamw": 2, "adam": 2, "sgd": 1}[config.optimizer.name]
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert 0 <= numbers - moments * count < 10


@pytest.mark.parametrize("arg", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_trainer(name, arg):
    """Each config has what its trainer reads, in the type of all the others."""
    config = parse(name, arg)
    assert name.endswith(config.trainer)
    ours = fields(config)
    for other in NAMES:
        if other.endswith(config.trainer):
            theirs = fields(parse(other, arg))
            assert common(ours) == common(theirs), other
    own = {"b2", "eps"} if config.optimizer.name != "sgd" else set()
    assert set(config.optimizer) == own | {
        *("name", "b1", "weight_decay", "decay_rules", "clip_norm", "layer_decay")
    }
    assert set(config.parallel) == {"data", "fsdp"}
    assert set(config.compute) == {
        *("dtype", "accumulate", "scan", "remat", "attention")
    }
    assert set(config.init_from) == {
        *("checkpoint_path", "rgb", "spectrogram", "weights"),
        *("allow_fresh", "allow_unused"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_changes_values_only(name):
    assert fields(parse(name, "smoke")) == fields(parse(name))
    with pytest.raises(flags.IllegalFlagValueError, match="no variant 'smok'"):
        parse(name, "smok")


@pytest.mark.parametrize("name", NAMES)
def test_fields_can_be_set_on_the_command_line(name):
    """Numbers that may be fractions are floats, tuples take tuples."""
    config = parse(
        *(name, ""),
        *("--config.epochs=1.5", "--config.schedule.warmup_epochs=0.5"),
        *("--config.modalities=rgb", "--config.optimizer.weight_decay=0.1"),
        *("--config.data.audio_seconds=2.5", "--config.model.drop_path=0.2"),
        *(
            "--config.init_from.allow_fresh=('head/.*',)",
            "--config.eval.every_epochs=2",
        ),
    )
    assert (config.epochs, config.schedule.warmup_epochs) == (1.5, 0.5)
    assert (config.modalities, config.optimizer.weight_decay) == (("rgb",), 0.1)
    assert (config.data.audio_seconds, config.model.drop_path) == (2.5, 0.2)
    assert config.init_from.allow_fresh == ("head/.*",)
    assert config.eval.every_epochs == 2.0
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        parse(name, "", "--config.epoch=2.0")


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_imports(name):
    """What it is, the literal command, `:smoke`; one import."""
    tree = ast.parse((CONFIGS / f"{name}.py").read_text())
    text = ast.get_docstring(tree)
    assert f"python -m av_mae.main --config=configs/{name}.py" in text
    assert "`:smoke`" in text and "esult" in text
    if name.endswith("pretrain"):
        assert "python -m data.prepare" in text
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == len(set(lines)), "a line stands twice"
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(i) for i in imports] == ["import ml_collections"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_with_a_checkpoint_it_is_the_same(name):
    """JSON and back: only tuples have become lists."""
    config = parse(name, "smoke")
    again = runs.config_of(json.loads(runs.config_json(config)))
    assert runs.config_json(again) == runs.config_json(config)
    assert optim.names(shapes(again)[0]) == optim.names(shapes(config)[0])


@pytest.fixture(scope="module")
def hasty_compiler():
    """Programs that run once need no optimisation: half the time to compile them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.mark.parametrize("name", NAMES)
def test_one_step_at_smoke_size(name, tmp_path, hasty_compiler):
    config = parse(name, "smoke", "--config.steps=1")
    if config.trainer == "pretrain":
        config.log.pictures = 0  # test_main looks at them
    config.spectrogram.normalise = "fixed"  # there is no data set to measure
    config.checkpoint.every_steps = 1000
    multilabel = config.objective.kind == "sigmoid"
    make = functools.partial(synthetic.Dataset, config, multilabel=multilabel)
    data = {"train": make(views=config.data.samples_per_clip), "eval": make(6)}
    results = TRAINERS[config.trainer].train(config, data, tmp_path)
    assert results and all(math.isfinite(value) for value in results.values())
    assert (tmp_path / "checkpoints" / "1").is_dir()
