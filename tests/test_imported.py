"""The config of a published file: every field, and where its values come from."""

import pytest
import synthetic

from av_mae import CheckpointError, ConfigError
from av_mae.importers import Imported, Row, configure, template

CONFIGS = synthetic.ROOT / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix()[:-3] for p in CONFIGS.glob("*/*.py"))


def fields(tree, path="") -> dict[str, type]:
    """{full name of a field: its type}; what an optimiser or one system has is out."""
    found = {}
    for key, value in tree.items():
        if hasattr(value, "items"):
            found |= fields(value, f"{path}{key}.")
        elif not path.startswith(("optimizer.", "model.sound.")):
            found[path + key] = type(value)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_template_has_the_fields_of_every_config(name):
    config = synthetic.config(name, "")
    assert fields(template(config.trainer)) == fields(config)


def test_what_the_file_tells_what_is_said_and_what_is_assumed():
    found = {"model.fusion": "mid", "modalities": ("rgb",)}
    assumed = {"data.num_frames": 32, "data.stride": 2, "model.fusion": "early"}
    options = {"data.stride": 8, "modalities": ["rgb"], "model.fusion": "mid"}
    config, notes = configure("pretrain", found, assumed, options)
    assert (config.model.fusion, config.data.num_frames) == ("mid", 32)
    assert (config.data.stride, config.modalities) == (8, ("rgb",))
    assert notes == ["Not in the file, taken from the publication: data.num_frames=32."]
    assert configure("pretrain", found, {}, {})[1] == []


def test_options_that_cannot_be():
    with pytest.raises(CheckpointError, match="is 'early', but the file says 'mid'"):
        configure("pretrain", {"model.fusion": "mid"}, {}, {"model.fusion": "early"})
    for name in ("model.fuson", "modle.fusion", "model.fusion.kind", "fusion"):
        with pytest.raises(ConfigError, match=f"{name} is no field of a finetune"):
            configure("finetune", {}, {}, {name: 1})
    with pytest.raises(ConfigError, match="data.stride is 'x': it has to be of .* int"):
        configure("finetune", {}, {}, {"data.stride": "x"})
    with pytest.raises(ConfigError, match="model.decoder is a group of fields"):
        configure("pretrain", {}, {}, {"model.decoder": 3})


def test_the_report():
    rows = [Row("theirs", "ours", "cut"), Row("moment", "", "why"), Row("", "head", "")]
    text = Imported(template("finetune"), {}, rows, ["A sentence."]).report()
    assert text.splitlines() == [
        "source  ours",
        "theirs  ours    cut",
        "moment  (left)  why",
        "(none)  head",
        "A sentence.",
    ]
