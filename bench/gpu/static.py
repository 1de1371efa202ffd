"""What reports of a compiler share: the tool that reads binaries, and what is committed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import triton

from bench.results import text_of

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


def cuobjdump(binary: str | Path, *flags: str) -> str:
    """What the tool that comes with triton prints of a library or cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *flags, binary], capture_output=True, text=True, check=True)
    return done.stdout


def regressions(
    committed: dict[str, Any], now: dict[str, Any], limits: Sequence[str], kinds: Sequence[str]
) -> list[str]:
    """A line for each kernel that is new or gone, takes more of a limit, or lacks a kind.

    Args:
        committed, now: reports, ``{"architectures": {name: {kernel: {figure: count}}}}``.
        limits: figures that must not grow.
        kinds: figures that must not vanish.
    """
    worse = []
    for name, rows in now["architectures"].items():
        before = committed["architectures"].get(name, {})
        worse += [f"{name} {kernel}: not in both" for kernel in sorted(rows.keys() ^ before.keys())]
        for kernel in sorted(rows.keys() & before.keys()):
            old, new = before[kernel], rows[kernel]
            worse += [
                f"{name} {kernel}: {field} {old.get(field, 0)} -> {new[field]}"
                for field in limits
                if new.get(field, 0) > old.get(field, 0)
            ]
            worse += [
                f"{name} {kernel}: no {kind} any more"
                for kind in kinds
                if old.get(kind) and not new.get(kind)
            ]
    return worse


def finish(
    report: Path,
    now: dict[str, Any],
    wrong: list[str],
    regressions: Callable[[dict[str, Any], dict[str, Any]], list[str]] | None,
) -> int:
    """Write the report, or say what got worse since the committed one; returns the exit code.

    Args:
        now: what was found.
        wrong: lines of what is wrong whatever is committed.
        regressions: of the committed report and `now`; None writes.
    """
    if regressions is None:
        report.write_text(text_of(now), encoding="utf-8")
        print(f"written: {report}")
    else:
        wrong = wrong + regressions(json.loads(report.read_text(encoding="utf-8")), now)
    for line in wrong:
        print(line)
    return 1 if wrong else 0
