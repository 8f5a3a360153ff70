"""Every shipped config: parsed as a user would, built at full size, one step run."""

import ast
import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
import reliability
import synthetic
import toy
from absl import flags
from ml_collections import ConfigDict, config_flags

from av_mae import checkpoints, finetune, inputs, optim, pretrain, transformer
from av_mae import run as runs
from av_mae.importers import videomae

recipes = pages.load("recipes")
CONFIGS, NAMES = recipes.CONFIGS, recipes.NAMES
PAGE = (synthetic.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
HINT = "run `python docs/recipes.py`"
VARIANTS = ("", "smoke")
EVERY = [(name, arg) for name in NAMES for arg in recipes.variants(name)]
TRAINERS = {"pretrain": pretrain, "finetune": finetune}

# Parameters at full size (with 10 classes where the data set says how many; without
# running statistics), and the tokens of a clip: rgb, spectrogram.
SIZES = {
    "audioset/finetune": (607_002_127, 3136, 496),
    "audioset/pretrain": (595_849_984, 1568, 496),
    "digits/attentive": (1_180_234, 64, 96),
    "digits/finetune": (1_068_490, 64, 96),
    "digits/linear": (1_068_490, 64, 96),
    "digits/pretrain": (1_147_936, 64, 96),
    "epic_kitchens/finetune": (606_868_877, 3136, 200),
    "folder/finetune": (43_282_186, 1568, 200),
    "folder/pretrain": (42_003_328, 1568, 200),
    "kinetics400/attentive": (93_623_440, 1568, 0),
    "kinetics400/finetune": (86_534_800, 1568, 0),
    "kinetics400/linear": (86_536_336, 1568, 0),
    "kinetics400/pretrain": (94_210_944, 1568, 0),
    "ssv2/finetune": (86_361_006, 1568, 0),
    "ssv2/pretrain": (94_210_944, 1568, 0),
    "ucf101/avmaskenhancer_finetune": (89_232_123, 1568, 2048),
    "ucf101/avmaskenhancer_pretrain": (28_146_262, 1568, 2048),
    "ucf101/finetune": (86_304_869, 1568, 0),
    "ucf101/pretrain": (94_210_944, 1568, 0),
    "vggsound/finetune": (607_302_965, 3136, 400),
    "vggsound/pretrain": (621_040_384, 1568, 400),
}
# Of variants, where the publications tell them.
PUBLISHED_SIZES = {
    "audioset/finetune:audio": 303_118_863 - 4096,  # without unused bottlenecks
    "audioset/finetune:video": 304_429_583 - 4096,
    "audioset/pretrain:audio": 315_843_840,
    "vggsound/finetune:audio": 303_419_701 - 4096,
    "vggsound/finetune:video": 304_206_133 - 4096,
    "kinetics400/pretrain:S": 24_029_376,
    "kinetics400/pretrain:L": 342_996_992,
    "kinetics400/pretrain:H": 692_487_296,
    "kinetics400/finetune:S": 22_033_936,
    "kinetics400/finetune:L": 304_270_736,
    "kinetics400/finetune:H": 632_119_440,
    "ssv2/pretrain:S": 24_029_376,
    "ucf101/avmaskenhancer_pretrain:concat": 25_482_070,
    "ucf101/avmaskenhancer_pretrain:video": 24_029_376,
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
        return recipes.shapes(config), {}
    depth = transformer.size_of(config.model).depth
    layer_of = functools.partial(finetune.layer_of, depth)
    return recipes.shapes(config), dict(layer_of=layer_of, num_layers=depth)


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
    tokens = {m: layout.n for m, layout in inputs.layouts(config).items()}
    found = [recipes.parameters(config), tokens["rgb"], tokens.get("spectrogram", 0)]
    assert tuple(found) == SIZES[name]
    # The optimiser too, at the size of its state: every parameter has its rule.
    schedule, _ = optim.learning_rate(config.schedule, config.batch_size, 100, 1000)
    tx = optim.make(config.optimizer, schedule, params, **layers)
    state = jax.eval_shape(tx.init, params)
    moments = {"adamw": 2, "adam": 2, "sgd": 1}[config.optimizer.name]
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert 0 <= numbers - moments * count < 10


# What every variant is, and that each can be trained.


@pytest.mark.parametrize(("name", "arg"), EVERY)
def test_every_variant_is_valid(name, arg):
    """It passes the trainers' checks, at full and at smoke size, with equal fields."""
    full, smoke = (parse(name, f"{arg}{x}".strip(",")) for x in ("", ",smoke"))
    assert fields(full) == fields(smoke) == fields(parse(name))
    for config in (full, smoke):
        TRAINERS[config.trainer].check(config)
    assert smoke.steps == 4 and smoke.batch_size == 4
    assert (full.modalities, full.objective) == (smoke.modalities, smoke.objective)
    if arg:  # words in any order
        assert parse(name, ",".join(reversed(arg.split(",")))) == full


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED_SIZES))
def test_published_sizes_of_variants(name):
    file, _, arg = name.partition(":")
    assert recipes.parameters(parse(file, arg)) == PUBLISHED_SIZES[name]


@pytest.mark.parametrize(
    ("name", "peak", "floor"),
    [
        ("audioset/pretrain", 6e-4, 0.0),
        ("vggsound/pretrain", 3e-4, 0.0),
        ("audioset/finetune", 1.6, 0.0),
        ("vggsound/finetune", 0.8, 0.0),
        ("ucf101/pretrain", 2.25e-4, 7.5e-6),
        ("ucf101/pretrain:1gpu", 2.25e-4, 7.5e-6),
        ("ucf101/finetune", 2.5e-4, 5e-6),
        ("kinetics400/pretrain:L", 3e-4, 2e-5),
        ("kinetics400/finetune:H", 2e-3, 2e-5),
        ("ssv2/finetune:S", 1.5e-3, 1.5e-5),
    ],
)
def test_learning_rates(name, peak, floor):
    """The highest and the last value of the schedule, on the published clips."""
    file, _, arg = name.partition(":")
    plan = recipes.plan(parse(file, arg))
    assert plan[3:] == (pytest.approx(peak, 1e-6), pytest.approx(floor))


def test_the_page_of_recipes_is_up_to_date():
    """All rows are there; those of models that other tests build, as they are now."""
    for name, arg in EVERY:
        assert f"| `{recipes.full(name, arg)}` |" in PAGE, HINT
    for name in NAMES:
        assert recipes.row(name, "") in PAGE, HINT
    assert len(EVERY) == PAGE.count("| `")


@pytest.mark.slow
def test_the_whole_page_of_recipes_is_up_to_date():
    assert recipes.page() == PAGE, HINT


def test_clips_and_results_are_of_data_sets_and_configs_there_are():
    used = {parse(name).data.dir.split("/")[1] for name in NAMES}
    assert used - {"folder"} == set(recipes.CLIPS)
    names = {recipes.full(*pair) for pair in EVERY}
    assert set(recipes.PUBLISHED) <= names
    for name, result in recipes.PUBLISHED.items():  # the docstring says the same
        text = ast.get_docstring(ast.parse(source(name.split(":")[0])))
        assert result.split()[0] in " ".join(text.split()), name


@pytest.mark.parametrize("size", "SBLH")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_published_videomae_fits(trainer, size):
    """The model, and what it sees and predicts, are those of the importer."""
    ours = parse(f"kinetics400/{trainer}", size)
    theirs = videomae.published(trainer, size, 400)
    for group in ("model", "picture"):
        ours_here, theirs_here = ours[group].to_dict(), theirs[group].to_dict()
        for field in FREE:
            ours_here.pop(field, None), theirs_here.pop(field, None)
        assert ours_here == theirs_here
    if trainer == "pretrain":
        assert ours.objective.target.rgb == theirs.objective.target.rgb
        assert (ours.mask.rgb.kind, ours.mask.rgb.ratio) == ("tube", 0.9)
    for field in ("num_frames", "size", "stride", "fps"):
        assert ours.data[field] == theirs.data[field], field
    assert inputs.layouts(ours) == inputs.layouts(theirs)


# Of `model`: what training alone reads, and what a model of one modality does not.
FREE = ("drop_path", "head_init", "head_dropout", "fusion_layers", "bottlenecks")


def source(name: str) -> str:
    return (CONFIGS / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_words_are_read_alike(name):
    """Each file has the same function, and says what is wrong in one sentence."""
    find = lambda name: source(name).partition("\ndef chosen(arg):")[2]
    assert find(name) and find(name) == find(NAMES[0])
    with pytest.raises(flags.IllegalFlagValueError) as error:
        parse(name, "smok")
    text = str(error.value)
    assert "no variant 'smok' of this config. Did you mean \"smoke\"" in text
    for word in " ".join(recipes.module(name).VARIANTS).split():
        assert word in text
        assert f"`:{word}`" in source(name), f"the docstring does not explain {word}"
    with pytest.raises(ValueError, match="no variant 'zzz' of this config. It has"):
        recipes.config_of(name, "smoke,zzz")
    for group in recipes.module(name).VARIANTS:
        if " " in group:
            with pytest.raises(ValueError, match="of the variants .* take one"):
                recipes.config_of(name, group.replace(" ", ","))


@pytest.mark.parametrize("arg", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_trainer(name, arg):
    """Each config has what its trainer reads, in the type of all the others."""
    config = parse(name, arg)
    assert (config.trainer == "pretrain") == name.endswith("pretrain")
    ours = fields(config)
    for other in NAMES:
        if recipes.module(other).get_config().trainer == config.trainer:
            theirs = fields(recipes.config_of(other, arg))
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
    if name in ("audioset/pretrain", "ucf101/avmaskenhancer_finetune"):
        assert optim.names(shapes(again)[0]) == optim.names(shapes(config)[0])


# Every field is read by something.

ROOMS = [
    path
    for folder in ("av_mae", "data")
    for path in sorted((synthetic.ROOT / folder).rglob("*.py"))
    if path.name not in ("imported.py", "validate.py")  # they list all fields
]


@functools.cache
def words_read() -> frozenset[str]:
    """All that is read as an attribute, or stands as a word in a string, in the code.

    Docstrings do not count.
    """
    found = set()
    for path in ROOMS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {id(d) for node in ast.walk(tree) if (d := _docstring(node))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in texts:
                    found.add(node.value)
    return frozenset(found)


def _docstring(node):
    """The docstring's node of a module, class or function."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr):
        return node.body[0].value
    return None


def test_every_field_is_read():
    unread = {
        path
        for name in NAMES
        for path in fields(parse(name))
        if path.rsplit(".", 1)[-1] not in words_read()
    }
    assert unread == set()
    assert "no_such_field" not in words_read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "more"),
    [("pretrain", ()), ("finetune", ("augment.mixup=.8", "augment.cutmix=1.0"))],
)
def test_a_run_reads_every_field(trainer, more, toy_run, tmp_path):
    """By its full name, and not as one of all; a trainer's configs have the same."""
    settings = ("steps=0", "epochs=1.0", *more)
    toy.run(
        *("tests/fields_read.py", tmp_path / "read.json", "av_mae.main"),
        *(f"--config=configs/folder/{trainer}.py:smoke", f"--workdir={tmp_path}/run"),
        f"--config.data.dir={toy_run / 'set'}",
        f"--config.init_from.checkpoint_path={toy_run / 'pretrain'}",
        *(f"--config.{setting}" for setting in settings),
    )
    read = set(json.loads((tmp_path / "read.json").read_text()))
    every = {f"{trainer}:{name}" for name in fields(parse(f"folder/{trainer}"))}
    assert len(every) > 100 and every - read == set()


@pytest.fixture(scope="module")
def hasty_compiler():
    """Programs that run once need no optimisation: half the time to compile them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


# Those whose programs differ most; all take a step, twice, in the slow suite, where the
# variants do whose program is another, and in `make stress` all.
QUICK = [
    "audioset/finetune",
    "audioset/pretrain",
    "kinetics400/linear",
    "kinetics400/pretrain",
]
FULL = os.environ.get("AV_MAE_STRESS") == "full"
OTHERS = [
    ("digits/pretrain", "audio"),
    ("digits/pretrain", "cross"),
    ("digits/pretrain", "inpaint"),
    ("digits/pretrain", "running_cell"),
    ("digits/finetune", "video"),
    ("ucf101/pretrain", "av"),
    ("ucf101/pretrain", "1gpu"),
]


@pytest.mark.parametrize("name", QUICK)
def test_one_step_at_smoke_size(name, tmp_path, hasty_compiler):
    one_step(name, "", tmp_path)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize(("name", "arg"), EVERY if FULL else OTHERS)
def test_one_step_of_variants(name, arg, tmp_path, hasty_compiler):
    one_step(name, arg, tmp_path)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_makes_the_same_parameters(name, tmp_path, hasty_compiler):
    """The whole smoke run, twice."""
    found = []
    for turn in ("one", "other"):
        run_steps(name, "", tmp_path / turn, 4)
        jax.clear_caches()  # traced and compiled again
        found.append(optim.named(checkpoints.load(tmp_path / turn)[0]))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][key], err_msg=key)
    reliability.record(f"the same smoke run twice: {name}", 2, "the same parameters")


def small(name: str, arg: str, steps: int = 1):
    """The smoke config, and data {"train", "eval"} of arrays for it."""
    config = parse(name, f"{arg},smoke", f"--config.steps={steps}")
    if config.trainer == "pretrain":
        config.log.pictures = 0  # test_main looks at them
    config.spectrogram.normalise = "fixed"  # there is no data set to measure
    config.checkpoint.every_steps = 1000
    config.init_from.checkpoint_path = ""  # some variants name weights
    heads = config.trainer == "finetune" and [h for h, _ in config.model.label_heads]
    multilabel = config.objective.kind == "sigmoid"
    make = functools.partial(Clips, heads or (), config, multilabel=multilabel)
    return config, {"train": make(views=config.data.samples_per_clip), "eval": make(6)}


class Clips(synthetic.Dataset):
    """The same with a label of each kind, where there are several."""

    def __init__(self, heads, *arguments, **options):
        super().__init__(*arguments, **options)
        self.heads = heads
        if heads:
            self.label_names = dict.fromkeys(heads, self.label_names)

    def clip(self, i: int) -> dict:
        row = super().clip(i)
        if self.heads:
            row["label"] = dict.fromkeys(self.heads, row["label"])
        return row

    def _batch(self, numbers) -> dict:
        rows = [self.clip(int(i)) for i in numbers]
        return jax.tree.map(lambda *values: np.stack(values), *rows)


def one_step(name: str, arg: str, workdir):
    run_steps(name, arg, workdir, 1)


def run_steps(name: str, arg: str, workdir, steps: int):
    config, data = small(name, arg, steps)
    results = TRAINERS[config.trainer].train(config, data, workdir)
    assert results and all(math.isfinite(value) for value in results.values())
    assert (workdir / "checkpoints" / str(steps)).is_dir()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_gradients_of_the_others_are_traced(name):
    """The loss of a smoke batch has a gradient for every parameter, in its shape."""
    config, data = small(name, "")
    batch = next(data["train"].train(config.batch_size))
    if config.trainer == "pretrain":
        model = pretrain.build(config)
        init = functools.partial(pretrain.init, config, model)
        made = pretrain.make_reconstruct(config, model, True)
    else:
        classes = finetune.num_classes(config, data["train"])
        model = finetune.build(config, classes)
        init = functools.partial(finetune.init, config, model)
        made = finetune.make_predict(config, model, True)
    loss = TRAINERS[config.trainer].make_loss(config, made)
    rng = jax.random.key(0)
    params = jax.eval_shape(init, rng)
    (value, _), found = jax.eval_shape(
        jax.value_and_grad(loss, has_aux=True), params, batch, rng
    )
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
