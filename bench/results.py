"""The results file: conditions and records, written after every record."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def text_of(content: Any, width: int = 360, indent: int = 0) -> str:
    """JSON that a person can read: what fits on a line is one."""
    line = json.dumps(content)
    if indent + len(line) <= width or not isinstance(content, dict | list):
        return line + "\n" * (not indent)
    if isinstance(content, dict):
        first, last = "{}"
        parts = [f"{json.dumps(k)}: {text_of(v, width, indent + 1)}" for k, v in content.items()]
    else:
        first, last = "[]"
        parts = [text_of(value, width, indent + 1) for value in content]
    margin = "\n" + " " * indent
    inner = f",{margin} ".join(parts)
    return f"{first}{margin} {inner}{margin}{last}" + "\n" * (not indent)


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no results."""
    try:
        results = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"expected results of `python -m bench` in {path}: {error}") from error
    if not isinstance(results, dict) or not {"conditions", "records"} <= set(results):
        raise ValueError(f"expected results of `python -m bench` in {path}, with their conditions")
    return results


class Results:
    """Records on disk, with the conditions they hold under.

    Args:
        path: the JSON file.
        conditions: machine, versions, commit, device, dtype, …
        resume: keep what the file holds already.

    Raises:
        ValueError: a folder, or a file to resume that was measured under other conditions.
    """

    # What must not differ within one file.
    _SAME = ("machine", "versions", "git", "device", "dtype")

    def __init__(self, path: Path, conditions: dict[str, Any], resume: bool) -> None:
        if path.is_dir():
            raise ValueError(f"expected a file to write results to, got the folder {path}")
        self.path, self.conditions, self.records = path, conditions, []
        if resume and path.exists():
            before = load(path)
            for key in self._SAME:
                if before["conditions"].get(key) != conditions[key]:
                    raise ValueError(
                        f"cannot resume {path}: expected {key} {before['conditions'].get(key)}, "
                        f"as it was started with, got {conditions[key]}"
                    )
            self.conditions, self.records = before["conditions"], before["records"]

    def has(self, case: str, name: str) -> bool:
        """Is pass ``name`` of a case there already?"""
        return any(record["case"] == case and record["pass"] == name for record in self.records)

    def add(self, record: Record) -> None:
        """Append a record and write the file whole, so that a stopped run loses nothing."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        conditions = json.dumps(self.conditions, indent=1)
        records = ",\n".join(map(json.dumps, self.records))  # a line each
        temporary.write_text(f'{{"conditions": {conditions},\n"records": [\n{records}\n]}}\n')
        os.replace(temporary, self.path)
