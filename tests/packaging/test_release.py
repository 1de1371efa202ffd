"""The release script on a copy of this tree: what it makes without CUDA, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_kernels.version import __version__
from tools.release import checked_version, run

ROOT = Path(__file__).parents[2]


def git(checkout: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", *identity, *arguments, cwd=checkout)


def commit(checkout: Path, file: str, old: str, new: str) -> None:
    text = (checkout / file).read_text(encoding="utf-8")
    assert old in text
    (checkout / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    git(checkout, "commit", "--quiet", "--all", "--message", file)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one commit with the files of this tree, committed here or not."""
    folder = tmp_path / "checkout"
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


def test_a_release_is_made_of_the_commit(checkout: Path) -> None:
    ignored = checkout / "csrc" / "left.so"
    ignored.touch()
    done = released(checkout)
    assert done.returncode == 0, done.stderr
    assert f"the commit has no tag v{__version__}" in done.stdout
    names = [f"mpo_kernels-{__version__}.tar.gz", f"mpo_kernels-{__version__}-py3-none-any.whl"]
    files = [checkout / "dist" / name for name in names]
    assert {*files, checkout / "dist" / "SHA256SUMS"} == set((checkout / "dist").iterdir())
    sums = (checkout / "dist" / "SHA256SUMS").read_text().split()
    assert sums[::2] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert sums[1::2] == names
    upload = " ".join(f"dist/{name}" for name in names)
    assert done.stdout.rstrip().endswith(f"-m twine upload {upload}")
    shutil.unpack_archive(files[0], checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    assert (unpacked / "csrc" / "thin.cu").is_file()
    assert not (unpacked / "csrc" / "left.so").exists()


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
