"""A command of `python -m av_mae.…`, and a list of the config fields that it read.

    python tests/fields_read.py OUT.json av_mae.main --config=… --workdir=…

A field counts by its full name, `finetune:model.block.eps`, where code of `av_mae` or
`data` reads it for itself: not as one of all fields (`items`, JSON), nor in `validate`,
which only checks them.
"""

import atexit
import json
import runpy
import sys
from pathlib import Path

from ml_collections import ConfigDict

names = {}  # of groups: id → "finetune:model.block."
groups = []  # kept, so that no other gets the same id
read = set()
get = ConfigDict.__getitem__


def reader() -> str:
    """The module that reads; that of ConfigDict where the field is one of all."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("__getattr__", "get"):
        frame = frame.f_back
    return frame.f_globals["__name__"]


def recorded(self, key):
    value, module = get(self, key), reader()
    if id(self) not in names and "trainer" in self:
        names[id(self)] = get(self, "trainer") + ":"
        groups.append(self)
    if id(self) in names:
        name = names[id(self)] + key
        if isinstance(value, ConfigDict):
            names[id(value)] = f"{name}."
            groups.append(value)
        elif module != "av_mae.validate" and (
            module == "__main__" or module.split(".")[0] in ("av_mae", "data")
        ):
            read.add(name)
    return value


if __name__ == "__main__":
    out, module = sys.argv[1:3]
    del sys.argv[1:3]
    atexit.register(lambda: Path(out).write_text(json.dumps(sorted(read))))
    ConfigDict.__getitem__ = recorded
    runpy.run_module(module, run_name="__main__", alter_sys=True)
