"""What the compiler made of csrc: registers, spills, instructions, for every architecture.

``python -m bench.gpu.cuda_static LIBRARY`` writes ``results/gpu/cuda_static.json`` from a library,
or a wheel that holds one, built for a release; with ``--check`` it compares, and fails where
something got worse. Needs no device; reads with the ``cuobjdump`` that comes with triton.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bench.gpu.static import RESULTS, code_of, cuobjdump, finish, instructions, regressions

REPORT = RESULTS / "cuda_static.json"
ELEMENTS = {"7Float16": "float16", "8BFloat16": "bfloat16"}
STORED = {"4Same": "same", "6Float8": "float8", "4Int8": "int8"}
# What a kernel is made of, by the names of instructions.
KINDS = {"HMMA.16816": "mma", "LDL": "spills", "STL": "spills"}
OF_INTEREST = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in KINDS))
# What lets the next kernel begin, and what waits for the one before.
BEGIN, WAIT = "PREEXIT", "ACQBULK"


def _name(function: str) -> str:
    """``bfloat16/int8/4x1``: element, stored type, groups and column tiles; ``bfloat16/sum``."""
    if found := re.search(r"sum_kernelINS_(\d+B?Float16)E", function):
        return f"{ELEMENTS[found[1]]}/sum"
    found = re.search(r"INS_(\d+B?Float16)ENS_(4Same|6Float8|4Int8)ELi(\d)ELi(\d)E", function)
    if found is None:
        raise ValueError(f"expected an instance of a thin product, got {function}")
    return f"{ELEMENTS[found[1]]}/{STORED[found[2]]}/{found[3]}x{found[4]}"


def order(text: str) -> dict[str, Any]:
    """What a kernel does before it waits: how many vectors it loads, and whether in that order.

    `ordered`: vectors of a core, then the next kernel may begin, then the wait, then inputs.
    """
    lines = text.splitlines()
    found = {
        name: next((k for k, line in enumerate(lines) if re.search(pattern, line)), None)
        for name, pattern in (
            ("begin", BEGIN),
            ("wait", WAIT),
            ("input", r"\bLDG\S*STRONG"),
            ("store", r"\bSTG\b"),
        )
    }
    wait = found["wait"]
    if wait is None:  # a device without
        return {}
    vectors = [
        k for k, line in enumerate(lines) if re.search(r"\bLDG\S*\.(128|64)\S*CONSTANT", line)
    ]
    ahead = [k for k in vectors if k < wait]
    behind = [found[name] for name in ("input", "store") if found[name] is not None]
    before = [*ahead, found["begin"], wait]
    return {"early": len(ahead), "ordered": before == sorted(before) and wait < min(behind)}


def report(library: Path) -> dict[str, Any]:
    """``{architecture: {kernel: figures}}`` and the architectures of the PTX."""
    rows: dict[str, dict[str, Any]] = {}
    architecture, name = "", ""
    for line in cuobjdump(library, "--dump-resource-usage").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S*(?:thin|sum)_kernel\S*):", line):
            name = _name(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, _, local = map(int, found.groups())
            row = {"registers": registers, "stack": stack + local}
            rows.setdefault(architecture, {})[name] = row
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump(library.resolve(), "--extract-elf", "all", cwd=Path(folder))
        for file in Path(folder).iterdir():
            (architecture,) = re.findall(r"\.(sm_\w+)\.cubin", file.name)
            codes = code_of(file.read_bytes())
            texts = instructions(list(codes.values()), architecture)
            for function, text in zip(codes, texts, strict=True):
                row = rows[architecture][_name(function)]
                row.update(dict.fromkeys(KINDS.values(), 0))
                for found in OF_INTEREST.findall(text):
                    row[KINDS[found]] += 1
                row.update(order(text))
    ptx = re.findall(r"\.(sm_\w+)\.ptx", cuobjdump(library, "--list-ptx"))
    return {"architectures": rows, "ptx": sorted(ptx)}


def faults(found: dict[str, Any]) -> list[str]:
    """What no kernel may do: spill, miss matrix instructions, wait before its core is asked for."""
    wrong = []
    for architecture, rows in found["architectures"].items():
        for name, row in rows.items():
            place, is_sum = f"{architecture} {name}", name.endswith("/sum")
            if row["stack"] or row["spills"]:
                wrong.append(f"{place}: spills {row['stack']} bytes")
            if not row["mma"] and not is_sum:
                wrong.append(f"{place}: no matrix instruction")
            if row["registers"] > 128:
                wrong.append(f"{place}: {row['registers']} registers, no room for the next kernel")
            if architecture != "sm_80" and not row.get("ordered"):
                wrong.append(f"{place}: loads, begin, wait and inputs are not in order")
            if architecture != "sm_80" and not is_sum:
                # Two rows of each group of 32 k.
                groups = int(name.split("/")[2].split("x")[0])
                if row["early"] < 2 * groups:
                    wrong.append(f"{place}: {row['early']} loads before the wait of {2 * groups}")
    return wrong


def regressed(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the committed report for the worse."""
    worse = [
        f"no code for {name}" for name in committed["architectures"].keys() - now["architectures"]
    ]
    if now["ptx"] != committed["ptx"]:
        worse.append(f"PTX for {now['ptx']}, expected {committed['ptx']}")
    return worse + regressions(committed, now, ("registers",), ("mma", "early", "ordered"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cuda_static", description=__doc__)
    parser.add_argument("library", type=Path, help="mpo_kernels/_cuda*.so, or a wheel")
    parser.add_argument("--check", action="store_true", help="compare, exit 1 on a regression")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        library = options.library
        if library.suffix == ".whl":
            with zipfile.ZipFile(library) as wheel:
                (name,) = (n for n in wheel.namelist() if re.match(r"mpo_kernels/_cuda.*\.so", n))
                library = Path(wheel.extract(name, folder))
        now = report(library)
    return finish(REPORT, now, faults(now), regressed if options.check else None)


if __name__ == "__main__":
    sys.exit(main())
