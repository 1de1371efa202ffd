"""An sdist, the wheel of it for every architecture, and that wheel where there is nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import cuda_static, gate
from tools.release import (
    TOOLS,
    WITH_CUDA,
    WITHOUT_CUDA,
    build_sdist,
    build_wheel,
    installed,
    repaired,
    run_bare,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def release(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"the CUDA kernels are compiled where there is {', '.join(missing)}")
    wheel = build_wheel(sdist, tmp_path_factory.mktemp("release"), WITH_CUDA)
    return repaired(wheel, tmp_path_factory.mktemp("repaired"))


USE = """
import json, mpo_kernels, torch
found = {"file": mpo_kernels.__file__, "started": torch.cuda.is_initialized()}
found["reason"] = mpo_kernels.available_backends()["cuda"][1]
layer = mpo_kernels.MPOLinear(12, 6, mpo_kernels.MPOShape((3, 4), (2, 3), 2))
found["shape"] = list(layer(torch.ones(2, 12)).shape)
try:
    from mpo_kernels import _cuda
except ImportError:
    found["extension"] = None
else:
    from mpo_kernels.backends.cuda import decode, thin
    from mpo_kernels.planning.figures import default_figures
    shapes = (1, 64, 1, 8), (8, 1, 64, 1)
    cores = tuple((shape, thin.laid_out_strides(shape, True)) for shape in shapes)
    figures = default_figures("cuda", torch.float16, 1)
    chain = thin.chain_of(cores, 1, (64, 64), True, 2, 132, figures)
    decode.compiled(chain, torch.float16, torch.float16, 90)
    found["extension"] = _cuda.INTERFACE
    found["sources"] = _cuda.SOURCES
    try:
        _cuda.limits(0)
    except RuntimeError as error:
        found["no device"] = str(error)
print(json.dumps(found))
"""


def used(python: Path) -> dict[str, Any]:
    return json.loads(run_bare(python, "-c", USE, cwd=python.parent))


def test_a_release_serves_every_architecture_and_imports_anywhere(
    release: Path, tmp_path: Path
) -> None:
    assert "-manylinux_2_" in release.name
    assert cuda_static.main([str(release), "--check"]) == 0
    found = used(installed(release, tmp_path / "clean"))
    assert found["file"].startswith(str(tmp_path)) and not found["started"]
    assert found["shape"] == [2, 6]
    assert found["extension"] == 2
    assert found["sources"] == gate.csrc_hash()
    assert found["reason"] == "no CUDA device"
    assert found["no device"].startswith("cudaDeviceGetAttribute: ")


def test_a_wheel_without_kernels_is_whole(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path / "wheel", WITHOUT_CUDA)
    assert wheel.name.endswith("-none-any.whl")
    found = used(installed(wheel, tmp_path / "clean"))
    assert found["extension"] is None and found["shape"] == [2, 6]


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("auto", 0, "mpo-kernels: no nvcc, cmake, ninja: built without CUDA kernels"),
        ("1", 1, "MPO_KERNELS_BUILD_CUDA=1 needs nvcc, cmake, ninja on PATH"),
        ("yes", 1, "expected MPO_KERNELS_BUILD_CUDA of auto, 0, 1, got 'yes'"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, setting: str, code: int, message: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "setup.py", "--name"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": str(tmp_path), "MPO_KERNELS_BUILD_CUDA": setting},
    )
    assert done.returncode == code and message in done.stderr
