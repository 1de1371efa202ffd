"""The conditions a figure was measured under: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = (
    *("torch", "triton", "mpo-kernels", "numpy"),
    *("opt_einsum", "tensorly", "tensorly-torch"),
)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads used, memory in bytes; and the GPU where one is measured."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": memory_bytes(device),
            "cuda": torch.version.cuda,
        }
    else:
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    return facts


def processor() -> str:
    """The GPU's name where there is one, else the CPU's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = machine(device)
    return str(found.get("gpu", found["cpu"]))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def memory_bytes(device: torch.device) -> int:
    """All the memory there is, of the machine or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Of Python and of whatever takes part and is installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command(module: str, arguments: Sequence[str]) -> str:
    """What was typed; of absolute paths only the last part is kept."""
    kept = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join(["python", "-m", module, *kept])


def conditions(
    module: str, arguments: Sequence[str], device: torch.device, /, *packages: str, **more: Any
) -> dict[str, Any]:
    """What a figure names: command, machine, versions (of ``packages`` too), commit, and more."""
    return {
        "command": command(module, arguments),
        **more,
        "machine": machine(device),
        "versions": versions() | {name: metadata.version(name) for name in packages},
        "git": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> dict[str, Any]:
    """The commit, and whether anything but the results differed from it.

    ``$GIT_COMMIT`` is taken at its word: a copy elsewhere may have another history, or none.
    """
    if named := os.environ.get("GIT_COMMIT"):
        return {"commit": named, "dirty": False}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
