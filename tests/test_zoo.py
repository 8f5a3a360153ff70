"""The list of published models: what it says is computed, and is up to date."""

import re

import pages
import pytest
import synthetic

from av_mae import convert, importers

zoo = pages.load("zoo")
PAGE = (pages.DOCS / "zoo.md").read_text(encoding="utf-8")
README = (synthetic.ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [model for model in zoo.VIDEOMAE if model.size in "SB"]

# Of the published programs: the autoencoder and the classifier of 400 classes.
PARAMETERS = {
    "S": (24_029_376, 22_033_936),
    "B": (94_210_944, 86_534_800),
    "L": (342_996_992, 304_270_736),
    "H": (692_487_296, 632_119_440),
}
# Without bottlenecks that nothing passes through.
AVMAE = {
    ("audioset", zoo.BOTH, zoo.BOTH): (595_849_984, 607_002_127),
    ("audioset", zoo.BOTH, zoo.SOUND): (595_849_984, 303_118_863 - 4096),
    ("audioset", zoo.BOTH, zoo.PICTURE): (595_849_984, 304_429_583 - 4096),
    ("audioset", zoo.SOUND, zoo.SOUND): (315_843_840, 303_118_863 - 4096),
    ("vggsound", zoo.BOTH, zoo.BOTH): (621_040_384, 607_302_965),
    ("vggsound", zoo.BOTH, zoo.SOUND): (621_040_384, 303_419_701 - 4096),
    ("vggsound", zoo.BOTH, zoo.PICTURE): (621_040_384, 304_206_133 - 4096),
}
HINT = "run `python docs/zoo.py`"


def test_the_pages_have_the_small_models_as_they_are():
    for model in SMALL:
        assert zoo.summary_row(model) in README, HINT
        for row in zoo.file_rows(model):
            assert row in PAGE, HINT


@pytest.mark.slow
def test_the_pages_are_up_to_date():
    assert zoo.page() == PAGE, HINT
    assert zoo.readme(README) == README, HINT


@pytest.mark.parametrize("size", ["S", "B"])
def test_parameters_are_the_published_ones(size):
    check(size)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["L", "H"])
def test_parameters_of_large_models_are_the_published_ones(size):
    check(size)


def check(size: str):
    models = [m for m in zoo.VIDEOMAE if (m.size, m.data) == (size, "k400")]
    for model in models:
        found = [zoo.size_of(model, x).parameters for x in ("pretrain", "finetune")]
        assert found == list(PARAMETERS[size])


@pytest.mark.slow
def test_parameters_of_avmae_are_the_published_ones():
    assert len(zoo.AVMAE) == len(AVMAE)
    for model in zoo.AVMAE:
        found = [zoo.size_of(model, x).parameters for x in ("pretrain", "finetune")]
        assert tuple(found) == AVMAE[model.data, model.pretrained, model.heard]


def test_names_and_addresses_are_different_ones():
    files = {f for m in zoo.MODELS for f in (*m.pretrained_files, *m.files)}
    assert len({name for _, name, _ in files}) == len(files)
    assert len({address for *_, address in files}) == len(files)
    scenic = [file for file in files if file[0] == "Scenic"]
    hub = [file for file in files if file[0] == "Hugging Face"]
    assert len(scenic) == 10 and len(hub) == 13


def test_commands_can_be_given():
    """Each is one of `convert`, its options fields of the config that it is about."""
    commands = re.findall(r"`python -m av_mae\.convert (\S+) --out (\S+)(.*?)`", PAGE)
    assert len(commands) == PAGE.count("| `python -m av_mae.convert")
    assert len({out for _, out, _ in commands}) == len(commands)
    for name, _, options in commands:
        trainer = "pretrain" if re.search("pretrained|_PT", name) else "finetune"
        importers.configure(trainer, {}, {}, convert.options_of(options.split()))


def test_frames_clips_and_crops():
    found = {zoo.frames(model, "finetune") for model in zoo.MODELS}
    assert {"(32 + 10 s) × 4 × 1", "8 s × 4 × 1", "16 × 2 × 3"} <= found
    assert zoo.frames(zoo.AVMAE[0], "pretrain") == "16 + 10 s"
