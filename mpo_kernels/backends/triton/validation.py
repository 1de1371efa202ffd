"""Where the kernels, as their sources are now, passed `bench/gpu_gate.sh` on a device."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
RECORDS = _FOLDER / "validated.json"


@cache
def source_hash() -> str:
    """Of this folder's Python files: the kernels, their tiles and the choice between them."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def validations() -> list[dict[str, Any]]:
    """Records of the gate for these very sources: device, driver, versions, commit, date."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    return [record for record in records if record["sources"] == source_hash()]


def add(record: dict[str, Any]) -> None:
    """Keep that the gate passed for the sources as they are."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    record = {"sources": source_hash(), **record}
    if record not in records:
        records.append(record)
    RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def summary() -> str:
    """One line for a person."""
    if found := validations():
        places = "; ".join(
            f"{r['device']}, triton {r['triton']}, commit {r['commit'][:12]}" for r in found
        )
        return f"passed the gate as they are now on {places}"
    return "as they are now never run on a device: checked in the interpreter and the compiler only"
