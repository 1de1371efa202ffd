"""The release script on a copy of this tree: what it makes, what it refuses, and its wheels where
there is nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.gpu import cuda_static, gate
from mpo_kernels.version import __version__
from tools.release import (
    TOOLS,
    WITH_CUDA,
    build_wheel,
    checked_version,
    installed,
    repaired,
    run,
    run_bare,
)

ROOT = Path(__file__).parents[2]


def git(checkout: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", *identity, *arguments, cwd=checkout)


def commit(checkout: Path, file: str, old: str, new: str) -> None:
    text = (checkout / file).read_text(encoding="utf-8")
    assert old in text
    (checkout / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    git(checkout, "commit", "--quiet", "--all", "--message", file)


def copied(folder: Path) -> Path:
    """A repository of one commit with the files of this tree, committed here or not."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith("bench/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "release")
    return folder


def released(checkout: Path) -> subprocess.CompletedProcess[str]:
    """The script, of the copy and without CUDA."""
    return subprocess.run(
        [sys.executable, "-m", "tools.release"],
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, "MPO_KERNELS_BUILD_CUDA": "0"},
    )


class Release(NamedTuple):
    """What the script made and printed; `names` are of the files in `dist`."""

    checkout: Path
    names: list[str]
    printed: str

    @property
    def files(self) -> list[Path]:
        """The sdist, and the wheel without CUDA kernels."""
        return [self.checkout / "dist" / name for name in self.names]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied(tmp_path / "checkout")


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    checkout = copied(tmp_path_factory.mktemp("release") / "checkout")
    (checkout / "csrc" / "left.so").touch()  # git ignores it
    done = released(checkout)
    assert done.returncode == 0, done.stderr
    names = [f"mpo_kernels-{__version__}.tar.gz", f"mpo_kernels-{__version__}-py3-none-any.whl"]
    return Release(checkout, names, done.stdout)


@pytest.fixture(scope="session")
def wheel(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the CUDA kernels, as it would be released."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"the CUDA kernels are compiled where there is {', '.join(missing)}")
    built = build_wheel(release.files[0], tmp_path_factory.mktemp("cuda"), WITH_CUDA)
    return repaired(built, tmp_path_factory.mktemp("repaired"))


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


def test_a_release_is_made_of_the_commit(release: Release) -> None:
    assert f"the commit has no tag v{__version__}" in release.printed
    dist = release.checkout / "dist"
    assert {*release.files, dist / "SHA256SUMS"} == set(dist.iterdir())
    sums = (dist / "SHA256SUMS").read_text().split()
    assert sums[::2] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in release.files]
    assert sums[1::2] == release.names
    upload = " ".join(f"dist/{name}" for name in release.names)
    assert release.printed.rstrip().endswith(f"-m twine upload {upload}")
    with tarfile.open(release.files[0]) as sdist:
        files = {file.partition("/")[2] for file in sdist.getnames()}
    assert "csrc/thin.cu" in files and "csrc/left.so" not in files


def test_a_dirty_tree_is_refused(checkout: Path) -> None:
    (checkout / "forgotten.py").touch()
    done = released(checkout)
    assert done.returncode == 1 and not done.stdout and not (checkout / "dist").exists()
    message = "release: error: the tree is not clean: 1 files, first ?? forgotten.py\n"
    assert done.stderr == message


def test_version_changelog_and_tag_agree(checkout: Path) -> None:
    assert checked_version(checkout) == __version__
    commit(checkout, "CHANGELOG.md", f"## {__version__} (unreleased)", f"## {__version__} (today)")
    git(checkout, "tag", f"v{__version__}")
    assert checked_version(checkout) == __version__
    commit(checkout, "CHANGELOG.md", "(today)", "(unreleased)")
    git(checkout, "tag", "--force", f"v{__version__}")
    with pytest.raises(RuntimeError, match=f"tagged, CHANGELOG.md calls {__version__} unreleased"):
        checked_version(checkout)
    commit(checkout, "mpo_kernels/version.py", __version__, "9.0")
    with pytest.raises(RuntimeError, match=rf"says 9\.0, the top of CHANGELOG.md {__version__}"):
        checked_version(checkout)
    commit(checkout, "CHANGELOG.md", f"## {__version__} ", "## 9.0 ")
    git(checkout, "tag", "v8.0")
    with pytest.raises(RuntimeError, match=r"says 9\.0, the commit's tag v8.0"):
        checked_version(checkout)


def test_a_release_serves_every_architecture_and_imports_anywhere(
    wheel: Path, tmp_path: Path
) -> None:
    assert "-manylinux_2_" in wheel.name
    assert cuda_static.main([str(wheel), "--check"]) == 0
    found = used(installed(wheel, tmp_path / "clean"))
    assert found["file"].startswith(str(tmp_path)) and not found["started"]
    assert found["shape"] == [2, 6]
    assert found["extension"] == 2
    assert found["sources"] == gate.csrc_hash()
    assert found["reason"] == "no CUDA device"
    assert found["no device"].startswith("cudaDeviceGetAttribute: ")


def test_a_wheel_without_kernels_is_whole(release: Release, tmp_path: Path) -> None:
    found = used(installed(release.files[1], tmp_path / "clean"))
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
