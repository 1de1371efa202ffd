"""Light fine-tuning with quantised centres: the same function, fewer bytes, saved as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_glue import last_json
from tiny_models import BUILDERS, build, inputs, logits

import mpop
from mpo_kernels.layers.blockwise import BlockwiseLayer
from mpop.cli import main
from mpop.finetuning.task import finetune
from mpop.models.matrices import mpo_matrices, mpo_modules


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", BUILDERS)
def test_there_and_back(name: str, bits: int, tmp_path: Path) -> None:
    model = build(name)
    mpop.compress(model)
    mpop.freeze_central(model)
    expected, shapes = logits(model).detach(), [m.shape for _, m in mpo_modules(model)]
    alone = [names for names in mpo_matrices(model) if len(names) == 1]
    before, after = mpop.quantize_centres(model, bits)
    assert after < before * (bits / 8 + 0.2)  # rows of these small centres are padded to a block
    held = [m for m in model.modules() if isinstance(m, BlockwiseLayer)]
    assert len(held) == len(alone) > 0
    quantised = logits(model)
    error = float((quantised - expected).norm() / expected.norm())
    assert 0 < error < (0.5 if bits == 4 else 0.05)
    quantised.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    mpop.dequantize_centres(model)
    torch.testing.assert_close(logits(model), quantised, rtol=1e-4, atol=1e-4)
    assert [m.shape for _, m in mpo_modules(model)] == shapes
    assert not any(m.cores[m.central].requires_grad for _, m in mpo_modules(model))
    mpop.save(model, tmp_path / "saved")
    loaded = mpop.load(tmp_path / "saved", type(model)).eval()
    assert torch.equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "llama", "t5"])
def test_saved_as_they_are(name: str, tmp_path: Path) -> None:
    model = build(name)
    mpop.compress(model)
    mpop.freeze_central(model)
    mpop.quantize_centres(model, 4)
    expected, count = logits(model).detach(), mpop.count_parameters(model)
    mpop.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert any(isinstance(module, BlockwiseLayer) for module in model.modules())
    mpop.dequantize_centres(model)
    mpop.save(model, tmp_path / "c")
    for file in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    for folder in "ab":
        loaded = mpop.load(tmp_path / folder).eval()
        assert mpop.count_parameters(loaded) == count
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    # A Trainer that resumes loads the file into the model that it trains.
    other = mpop.load(tmp_path / "a").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    mpop.quantize_centres(other, 4)
    found = other.load_state_dict(load_file(tmp_path / "a/model.safetensors"), strict=False)
    assert all("lm_head" in key or "embed" in key for key in found.missing_keys)  # they are tied
    assert not found.unexpected_keys
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)


def test_a_light_run(data: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["finetune", "--model", str(bert), "--task", "sst2", "--data-dir", str(data)]
    command += ["--epochs", "1", "--max-length", "16", "--json", "--output"]
    capsys.readouterr()
    found = []
    for bits in ("8", None):
        output = str(tmp_path / str(bits))
        more = ["--method", "light", *(["--centre-bits", bits] if bits else [])]
        assert main([*command, output, *more]) == 0
        found.append(last_json(capsys.readouterr().out))
    quantised, plain = found
    for name in ("trainable_parameters", "total_parameters"):
        assert quantised[name] == plain[name]
    assert quantised["losses"][0][1] == pytest.approx(plain["losses"][0][1], rel=0.05)
    assert mpop.load(tmp_path / "8")
    again = ["evaluate", "--model", str(tmp_path / "8"), "--task", "sst2"]
    assert main([*again, "--data-dir", str(data), "--max-length", "16", "--json"]) == 0
    assert last_json(capsys.readouterr().out)["value"] == quantised["value"]


def test_a_run_that_is_resumed(
    data: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"method": "light", "centre_bits": 8, "save_steps": 2}
    settings |= {"data_dir": data, "epochs": 1.0, "max_length": 16, "batch_size": 16}
    finetune(bert, "sst2", tmp_path / "whole", **settings)
    whole = load_file(tmp_path / "whole/model.safetensors")
    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr("mpop.finetuning.task.predict", mock.Mock(side_effect=InterruptedError))
        finetune(bert, "sst2", tmp_path / "run", **settings)
    (checkpoint,) = (tmp_path / "run/finetuning").glob("checkpoint-*")
    assert list(mpo_modules(mpop.load(checkpoint)))
    finetune(bert, "sst2", tmp_path / "run", **settings, resume=True)
    again = load_file(tmp_path / "run/model.safetensors")
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value)


def test_refusals(data: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Bert"):
        mpop.quantize_centres(build("bert"))
    model = build("bert")
    mpop.compress(model)
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 2"):
        mpop.quantize_centres(model, 2)
    assert list(mpo_modules(model))
    mpop.quantize_centres(model)
    for action in (mpop.merge, mpop.quantize_centres):
        with pytest.raises(ValueError, match=r"call mpop\.dequantize_centres"):
            action(model)
    command = ["finetune", "--model", str(bert), "--task", "sst2", "--data-dir", str(data)]
    command += ["--output", str(tmp_path / "o"), "--method", "full", "--centre-bits", "4"]
    assert main(command) == 2
    assert "expected method light" in capsys.readouterr().err
