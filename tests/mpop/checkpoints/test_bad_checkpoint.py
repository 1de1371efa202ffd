"""Checkpoints that have to be refused, each in one clear line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from saved import edit_config, edit_tensors
from tiny_models import build

import mpop
from mpop.models.config import FORMAT_VERSION

QUERY = "bert.encoder.layer.0.attention.self.query"


def _edit_module(path: Path, **values: Any) -> None:
    edit_config(path, lambda c: c["quantization_config"]["modules"][QUERY].update(values))


def _rename(tensors: dict, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


SPOILED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, OSError, "expected a folder"),
    "no config": (lambda p: (p / "config.json").unlink(), OSError, "config.json"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), OSError, "model.safetensors"),
    "pickle": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        ValueError,
        "pickles are refused",
    ),
    "broken json": (lambda p: (p / "config.json").write_text("{"), OSError, "JSON"),
    "truncated": (
        lambda p: os.truncate(p / "model.safetensors", 9_000),
        OSError,
        "not a whole safetensors file",
    ),
    "empty": (lambda p: os.truncate(p / "model.safetensors", 0), OSError, "not a whole"),
    "dense": (
        lambda p: edit_config(p, lambda c: c.pop("quantization_config")),
        ValueError,
        "expected an MPO checkpoint",
    ),
    "other method": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(quant_method="gptq")),
        ValueError,
        "expected an MPO checkpoint",
    ),
    "newer version": (
        lambda p: edit_config(
            p, lambda c: c["quantization_config"].update(version=FORMAT_VERSION + 1, new={})
        ),
        ValueError,
        "upgrade mpop",
    ),
    "unknown field": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(new={})),
        ValueError,
        r"unknown fields.*\['new'\]",
    ),
    "no modules": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(modules={})),
        ValueError,
        "got no modules",
    ),
    "modules as a list": (
        lambda p: edit_config(p, lambda c: c["quantization_config"].update(modules=[1])),
        ValueError,
        "modules: expected",
    ),
    "unknown architecture": (
        lambda p: edit_config(p, lambda c: c.update(architectures=["logging"])),
        ValueError,
        "give auto_class",
    ),
    "unknown kind": (lambda p: _edit_module(p, kind="conv2d"), ValueError, f"{QUERY}.*kind"),
    "other kind": (lambda p: _edit_module(p, kind="conv1d"), ValueError, f"{QUERY}.*conv1d"),
    "huge rank": (lambda p: _edit_module(p, ranks=[10**12] * 4), ValueError, f"{QUERY}.*full"),
    "negative rank": (lambda p: _edit_module(p, ranks=[-1] * 4), ValueError, f"{QUERY}.*least 1"),
    "rank as text": (lambda p: _edit_module(p, ranks="many"), ValueError, QUERY),
    "other rank": (
        lambda p: _edit_module(p, ranks=[2, 2, 2, 2]),
        ValueError,
        "query.cores.1: expected .* by the configuration, got",
    ),
    "huge size": (
        lambda p: _edit_module(
            p,
            in_factors=[10**6] * 5,
            out_factors=[10**6] * 5,
            in_features=10**30,
            out_features=10**30,
        ),
        ValueError,
        f"{QUERY}: expected",
    ),
    "huge model": (
        lambda p: edit_config(p, lambda c: c.update(vocab_size=10**12, hidden_size=24)),
        ValueError,
        "word_embeddings: expected",
    ),
    "huge dense table": (
        lambda p: edit_config(p, lambda c: c.update(max_position_embeddings=10**12)),
        ValueError,
        "position_embeddings.*expected",
    ),
    "missing core": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{QUERY}.cores.2")),
        ValueError,
        "query.cores.2: missing",
    ),
    "one core too many": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{QUERY}.cores.5": torch.zeros(1)})),
        ValueError,
        "query: expected 5 cores",
    ),
    "core of another shape": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{QUERY}.cores.1": torch.zeros(2, 3)})),
        ValueError,
        "query.cores.1: expected",
    ),
    "missing bias": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{QUERY}.bias")),
        ValueError,
        f"1 tensors are missing: {QUERY}.bias",
    ),
    "misnamed norm": (
        lambda p: edit_tensors(
            p,
            lambda t: _rename(t, "bert.embeddings.LayerNorm.weight", "bert.embeddings.Norm.weight"),
        ),
        ValueError,
        "missing: bert.embeddings.LayerNorm.weight",
    ),
    "unexpected tensor": (
        lambda p: edit_tensors(p, lambda t: t.update({"extra.weight": torch.zeros(2)})),
        ValueError,
        "unexpected: extra.weight",
    ),
    "head of another shape": (
        lambda p: edit_tensors(p, lambda t: t.update({"classifier.bias": torch.zeros(9)})),
        ValueError,
        "of another size.*classifier.bias",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_is_refused_in_one_line(case: str, broken: Path) -> None:
    spoil, error, message = SPOILED[case]
    spoil(broken)
    with pytest.raises(error, match=message) as caught:
        mpop.load(broken)
    if case != "broken json":  # the text of transformers
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "case", ["missing core", "other rank", "huge rank", "truncated", "newer version", "no modules"]
)
def test_from_pretrained_refuses_as_well(case: str, broken: Path) -> None:
    spoil, error, message = SPOILED[case]
    spoil(broken)
    with pytest.raises(error, match=message):
        hf.AutoModelForSequenceClassification.from_pretrained(broken)


def test_a_file_of_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="none of the 14 compressed matrices"):
        hf.DistilBertModel.from_pretrained(
            saved, config=_with_modules(hf.DistilBertConfig(n_layers=1), saved)
        )


def _with_modules(config: hf.PretrainedConfig, path: Path) -> hf.PretrainedConfig:
    source = json.loads((path / "config.json").read_text())
    config.quantization_config = source["quantization_config"]
    return config


def test_compressing_while_loading_says_what_is_missing(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected MPOConfig\(compress=Compress"):
        hf.AutoModel.from_pretrained(tmp_path, quantization_config=mpop.MPOConfig())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = build("bert")
    mpop.compress(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        mpop.load(tmp_path)
