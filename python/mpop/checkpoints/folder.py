"""Folders with a saved MPO model: `save`, `load` and `push_to_hub`."""

from __future__ import annotations

import ctypes
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from transformers import AutoConfig, PreTrainedModel

from mpop.checkpoints.card import model_card, renewed_card
from mpop.checkpoints.quantizer import attach
from mpop.models.matrices import compressed_matrices
from mpop.models.plain import check_unwrapped

_MODEL = ("config.json", "*.safetensors", "*.bin")


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Write a compressed model as a folder with `config.json`, safetensors and a model card.

    The folder appears, or takes the place of an older one, in one step: a save that is killed
    leaves the old checkpoint. Other files of an older folder, such as a tokenizer's, are kept, and
    so is a card, whose part that this package wrote is brought up to date.

    Args:
        base_model, license: for the card; see `mpop.model_card`.

    Raises:
        ValueError: a model without MPO modules, or one with adapters; or a path that is empty, the
            current folder or one above it.
        NotADirectoryError: `path` is a file.
    """
    _check_compressed(model)
    with replaced(path) as new:
        write(model, new, Path(path), base_model=base_model, license=license)


def _check_compressed(model: PreTrainedModel) -> None:
    check_unwrapped(model)
    if not compressed_matrices(model):
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")


def write(
    model: PreTrainedModel,
    folder: Path,
    old: Path | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Write a compressed model into a folder as it is, with its card: that of `old` if it has one.

    Raises:
        ValueError: a model without MPO modules.
    """
    _check_compressed(model)
    attach(model)
    model.save_pretrained(folder)
    card = None if old is None else old / "README.md"
    about = {"base_model": base_model, "license": license}
    if card is not None and card.is_file():
        text = renewed_card(card.read_text(encoding="utf-8"), model, **about)
    else:
        text = model_card(model, **about)
    (folder / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: str | os.PathLike[str], *, wholly: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of another in one step, when all in it is written.

    Args:
        wholly: where it holds a model, leave no file of it; what lies in folders of it stays.

    Raises:
        ValueError: `path` is empty, or a folder that would be taken from under the process.
        NotADirectoryError: `path` is a file.
    """
    check_replaceable(path)
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    held = _hold(new)
    try:
        yield new
        if path.exists():
            _keep_others(path, new, wholly and holds_model(path))
            _exchange(path, new)
        else:
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if held is not None:
            os.close(held)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise unless a folder can be put in the place of `path`; see `replaced`."""
    if not os.fspath(path):
        raise ValueError("expected the name of a folder, got an empty one")
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder, got a file")
    with suppress(FileNotFoundError):  # the current folder is gone
        if path in (here := Path.cwd(), *here.parents):
            raise ValueError(
                f"{path}: expected another folder than the current one, or one above it"
            )


def holds_model(folder: Path) -> bool:
    """Whether a model, or part of one, lies in it."""
    return any(path for glob in _MODEL for path in folder.glob(glob))


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes were writing to take the place of `path`."""
    for folder in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        if (held := _hold(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _hold(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or the process ends; None where another does.

    Unlike a process's number, this is not had by another one afterwards.
    """
    try:
        import fcntl  # absent on Windows

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
    made where there is none; a card that it has already is kept as `save` keeps one.

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
    _check_compressed(model)
    with tempfile.TemporaryDirectory() as root:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        old = None
        if api.file_exists(repo_id, "README.md"):
            old = Path(api.hf_hub_download(repo_id, "README.md", cache_dir=root)).parent
        write(model, Path(root, "model"), old, base_model=base_model, license=license)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(root, "model"),
            commit_message="Matrix product operators",
        ).commit_url


def _keep_others(old: Path, new: Path, wholly: bool) -> None:
    """Link into `new` what `old` holds beside the model."""

    def replaced(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != old:
            return []
        gone = fnmatch.filter(names, "model*.safetensors*")
        if wholly:
            gone = [name for name in names if not (name.startswith(".") or (old / name).is_dir())]
        return [name for name in names if name in gone or (new / name).exists()]

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
        kwargs: for the class's `from_pretrained`, such as `subfolder` or `revision`; with
            `output_loading_info`, the result is a pair as it is there.

    Raises:
        OSError: no such folder, no configuration or weights in it, or a truncated file.
        ValueError: not an MPO checkpoint, or one of a newer format; weights only as pickles; cores
            missing or of another shape than configured; other missing or unexpected tensors.
    """
    if Path(path).exists() or Path(path).is_absolute():
        _check_folder(Path(path, kwargs.get("subfolder") or ""))
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
    kwargs.pop("use_safetensors", None)
    model, info = cls.from_pretrained(
        path,
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
        **kwargs,
    )
    if not compressed_matrices(model):
        raise ValueError(
            f"{path}: expected an MPO checkpoint, got dense weights beside the configuration of a "
            "compressed model: load them with from_pretrained and save them again"
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
