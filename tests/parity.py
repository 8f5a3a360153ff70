"""Collects how far each fixture family is met, for docs/parity.md.

`record` is called by the family's one comparison function. With the environment
variable AV_MAE_PARITY set to a folder, each case is one JSON line in it; otherwise
nothing is written.
"""

import json
import os
from pathlib import Path


def record(family: str, case: str, **errors: float | None):
    """One case's worst errors: outputs (absolute), loss (relative), gradients (rule)."""
    folder = os.environ.get("AV_MAE_PARITY")
    if not folder:
        return
    known = {name: float(value) for name, value in errors.items() if value is not None}
    line = json.dumps({"family": family, "case": case, **known})
    path = Path(folder) / f"{os.getpid()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
