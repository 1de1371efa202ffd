"""``python -m mpo_kernels``: what is usable here; ``… calibrate``: measure the device."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from mpo_kernels import available_backends
from mpo_kernels.backends import validation
from mpo_kernels.calibration import calibrate
from mpo_kernels.planning import measured
from mpo_kernels.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def facts() -> dict[str, Any]:
    """What a report about this installation needs, JSON-serialisable."""
    cuda = torch.cuda.is_available()
    return {
        "mpo_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu"]
        + [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count() if cuda else 0)],
        "backends": {
            name: {"available": usable, "reason": reason}
            for name, (usable, reason) in available_backends().items()
        },
        "kernels": {
            name: {
                "sources": validation.source_hash(name),
                "validated": validation.validations(name),
            }
            for name in validation.KINDS
        },
    }


def _print_facts(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name == "backends":
            for backend, state in value.items():
                usable = "yes" if state["available"] else "no"
                print(f"{'back end ' + backend:<18} {usable}: {state['reason']}")
        elif name == "kernels":
            for kernels, state in value.items():
                sources = f"{state['sources']}: " if state["sources"] else ""
                print(f"{kernels + ' kernels':<18} {sources}{validation.summary(kernels)}")
        else:
            print(f"{name:<18} {', '.join(value) if isinstance(value, list) else value}")


def _calibrate(device: torch.device, names: list[str], graphs: bool, as_json: bool) -> None:
    found = {name: calibrate(device, DTYPES[name], graphs) for name in names}
    path = measured.path_of(measured.device_name(device))
    if as_json:
        rows = {name: figures.__dict__ for name, figures in found.items()}
        print(json.dumps({"file": str(path), "figures": rows}))
        return
    for name, figures in found.items():
        print(
            f"{name:<10} {figures.macs_per_second / 1e9:10,.1f} GMAC/s  "
            f"{figures.bytes_per_second / 1e9:8,.1f} GB/s  "
            f"{figures.launch_seconds * 1e6:5.1f} µs a call, "
            f"{figures.host_seconds * 1e6:4.1f} µs of the host beside it"
        )
    print(f"the planner uses these from now on: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mpo_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    commands = parser.add_subparsers(dest="command")
    measure = commands.add_parser("calibrate", help="measure this device for the planner")
    measure.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measure.add_argument("--dtype", nargs="+", choices=DTYPES, help="(float32 on a CPU, else all)")
    measure.add_argument(
        "--graphs", action="store_true", help="for models replayed from CUDA graphs"
    )
    measure.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.command is None:
        found = facts()
        print(json.dumps(found)) if options.json else _print_facts(found)
        return
    try:
        device = torch.zeros(1, dtype=torch.float32, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"cannot use device {options.device!r}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"expected a device of type cpu or cuda, got {options.device!r}")
    default = ["float32"] if device.type == "cpu" else list(DTYPES)
    _calibrate(device, options.dtype or default, options.graphs, options.json)


if __name__ == "__main__":
    main()
