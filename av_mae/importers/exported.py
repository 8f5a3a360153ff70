"""Models that `python -m av_mae.export --to safetensors` wrote: a folder of two files.

config.json         {"model_type": "av_mae", "format": 1, "config", "meta"}
model.safetensors   the parameters by our '/'-joined names
"""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from av_mae import CheckpointError
from av_mae.importers.imported import Imported, Row
from av_mae.importers.videomae import nested

TYPE, FORMAT = "av_mae", 1


def matches(path: Path | str) -> bool:
    """Whether a path is such a folder, or its model.safetensors."""
    return bool(_settings(Path(path)))


def _folder(path: Path) -> Path:
    return path.parent if path.suffix == ".safetensors" else path


def _settings(path: Path) -> dict:
    """The contents of config.json where it is ours, else nothing."""
    try:
        text = (_folder(path) / "config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
    except (OSError, ValueError):
        return {}
    ours = isinstance(settings, dict) and settings.get("model_type") == TYPE
    return settings if ours else {}


def read(path: Path | str, **options) -> Imported:
    """The model as it was exported.

    Raises CheckpointError if a file is damaged or of a later release, or for any
    option: the folder tells the whole config.
    """
    path = Path(path)
    settings = _settings(path)
    if options:
        raise CheckpointError(
            f"{path} tells its whole config: leave {', '.join(options)} out."
        )
    if settings.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has format {settings['format']}, this release reads up to "
            f"{FORMAT}: update av_mae."
        )
    file = _folder(path) / "model.safetensors"
    try:
        flat: dict[str, np.ndarray] = load_file(file)
        config, meta = ConfigDict(settings["config"]), settings["meta"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    rows = [Row(name, name, "") for name in flat]
    return Imported(config, nested(flat), rows, [], meta.get("labels") or [], meta)
