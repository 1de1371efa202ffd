"""Runs that go on where they were stopped: what was asked for, and the last whole checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_SETTINGS = "settings.json"
# As transformers.trainer has it, which takes a second to import.
_STATE = "trainer_state.json"


def last_checkpoint(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> str | None:
    """The last whole checkpoint in the folder of a run of these settings, None to begin.

    Args:
        settings: JSON-like.

    Raises:
        ValueError: a run that is to be neither resumed nor replaced, one of other settings, or one
            whose settings cannot be read.
    """
    # The state is what a checkpoint is written last of.
    whole = {step: path for step, path in _checkpoints(folder) if (path / _STATE).is_file()}
    if not whole:
        return None
    if not resume:
        if not overwrite:
            raise ValueError(f"{folder} holds a run: resume it, or overwrite it")
        return None
    file = folder / _SETTINGS
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a run, or damaged") from error
    check_same(file, found, settings)
    return str(whole[max(whole)])


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
    new = folder / f"{_SETTINGS}.new"
    new.write_text(json.dumps(settings), encoding="utf-8")
    os.replace(new, folder / _SETTINGS)


def clear(folder: Path) -> None:
    """Remove a run, its folder where nothing else is in that, and likewise the output around it."""
    for _, checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / _SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Their steps and folders."""
    for path in folder.glob("checkpoint-*"):
        if step := re.fullmatch(r"checkpoint-(\d+)", path.name):
            yield int(step[1]), path
