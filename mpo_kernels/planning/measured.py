"""What was measured on a device, kept in a readable file for each: figures and tiles.

The folder is ``$MPO_KERNELS_CACHE``, by default ``~/.cache/mpo_kernels``. A file that cannot be
read counts as empty; a write replaces the file as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or ``cpu`` with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def path_of(name: str) -> Path:
    """The file of the device called ``name``."""
    folder = os.environ.get("MPO_KERNELS_CACHE") or Path.home() / ".cache" / "mpo_kernels"
    return Path(folder) / (re.sub(r"\W+", "-", name) + ".json")


@cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
            raise ValueError("expected an object of objects")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not used: %s", path, error)
        return {}


def get(name: str, section: str, key: str) -> Any:
    """What was stored for this device, or None."""
    return _read(path_of(name)).get(section, {}).get(key)


def put(name: str, section: str, key: str, value: Any) -> None:
    """Store a JSON value for this device; what another process stored meanwhile stays.

    Where the file cannot be written, that is logged and the value is gone with the process.
    """
    try:
        _write(path_of(name), section, key, value)
    except OSError as error:
        logger.warning("what was measured is not kept: %s", error)


def _write(path: Path, section: str, key: str, value: Any) -> None:
    _read.cache_clear()
    content = {**_read(path)}
    content[section] = {**content.get(section, {}), key: value}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump(content, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _read.cache_clear()
