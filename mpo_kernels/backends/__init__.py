"""Back ends by name, each a module with the same functions, and the choice between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from mpo_kernels.backends import torch as torch_backend

BACKENDS: dict[str, ModuleType] = {"torch": torch_backend}

_selected = os.environ.get("MPO_KERNELS_BACKEND", "auto")


def available_backends() -> dict[str, tuple[bool, str]]:
    """``{name: (usable here, reason)}``."""
    return {"torch": (True, "any device and dtype")}


def _checked(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"expected a back end of {['auto', *BACKENDS]}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one back end inside the block, in every thread; ``"auto"`` lets it be chosen.

    The environment variable ``MPO_KERNELS_BACKEND`` sets the choice for a whole process.

    Raises:
        ValueError: a back end that is not there.
    """
    global _selected
    before, _selected = _selected, _checked(name)
    try:
        yield
    finally:
        _selected = before


def selected() -> ModuleType:
    """The back end that computes now."""
    name = _checked(_selected)
    return torch_backend if name == "auto" else BACKENDS[name]
