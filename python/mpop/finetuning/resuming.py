"""Runs that go on where they were stopped: what was asked for, and the last whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_SETTINGS, _CHECKPOINTS = "settings.json", "checkpoint-*"
# As transformers.trainer has it, which takes a second to import.
_STATE = "trainer_state.json"


def last_checkpoint(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> str | None:
    """The last whole checkpoint in the folder of a run of these settings, None to begin.

    Args:
        settings: JSON-like.

    Raises:
        ValueError: a run that is to be neither resumed nor replaced, or one of other settings.
    """
    file = folder / _SETTINGS
    if not file.is_file():
        return None
    if not resume:
        if not overwrite:
            raise ValueError(f"{folder} holds a run: resume it, or overwrite it")
        return None
    check_same(file, json.loads(file.read_text(encoding="utf-8")), settings)
    # The state is what a checkpoint is written last of.
    whole = [str(path.parent) for path in folder.glob(f"{_CHECKPOINTS}/{_STATE}")]
    return max(whole, key=lambda path: int(path.rpartition("-")[2]), default=None)


def check_same(file: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a run that was found in a file is one of these settings."""
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{file}: expected a run of {name} = {settings.get(name)!r}, "
                f"got one of {found.get(name)!r}"
            )


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what is asked for in the place of an older run."""
    clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def clear(folder: Path) -> None:
    """Remove a run, and the folder where nothing else is in it."""
    for checkpoint in folder.glob(_CHECKPOINTS):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / _SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
