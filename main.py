"""`python main.py …` is `python -m av_mae.main …`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("av_mae.main", run_name="__main__", alter_sys=True)
