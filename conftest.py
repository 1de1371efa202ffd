"""What was measured on this machine must not decide what the tests see."""

import gc
import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="mpo-kernels-tests-")
os.environ["MPO_KERNELS_CACHE"] = _cache.name
os.environ.pop("MPO_KERNELS_TUNE", None)


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking for garbage in it would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 50)
