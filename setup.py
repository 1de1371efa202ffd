"""Everything is declared in pyproject.toml but the CUDA back end, built by CMake where nvcc is.

``MPO_KERNELS_BUILD_CUDA``: ``1`` builds it or fails, ``0`` leaves it out, ``auto`` (the default)
builds it where nvcc, CMake and ninja are found. ``MPO_KERNELS_CUDA_ARCHITECTURES``: ``release``, a
list as CMake takes it, or ``native`` (the default): of the devices here, or sm_80 and its PTX
where there is none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CHOICE = os.environ.get("MPO_KERNELS_BUILD_CUDA") or "auto"
WISHED = os.environ.get("MPO_KERNELS_CUDA_ARCHITECTURES") or "native"


def wanted() -> bool:
    """Whether the extension is built; says so where it is not."""
    if CHOICE not in ("auto", "0", "1"):
        raise SystemExit(f"expected MPO_KERNELS_BUILD_CUDA of auto, 0, 1, got {CHOICE!r}")
    missing = [tool for tool in ("nvcc", "cmake", "ninja") if not shutil.which(tool)]
    if CHOICE == "1" and missing:
        raise SystemExit(f"MPO_KERNELS_BUILD_CUDA=1 needs {', '.join(missing)} on PATH")
    if CHOICE == "auto" and missing:
        print(f"mpo-kernels: no {', '.join(missing)}: built without CUDA kernels", file=sys.stderr)
    return CHOICE == "1" or (CHOICE == "auto" and not missing)


def architectures() -> str:
    """As CMake takes them."""
    if WISHED == "native":
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        if not shutil.which(query[0]):
            return "80"
        printed = subprocess.run(query, capture_output=True, text=True).stdout.split()
        found = {line.replace(".", "") for line in printed if re.fullmatch(r"\d+\.\d", line)}
        return ";".join(f"{number}-real" for number in sorted(found)) or "80"
    return WISHED


class CMakeBuild(build_ext):
    """Builds ``mpo_kernels/_cuda``, as CMakeLists.txt says."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve()
        configure = [
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)),
            "-DRELEASE=ON"
            if WISHED == "release"
            else f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            # What setuptools passes over, with a warning, where the extension is optional.
            raise CompileError(f"the CUDA kernels were not built: {error}") from error


setup(
    ext_modules=[Extension("mpo_kernels._cuda", [], optional=CHOICE == "auto")] if wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
