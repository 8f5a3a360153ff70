"""Tests of av_mae/commandline.py; whole commands with wrong flags are in test_main."""

import functools
import logging

import pytest

from av_mae import UserError, commandline


def test_an_axis_keeps_commas_in_brackets():
    axis = functools.partial(commandline.axis, "--grid")
    assert axis("probe=full,linear") == ("probe", ["full", "linear"])
    text = """modalities=("rgb",),('rgb','spectrogram')"""
    assert axis(text)[1] == ["""("rgb",)""", "('rgb','spectrogram')"]
    assert axis("x=''")[1] == ["''"]
    for wrong in ("probe", "probe=", "=full", "probe=[1,2"):
        with pytest.raises(UserError, match="--grid '.*': write NAME=A,B") as error:
            axis(wrong)
        assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("one\nsentence."), "error: one sentence."),
        (
            ValueError(
                'bad:\nTraceback (most recent call last):\n  File "x"\nOSError: no'
            ),
            "error: OSError: no",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_status_2(capsys, error, line):
    with pytest.raises(SystemExit) as stopped:
        commandline.stop(error)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line + "\n"


def test_only_our_lines_are_shown(capsys, monkeypatch):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        commandline.quiet_libraries()
        commandline.show_our_log()
        logging.getLogger("absl").info("theirs")
        logging.getLogger("orbax").info("theirs")
        logging.getLogger("data.pipeline").info("ours %d", 1)
        logging.getLogger("av_mae.main").info("ours %d", 2)
        assert capsys.readouterr().err == "ours 1\nours 2\n"
    finally:
        root.handlers[:] = before
        root.setLevel(level)
