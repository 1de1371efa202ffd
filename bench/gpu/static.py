"""What reports of a compiler share: the tool that reads binaries, and what is committed."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import triton

from bench.results import text_of

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
INSTRUCTION = 16  # bytes, from sm_70


def cuobjdump(binary: str | Path, *flags: str, cwd: Path | None = None) -> str:
    """What the tool that comes with triton prints of a library or cubin."""
    return _printed("cuobjdump", *flags, binary, cwd=cwd)


def _printed(tool: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout


def instructions(codes: Sequence[bytes], architecture: str) -> list[str]:
    """The SASS of the code of kernels for ``sm_90a``, say: a line for each instruction.

    All go by one call of nvdisasm: its start takes longer than a kernel.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        printed = _printed("nvdisasm", "--binary", architecture.replace("sm_", "SM"), file.name)
    lines = iter(re.findall(r"^ +/\*[0-9a-f]+\*/ (.*)$", printed, re.MULTILINE))
    found = ["\n".join(islice(lines, len(code) // INSTRUCTION)) for code in codes]
    assert next(lines, None) is None and all(found), "expected a line for each instruction"
    return found


def code_of(cubin: bytes) -> dict[str, bytes]:
    """The executable sections of a 64-bit ELF file by name: ``.text.`` and a kernel's."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    names = headers[of_names][4]
    return {
        cubin[names + name : cubin.index(b"\0", names + name)].decode(): cubin[at : at + length]
        for name, kind, flags, _, at, length in headers
        if kind == 1 and flags & 4  # SHT_PROGBITS, SHF_EXECINSTR
    }


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
