"""Audiovisual masked autoencoders in JAX.

One alphabet of axes serves the whole project, in einops patterns, comments and
annotations:

    b batch    t time (frames or spectrogram rows)    h w picture    c channels
    n tokens   k kept tokens   m masked tokens        d width
    f features of a flat patch (or frequency bins)    s samples of sound
    v views or samples of a clip

Modalities are dict keys, always in the order of `MODALITIES`. Importing this package
imports nothing heavy.
"""

MODALITIES = ("rgb", "spectrogram")

# The collection in which a model puts, in training, the new values of parameters that
# are no weights but running statistics.
STATISTICS = "statistics"


class UserError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A field of the config is wrong; the sentence names the field."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit; the sentence names it."""


class TrainingError(UserError):
    """Training cannot go on (a non-finite loss); the sentence says what to try."""


class BadNumberError(TrainingError):
    """The state of a training is not finite, or not what it should be: never saved."""


def choose(field: str, name: str, table):
    """The entry `name` of `table`, or a ConfigError that names the config's field.

    `table` is a dict, or a sequence of names, of which the name itself is returned.
    """
    if name in table:
        return table[name] if isinstance(table, dict) else name
    import difflib

    close = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    known = ", ".join(repr(key) for key in table)
    raise ConfigError(f"{field} is {name!r}: {hint}choose one of {known}.")


def __getattr__(name: str):
    """`load` and `read_clip` reach what imports jax only when they are asked for."""
    if name == "load":
        from av_mae import api

        return api.load
    if name == "read_clip":
        from av_mae import clips

        return clips.read_clip
    raise AttributeError(f"module 'av_mae' has no attribute {name!r}")
