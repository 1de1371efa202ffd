"""Folders with a saved MPO model: `save`, `load` and `push_to_hub`."""

from __future__ import annotations

import ctypes
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from transformers import AutoConfig, PreTrainedModel

from mpop.checkpoints.card import model_card
from mpop.checkpoints.quantizer import attach
from mpop.models.matrices import mpo_matrices
from mpop.models.plain import check_unwrapped


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Write a compressed model as a folder with `config.json`, safetensors and a model card.

    The folder appears, or takes the place of an older one, in one step: a save that is killed
    leaves the old checkpoint. Other files of an older folder, such as a tokenizer's or a card, are
    kept.

    Args:
        base_model, license: for the card; see `mpop.model_card`.

    Raises:
        ValueError: a model without MPO modules, or one with adapters.
        NotADirectoryError: `path` is a file.
    """
    check_unwrapped(model)
    if not mpo_matrices(model):
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a killed process with the same number
    attach(model)
    try:
        model.save_pretrained(new)
        if not (path / "README.md").exists():
            card = model_card(model, base_model=base_model, license=license)
            (new / "README.md").write_text(card, encoding="utf-8")
        if path.exists():
            _keep_others(path, new)
            _exchange(path, new)
        else:
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload what `save` writes, in one commit, and return its address.

    `model.push_to_hub` uploads the same weights under transformers' own card. The repository is
    made where there is none; a card that it has already is kept.

    Args:
        repo_id: on the hub, `"user/name"`.
        base_model, license: for the card; see `mpop.model_card`.
        private: of a new repository; by default as the user's settings have it.
        token: by default the one that `hf auth login` stored.

    Raises:
        ValueError: a model without MPO modules.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/model", base_model=base_model, license=license)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = "README.md" if api.file_exists(repo_id, "README.md") else None
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=f"{folder}/model",
            ignore_patterns=kept,
            commit_message="Matrix product operators",
        ).commit_url


def _keep_others(old: Path, new: Path) -> None:
    """Link into `new` what `old` holds beside the model."""

    def replaced(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != old:
            return []
        weights = fnmatch.filter(names, "model*.safetensors*")
        return [name for name in names if name in weights or (new / name).exists()]

    shutil.copytree(
        old, new, symlinks=True, ignore=replaced, copy_function=_link, dirs_exist_ok=True
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(path: Path, new: Path) -> None:
    """Swap two folders; atomic where the system has `renameat2`."""
    at_cwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(path), os.fsencode(new)
        if libc.renameat2(at_cwd, names[0], at_cwd, names[1], rename_exchange) == 0:
            return
    old = new.with_suffix(".old")
    path.rename(old)
    new.rename(path)
    old.rename(new)


def load(
    path: str | os.PathLike[str], auto_class: type[Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a saved MPO model, or fail: never with weights that the checkpoint does not hold.

    Args:
        path: a folder that `save` or `save_pretrained` wrote, or its name on the hub.
        auto_class: an auto or model class of transformers; default the class that was saved. With
            a class other than that one, a head the checkpoint lacks is new, and one that the class
            lacks is left out; the base model still has to be complete.
        kwargs: for the class's `from_pretrained`; with `output_loading_info`, the result is a pair
            as it is there.

    Raises:
        OSError: no such folder, no configuration or weights in it, or a truncated file.
        ValueError: not an MPO checkpoint, or one of a newer format; weights only as pickles; cores
            missing or of another shape than configured; other missing or unexpected tensors.
    """
    folder = Path(path)
    if folder.exists() or folder.is_absolute():
        _check_folder(folder)
    config, _ = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "mpo":
        raise ValueError(f"{path}: expected an MPO checkpoint, its configuration names no MPO")
    architectures = config.architectures or []
    cls: Any = auto_class
    if cls is None:
        cls = getattr(transformers, next(iter(architectures), ""), None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            raise ValueError(
                f"{path}: expected an architecture of transformers, got {architectures}: "
                "give auto_class"
            )
    allows_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = cls.from_pretrained(
        path,
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
        **kwargs,
    )
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if type(model).__name__ not in architectures:
        missing, unexpected = {key for key in missing if not _is_head(key, model)}, set()
    _refuse(path, "missing", missing)
    _refuse(path, "unexpected", unexpected)
    if not allows_other_sizes:
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        _refuse(path, "of another size (ignore_mismatched_sizes=True renews them)", mismatched)
    return (model, info) if wants_info else model  # type: ignore[return-value]


def _is_head(key: str, model: PreTrainedModel) -> bool:
    prefix = f"{model.base_model_prefix}."
    return model.base_model is not model and not key.startswith(prefix)


def _refuse(path: str | os.PathLike[str], problem: str, keys: Collection[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
        raise ValueError(f"{path}: {len(keys)} tensors are {problem}: {shown}")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder with a saved MPO model, found none")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a config.json in it, found none")
    if not any(path.glob("*.safetensors")):
        if pickles := sorted(file.name for file in path.glob("*.bin")):
            raise ValueError(f"{path}: expected safetensors, pickles are refused: {pickles}")
        raise FileNotFoundError(f"{path}: expected a model.safetensors in it, found none")
