"""What stress tests tried, how often, and how it ended: docs/reliability.json.

`make stress` names the file in AV_MAE_RECORD; `python docs/reliability.py` makes the
page of it. Other runs of the tests record nothing.
"""

import fcntl
import json
import os
from pathlib import Path

RECORD = "AV_MAE_RECORD"


def record(fault: str, times: int, outcome: str, seed: int | None = None):
    """Notes that the test which is running tried `fault` so many times, and passed.

    Called at the end of a test, when everything has been compared.
    """
    if not os.environ.get(RECORD):
        return
    test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
    row = {"times": times, "seed": seed, "outcome": outcome, "test": test}
    path = Path(os.environ[RECORD])
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = json.loads(file.read() or "{}") | {fault: row}
        file.truncate(0)
        file.write(json.dumps(rows, indent=1, sort_keys=True) + "\n")
