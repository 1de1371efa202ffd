"""Where the kernels, as their sources are now, passed `bench/gpu_gate.sh` on a device."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from mpo_kernels.backends.cuda import extension

_FOLDER = Path(__file__).parent
RECORDS = _FOLDER / "validated.json"
KINDS = ("triton", "cuda")


@cache
def source_hash(kernels: str) -> str | None:
    """Of the sources of ``"triton"`` or ``"cuda"`` kernels.

    Triton's are the files of their folder that hold any; those of ``csrc`` are named by the library
    made of them, which may not be there.
    """
    if kernels == "cuda":
        return getattr(extension.loaded()[0], "SOURCES", None)
    digest = hashlib.sha256()
    for path in sorted((_FOLDER / "triton").glob("*.py")):
        if b"@triton.jit" in (source := path.read_bytes()):
            digest.update(path.name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:16]


def _records() -> list[dict[str, Any]]:
    return json.loads(RECORDS.read_text(encoding="utf-8"))


def validations(kernels: str) -> list[dict[str, Any]]:
    """Records of the gate for these very sources: device, driver, versions, commit, date."""
    sources = source_hash(kernels)
    return [r for r in _records() if (r["kernels"], r["sources"]) == (kernels, sources)]


def add(kernels: str, conditions: dict[str, Any], sources: str) -> None:
    """Keep that the gate passed for these sources."""
    records = _records()
    record = {"kernels": kernels, "sources": sources, **conditions}
    if record not in records:
        records.append(record)
    RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def summary(kernels: str) -> str:
    """One line for a person."""
    if source_hash(kernels) is None:
        return "not built"
    if found := validations(kernels):
        places = "; ".join(
            f"{r['device']}, triton {r['triton']}, commit {r['commit'][:12]}" for r in found
        )
        return f"passed the gate as they are now on {places}"
    return "as they are now never run on a device: checked by emulation and the compiler only"
