"""Files that others published, read into our config and our parameters.

`read` tells by itself what a file is. Each module of this package reads one system's
files and has two functions: `matches(path) -> bool`, which is cheap, and
`read(path, **options) -> Imported`. What they have in common is in `imported`.
"""

from pathlib import Path

from av_mae import CheckpointError
from av_mae.importers.imported import Imported, Row, configure, template

__all__ = ["Imported", "Row", "configure", "find", "read", "template"]


def find(path: Path | str):
    """The module that reads this published file or folder; None if there is none."""
    from av_mae.importers import avmaskenhancer, exported, scenic, videomae

    # Before videomae, which would take the video half for the whole.
    kinds = (exported, scenic, avmaskenhancer, videomae)
    return next((kind for kind in kinds if kind.matches(Path(path))), None)


def read(path: Path | str, **options) -> Imported:
    """A published file: our config, our parameters and a report of every parameter.

    options: fields of the config by dotted name (`**{"model.pool": "max"}`) that the
    file does not tell. Raises CheckpointError if the file is missing, damaged, of no
    known kind, or contradicts an option.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path} does not exist: give a published file.")
    kind = find(path)
    if kind is None:
        raise CheckpointError(
            f"{path} is no file that this release reads: give a checkpoint of Scenic "
            "AV-MAE (one msgpack file), a VideoMAE of Hugging Face (a folder), MCG-NJU "
            "(.pth) or Keras (.h5, SavedModel), an AV-MaskEnhancer (.pth), or a folder "
            "that av_mae.export wrote."
        )
    return kind.read(path, **options)
