"""Opening checkpoints, dense or compressed, as they are or for a GLUE task."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mpop.checkpoints.folder import check_replaceable, holds_model, load
from mpop.data.glue import hub_reachable

# sentence-transformers' list of modules, and its settings in files beside it.
_MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")


def check_output(output: str | Path, *sources: str | Path, overwrite: bool = True) -> None:
    """Check, before the work is done, that a folder can take the place of `output`.

    Args:
        sources: what is read: models, and files or folders of text where `overwrite` removes files.

    Raises:
        ValueError: It is a file, is not writable, is the current folder or one above it, is or
            holds what is read, or holds any model where none may be overwritten.
    """
    output = Path(output)
    check_writable(output)
    check_replaceable(output)
    place = output.resolve()
    for source in (Path(source) for source in sources if Path(source).exists()):
        within = (source.resolve().parent, source.absolute().parent.resolve())
        is_removed = overwrite and source.is_file() and place in within
        if source.resolve() == place or is_removed:
            raise ValueError(f"{output} holds {source}, which is read: choose another folder")
    if not overwrite and holds_model(output):
        raise ValueError(
            f"{output} holds a model: choose another folder, or replace its files with --overwrite"
        )


def check_writable(folder: Path) -> None:
    """Check, before the work is done, that files can be put into a folder.

    Raises:
        ValueError: It is a file, or not writable.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write to {folder}: {existing} is not a writable folder")


def check_file(path: str | Path, what: str, suffix: str = "") -> None:
    """Check, before the work is done, that `what` can be written to a file of this name.

    Raises:
        NotADirectoryError, IsADirectoryError: No folder for it, or nothing but one.
        ValueError: Its name does not end in `suffix`.
    """
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for {what}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: expected a file for {what}")
    if suffix and Path(path).suffix != suffix:
        raise ValueError(f"{path}: expected a file for {what} whose name ends in {suffix}")


def is_compressed(source: str | Path) -> bool:
    """Whether a checkpoint holds MPO tensors, by its configuration alone."""
    quantization = getattr(_config(source), "quantization_config", None) or {}
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mpo"


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    try:
        return from_pretrained(AutoTokenizer, source)
    except ValueError as error:
        folder = Path(source)
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            raise ValueError(
                f"{source}: expected a tokenizer beside the model, got none"
            ) from error
        raise


def shared_tokenizer(source: str | Path, other: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of two checkpoints.

    Raises:
        ValueError: it cannot be loaded, or they are of different vocabularies.
    """
    tokenizer = load_tokenizer(source)
    if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"expected a model of the same vocabulary as {source}, got {other}")
    return tokenizer


def copy_companions(source: str | Path, output: str | Path) -> None:
    """Copy the tokenizer, and what makes a folder a sentence-transformers model, where there are.

    Of the latter every module but the transformer itself: how tokens are pooled, most of all.
    """
    output = Path(output)
    with contextlib.suppress(OSError, ValueError):
        load_tokenizer(source).save_pretrained(output)
    folder = Path(source)
    if not folder.is_dir():
        try:
            patterns = [_MODULES, *_SETTINGS, "[0-9]*_*/*"]
            folder = Path(
                snapshot_download(
                    str(source), allow_patterns=patterns, local_files_only=not hub_reachable()
                )
            )
        except (OSError, ValueError):
            return
    if not (folder / _MODULES).is_file():
        return
    modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
    for name in (_MODULES, *(path.name for glob in _SETTINGS for path in folder.glob(glob))):
        shutil.copyfile(folder / name, output / name)
    for path in (Path(module.get("path", "")) for module in modules):
        # A module without settings has no files, and perhaps no folder.
        if len(path.parts) == 1 and path.name != ".." and (folder / path).is_dir():
            shutil.copytree(folder / path, output / path, dirs_exist_ok=True)


def load_as_saved(source: str | Path) -> PreTrainedModel:
    """The model with the class, and so the head, that its checkpoint was saved with."""
    if is_compressed(source):
        return load(source)
    names = _config(source).architectures or [""]
    return from_pretrained(getattr(transformers, names[0], AutoModel), source)


def _config(source: str | Path) -> PreTrainedConfig:
    return from_pretrained(AutoConfig, source)


def from_pretrained(auto_class: Any, source: str | Path, **options: Any) -> Any:
    """What an auto class of transformers makes of a hub name or folder.

    Raises:
        ValueError: It cannot be loaded, and why, in one line.
    """
    # With the hub out of reach transformers would retry for half a minute; a cached copy serves.
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) > 2):
        raise ValueError(f"model {source} cannot be loaded: there is no such folder")
    offline = folder.is_dir() or not hub_reachable()
    try:
        return auto_class.from_pretrained(source, local_files_only=offline, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model {source} cannot be loaded: {error}") from error
