"""``python -m mpo_kernels [--json]``: versions, devices, and back ends with reasons."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from mpo_kernels import available_backends
from mpo_kernels.version import __version__


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
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mpo_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    found = facts()
    if parser.parse_args().json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if name == "backends":
            for backend, state in value.items():
                usable = "yes" if state["available"] else "no"
                print(f"{'back end ' + backend:<18} {usable}: {state['reason']}")
        else:
            print(f"{name:<18} {', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
