"""A base for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapted import compressed

import mpop


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base whose cores are those of :func:`compressed`."""
    mpop.save(compressed(), tmp_path / "base")
    return tmp_path / "base"
