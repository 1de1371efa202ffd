"""The steps of `bench/gpu_gate.sh`: what passed, how fast, and on what; a file after each step.

`gate.json` says what each step gave and on which device, driver, versions, commit and kernel
sources; `times.json` and `times.md` are the bench's, `decode.json` and `decode.md` its part for few
rows, `decoder.json` is of a decoder block, captured and eagerly, `train_step.json` of an encoder's
training step. Where the checks of triton's or csrc's kernels pass, the package notes that these
sources were validated (`--accept gate.json` notes it in another checkout of them).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from bench import facts
from bench.layer.ways import WAYS
from bench.results import text_of
from mpo_kernels.backends import validation

# Seconds of each step; the last timing has what is left of the whole.
BUILD, TESTS, SANITIZER, DECODER, DECODE, TRAIN, REPORT = 120, 150, 120, 20, 65, 80, 10
# Kernels are compiled on the host, so as many tests at once as are worth their start.
WORKERS = min(8, os.cpu_count() or 1)
# A few kernels of every kind: under the sanitizer a call takes seconds.
SANITIZED = (
    "test_kernels.py and (bfloat16-3 or bfloat16-7) or test_panels and bfloat16"
    " or test_rows_as_matrices and bfloat16 and (3- or 7-)"
)
SANITIZED_CUDA = "test_against_dense and (balanced or three) or test_bytes"
# What the validation of either kind of kernels asks for: steps that pass, and that do not fail.
ASKED = {
    "triton": (("tests",), ("sanitizer",)),
    "cuda": (("cuda_tests",), ("build", "cuda_memcheck", "cuda_racecheck")),
}


def step(
    name: str, command: list[str], limit: float, folder: Path, **environment: str
) -> dict[str, Any]:
    """Run one step; its output goes to a log, its last lines to the result."""
    print(f"{name} (at most {limit:.0f} s)", file=sys.stderr, flush=True)
    start, log = time.monotonic(), folder / f"{name}.log"
    # What a user's shell sets must not decide what is measured, nor where.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MPO_KERNELS_"))}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=facts.ROOT,
            env=kept | environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # its children hold the device as well
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return {
        "status": "out of time" if code is None else "failed" if code else "passed",
        "seconds": round(time.monotonic() - start, 1),
        "last": lines[-3:],
    }


def conditions() -> dict[str, Any]:
    """Where this is: device, driver, versions, commit, kernel sources."""
    import triton

    driver = ""
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": facts.commit()["commit"] or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def gate(folder: Path, budget: float) -> int:
    """Run the steps in ``budget`` seconds, the checks side by side; returns the exit code."""
    start, lock = time.monotonic(), Lock()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "sources": {"triton": validation.source_hash("triton"), "cuda": csrc_hash()},
        "conditions": conditions(),
        "steps": {},
    }

    def run(name: str, command: list[str], limit: float, **environment: str) -> str:
        result = step(name, command, limit, folder, **environment)
        with lock:
            found["steps"][name] = result
            (folder / "gate.json").write_text(text_of(found), encoding="utf-8")
        return result["status"]

    # The project's own options name a plugin that need not be installed here.
    tests = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    apart = ["-n", str(WORKERS)] if find_spec("xdist") else []
    cuda_tests = [*tests, "tests/csrc", "--ignore=tests/csrc/test_host_time.py"]
    sanitizer = shutil.which("compute-sanitizer")
    # Queries that torch makes of the driver, and that fail, are no fault.
    checked = [sanitizer, "--report-api-errors", "no", "--error-exitcode", "1", "--tool"]
    # Each tensor in an allocation of its own, so that reading past one is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(run, "tests", [*tests, *apart, "tests/kernels"], TESTS)]
        if sanitizer:
            command = [*checked, "memcheck", *tests, "tests/kernels", "-k", SANITIZED]
            checks.append(pool.submit(run, "sanitizer", command, SANITIZER, **uncached))
        # What lies there already, of these very sources, is taken as it is.
        built = validation.source_hash("cuda") == found["sources"]["cuda"]
        if not built and shutil.which("nvcc"):
            built = run("build", build_command(), BUILD) == "passed"
        if built:
            checks.append(pool.submit(run, "cuda_tests", [*cuda_tests, *apart], TESTS))
        for tool in ("memcheck", "racecheck") if built and sanitizer else ():
            command = [*checked, tool, *cuda_tests, "-k", SANITIZED_CUDA]
            checks.append(pool.submit(run, f"cuda_{tool}", command, SANITIZER, **uncached))
    for check in checks:
        check.result()
    # Before anything is timed: what passed is kept, whatever comes after.
    kinds = validated(found)
    for kernels in kinds:
        validation.add(kernels, found["conditions"], found["sources"][kernels])
    block = [sys.executable, "-m", "bench.gpu.decoder", "--output"]
    run("decoder", [*block, str(folder / "decoder.json")], DECODER)

    # Compiling each model would take all the time there is.
    train = [sys.executable, "-m", "bench.train_step", "--modes", "captured", "eager", "--output"]
    run("train_step", [*train, str(folder / "train_step.json")], TRAIN)

    def measure(name: str, limit: float, *options: str) -> None:
        """Part of the bench, and its report."""
        file = folder / f"{name}.json"
        bench = [sys.executable, "-m", "bench", "--device", "cuda", "--dtype", "bfloat16"]
        bench += ["--budget-minutes", f"{(limit - 20) / 60:.2f}", "--output", str(file), *options]
        run(name, bench, limit)
        if file.exists():
            report = [sys.executable, "-m", "bench.layer.report", str(file), "--every-way"]
            report += ["--output", str(file.with_suffix(".md"))]
            run(f"{name}_report", report, REPORT)

    measure("decode", DECODE, "--decoding")
    left = budget - REPORT - (time.monotonic() - start)
    # Compiling a way takes longer than timing all others.
    measure("times", left, "--ways", *(name for name in WAYS if name != "compiled"))
    for name, result in found["steps"].items():
        print(f"{name:<15} {result['status']:<12} {result['seconds']:>6} s  {result['last'][-1:]}")
    print(f"kernels on {found['conditions']['device']}: validated {', '.join(kinds) or 'none'}")
    return 0 if set(kinds) >= {"triton", *(["cuda"] if built else [])} else 1


def csrc_hash() -> str:
    """As CMake forms it for the library: of the hashes of its files."""
    kinds = (".cpp", ".cu", ".cuh", ".hpp")
    files = sorted(p for p in (facts.ROOT / "csrc").iterdir() if p.suffix in kinds)
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def build_command() -> list[str]:
    """The extension for the device here, by nvcc alone: there may be no CMake, no pybind11."""
    csrc, suffix = facts.ROOT / "csrc", sysconfig.get_config_var("EXT_SUFFIX")
    # torch brings pybind11's headers along.
    includes = [sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include")]
    definitions = ["MPO_KERNELS_MODULE=_cuda", f'MPO_KERNELS_SOURCES="{csrc_hash()}"']
    return [
        *("nvcc", "-std=c++17", "-O3", "-arch=native", "-shared"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *(f"-I{path}" for path in includes),
        *(f"-D{definition}" for definition in definitions),
        *(str(csrc / name) for name in ("thin.cu", "check.cpp", "bindings.cpp")),
        *("-o", str(facts.ROOT / "mpo_kernels" / f"_cuda{suffix}")),
    ]


def validated(found: dict[str, Any]) -> list[str]:
    """The kinds of kernels whose checks passed; out of time is no fault of a sanitizer."""
    steps = {name: result["status"] for name, result in found["steps"].items()}
    return [
        kernels
        for kernels, (passed, unfailed) in ASKED.items()
        if all(steps.get(name) == "passed" for name in passed)
        and all(steps.get(name) != "failed" for name in unfailed)
    ]


def accept(found: dict[str, Any]) -> None:
    """Note in this checkout which of its kernels passed.

    Raises:
        ValueError: The results are of other sources, or not of a gate that passed.
    """
    if not isinstance(found, dict) or not {"sources", "steps", "conditions"} <= set(found):
        raise ValueError("expected the gate.json of a gate")
    if found["sources"] != {"triton": validation.source_hash("triton"), "cuda": csrc_hash()}:
        raise ValueError("expected results of the kernels as they are here, got other sources")
    if not (kinds := validated(found)):
        steps = {name: result["status"] for name, result in found["steps"].items()}
        raise ValueError(f"expected a gate that passed, got {steps}")
    for kernels in kinds:
        validation.add(kernels, found["conditions"], found["sources"][kernels])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gate", description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--output", type=Path, help="folder for the results")
    choice.add_argument("--accept", type=Path, metavar="gate.json", help="note a gate that passed")
    parser.add_argument(
        "--budget-minutes", type=float, default=9.0, metavar="N", help="wall clock (9)"
    )
    options = parser.parse_args(argv)
    if options.accept:
        try:
            accept(json.loads(options.accept.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"cannot accept {options.accept}: {error}")
        return 0
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")
    return gate(options.output, 60 * options.budget_minutes)


if __name__ == "__main__":
    sys.exit(main())
