"""Settings that every test shares."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What one test compiled, the next ones and their child processes need not.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="av_mae_compiled_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Nearly all of a training test's time goes to XLA's compiler; its older emitters, which
# make the same arithmetic, take half. Other releases may not know the flag and abort.
if "XLA_FLAGS" not in os.environ and metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
