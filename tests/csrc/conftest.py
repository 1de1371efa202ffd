"""The kernels on a device, where the extension is built and there is one, else on an emulated one.

The emulated device is the extension with another machine under it, built by CMake with the host's
compiler; it takes addresses of CPU tensors.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from mpo_kernels.backends.cuda import backend, decode, extension

FOLDER = Path(__file__).parent
BUILD = FOLDER.parents[1] / "build" / "emulated"


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder with what CMake builds of this one."""
    if missing := [tool for tool in ("cmake", "ninja", "c++") if not shutil.which(tool)]:
        pytest.skip(f"the kernels are emulated where there is {', '.join(missing)}")
    pybind11 = pytest.importorskip("pybind11", reason="the kernels are emulated with pybind11")

    configure = ["cmake", "-G", "Ninja", "-S", str(FOLDER), "-B", str(BUILD)]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    BUILD.parent.mkdir(exist_ok=True)
    with FileLock(BUILD.with_suffix(".lock")):  # of several workers one builds
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


ON_DEVICE = extension.unavailable() is None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0) if ON_DEVICE else torch.device("cpu")


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The extension, on whatever device there is."""
    if ON_DEVICE:
        return extension.load()
    (path,) = request.getfixturevalue("build").glob("emulated*.so")
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_backend(
    kernels: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[backend.CudaBackend]:
    """The back end as a whole; what tests make lies on its device."""
    if not ON_DEVICE:
        monkeypatch.setattr(extension, "loaded", lambda: (kernels, ""))
        monkeypatch.setattr(extension, "unsupported", lambda device: None)
        monkeypatch.setattr(extension, "unavailable", lambda: None)
        monkeypatch.setattr(extension, "limits", lambda device: (90, 132))
        monkeypatch.setattr(decode, "stream_of", lambda device: 0)
        monkeypatch.setattr(decode, "capturing", lambda: False)
    torch.set_default_device(device)
    yield backend.CudaBackend()
    torch.set_default_device(None)
    decode.compiled.cache_clear()
    backend._plan.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
