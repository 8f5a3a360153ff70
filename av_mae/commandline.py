"""What commands have in common on a terminal: quiet logs, errors in one sentence."""

import logging
import os
import re
import sys

from absl import flags

from av_mae import UserError


def quiet_libraries():
    """Lines without decoration; of JAX, Orbax and TensorFlow, warnings alone.

    Dozens of their lines go with every checkpoint, and our own would drown in them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    # TensorFlow writes TensorBoard files and computes nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def show_our_log(level: int = logging.INFO):
    """Lets the lines of this project through, from the process that speaks."""
    for ours in ("av_mae", "data"):
        logging.getLogger(ours).setLevel(level)


def parse(holder: flags.FlagHolder, argv: list[str]) -> list[str]:
    """The flags; what is wrong with them, or in the config file, in one sentence."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"what is {rest[1]!r}? Options begin with --.")
        if holder.value is None:
            raise UserError("give a config, as in --config=configs/digits/pretrain.py.")
        holder.value.to_dict()  # a file that could not be read is told only here
        return rest
    except AttributeError as error:  # a field that the locked config does not have
        what = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
        given = " ".join(arg for arg in argv if arg.startswith("--config."))
        stop(UserError(f"the config has no field {what} (given: {given})"))
    except OSError as error:
        stop(UserError(f"--config: {str(error).splitlines()[-1].strip()}"))
    except (UserError, flags.Error, KeyError, TypeError, ValueError) as error:
        stop(error)


def axis(flag: str, text: str) -> tuple[str, list[str]]:
    """(name, values) of `NAME=A,B`; commas within brackets or quotes part nothing.

    Raises UserError, which names the flag, for a text of another form.
    """
    name, equals, values = text.partition("=")
    parts = re.findall(
        r"""(?:[^,(\["']|\([^)]*\)|\[[^\]]*\]|"[^"]*"|'[^']*')+""", values
    )
    if not (name and equals and parts) or ",".join(parts) != values:
        raise UserError(f"{flag} {text!r}: write NAME=A,B, a name and its values.")
    return name, parts


def stop(error: Exception):
    """Prints an error in one line, without the traceback that some carry, and exits."""
    lines = str(error).strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        lines = [lines[-1].removeprefix("ValueError: ")]
    print("error:", " ".join(lines), file=sys.stderr)
    sys.exit(2)
