"""Where the kernels, as their sources are now, passed `bench/gpu_gate.sh` on a device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_kernels.backends.cuda import extension
from mpo_kernels.backends.triton import device

RECORDS = Path(__file__).with_name("validated.json")
_SOURCES: dict[str, Callable[[], str | None]] = {
    "triton": device.source_hash,
    "cuda": extension.source_hash,
}
KINDS = tuple(_SOURCES)


def source_hash(kernels: str) -> str | None:
    """Of the sources of ``"triton"`` or ``"cuda"`` kernels, None where they are not there."""
    return _SOURCES[kernels]()


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
