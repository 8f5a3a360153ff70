"""The page of config fields: all are there, what it says is true, and up to date."""

import re

import pages
import pytest
import synthetic

from av_mae import UserError, attention, augment, fusion, run
from data import DataError, folder_source, pipeline, transforms

page = pages.load("config")
PAGE = (pages.DOCS / "config.md").read_text(encoding="utf-8")
HINT = "run `JAX_PLATFORMS=cpu python docs/config.py`"
CONFIGS = synthetic.ROOT / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix()[:-3] for p in CONFIGS.glob("*/*.py"))

ENHANCER = ("attention", "concat")  # fusions, of configs of their own
EVERY = [
    (trainer, field)
    for trainer in page.TRAINERS
    for field in page.choices()
    if field in page.defaults(trainer)
]


def changed(trainer: str, field: str, choice):
    """A config with this choice, and what goes with it."""
    name = f"folder/{trainer}"
    if field == "model.fusion" and choice in ENHANCER:
        name = f"ucf101/avmaskenhancer_{trainer}"
    config = page.config_of(name)
    if choice == "precomputed":
        config.spectrogram.normalise = "none"
    if field == "modalities":
        choice = (choice,)
    elif field == "model.variant":
        choice = f"{choice}/16x2"
    elif field.endswith(".corruption"):
        choice = f"{choice}:1"
    config.update_from_flattened_dict({field: choice})
    return config


def refusal(trainer: str, config) -> str:
    """What the program says of the config; '' where it takes it."""
    try:
        page.TRAINERS[trainer].check(config)
        pipeline.check(config.data)
    except (UserError, DataError) as error:
        return str(error)
    return ""


def named(text: str) -> set[str]:
    """The choices that a refusal names."""
    rest = re.split(r"choose one of|is none of", text)[1]
    return set(re.findall(r"\w+", rest))


def test_the_page_is_up_to_date():
    assert page.page() == PAGE, HINT


def test_every_field_of_every_config_has_a_meaning():
    found = {name: page.fields(page.config_of(name)) for name in NAMES}
    assert set().union(*found.values()) == set(page.MEANINGS)
    assert set().union(*map(page.defaults, page.TRAINERS)) == set(page.MEANINGS)
    for field, meaning in page.MEANINGS.items():
        assert meaning.endswith("."), field


def test_each_group_has_one_section():
    groups = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert len(groups) == len(set(groups)) and groups[0] == "top level"
    assert {page.group_of(field) for field in page.MEANINGS} == set(groups[:-1])


@pytest.mark.parametrize(("trainer", "field"), EVERY)
def test_every_choice_is_accepted(trainer, field):
    """But the other trainer, which wants a config of its own."""
    for choice in getattr(page.choices()[field], trainer):
        if field != "trainer" or choice == trainer:
            assert refusal(trainer, changed(trainer, field, choice)) == "", choice


@pytest.mark.parametrize("trainer", page.TRAINERS)
def test_no_choice_is_left_out(trainer):
    """Where the program refuses a word, it names the choices of the page, all of them.

    At `trainer` and `mode` main alone looks.
    """
    seen = set()
    for field, known in page.defaults(trainer).items():
        wrong = 7 if field == "data.crops" else "?"
        if type(known) is not type(wrong) or field == "trainer":
            continue
        config = page.config_of(f"folder/{trainer}")
        config.update_from_flattened_dict({field: wrong})
        text = refusal(trainer, config)
        if not re.search("choose one of|is none of", text):
            continue
        assert field in text and field in page.choices(), field
        choices = set(map(str, getattr(page.choices()[field], trainer)))
        # The refusal knows neither those of other models nor of other trainers.
        missed = choices ^ named(text) if field != "model.fusion" else ()
        assert not missed, field
        seen.add(field)
    other = {"trainer", "modalities", "model.variant"}
    assert seen | other == {field for t, field in EVERY if t == trainer}


def test_fusions_are_those_of_the_models():
    found = page.choices()["model.fusion"]
    assert set(found.finetune) == {*fusion.FUSIONS, "concat"}
    late = {"bottleneck", "cross"}  # whose fields a pretraining config has not
    assert set(found.pretrain) == {*fusion.FUSIONS, *ENHANCER} - late


def test_words_are_of_choices_and_of_all():
    for field, words in page.WORDS.items():
        known = page.choices()[field]
        assert set(words) == set(known.pretrain) | set(known.finetune), field


@pytest.mark.parametrize("name", [*page.VIDEOMAE, *page.SCENIC], ids=lambda x: x[0])
def test_names_elsewhere_are_of_fields_and_choices(name):
    assert name.ours or name.differs
    for word in name.ours.split():
        field, _, choice = word.partition("=")
        assert field in page.MEANINGS
        if choice and field in page.choices():
            known = page.choices()[field]
            assert choice in map(str, known.pretrain + known.finetune)


def test_other_names_stand_once():
    for names in (page.VIDEOMAE, page.SCENIC):
        assert len({name.theirs for name in names}) == len(names)


def test_numbers_of_the_code_that_are_told():
    short = lambda x: f"{x:g}".removeprefix("0")
    crops, percent = page.WORDS["data.crop"], lambda x: f"{100 * x:g}"
    low, high = map(percent, transforms.AREA)
    told = [
        (crops["jitter"], " to ".join(map(short, transforms.JITTER))),
        (crops["multiscale"], f"1 to {short(min(transforms.SCALES))} of"),
        (crops["multiscale"], f"{len(transforms.QUARTERS)} places"),
        (crops["resized"], f"{low} to {high} %"),
        (page.WORDS["nonfinite"]["skip"], f"{run.MAX_SKIPPED} in a row"),
        (page.WORDS["compute.attention"]["auto"], f"{attention.FUSED_FROM} keys"),
        (page.MEANINGS["augment.erase"], f"{percent(augment.ERASED_AREA[0])} % to a"),
        (page.MEANINGS["data.prepared.short_side"], f"at {folder_source.SHORT_SIDE}"),
    ]
    for text, number in told:
        assert number in text


def test_rows_are_tables():
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4, 5}
    assert all(line.endswith(" |") or set(line) <= set("|-") for line in lines)
    assert page.row("probe").startswith("| `probe` | — | `full` |")
    assert page.row("data.randaugment").startswith("| `data.randaugment` | `''` |")
    assert "`(16, 32, 64, 128)`" in page.row("model.sound.filters")
