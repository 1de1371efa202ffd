"""`from_pretrained(dense, quantization_config=MPOConfig(compress=…))`: compressed as it is read."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import BUILDERS, build, logits

import mpop
from mpo_kernels.cores.stack import decompose_stack
from mpop.models import selection
from mpop.models.matrices import mpo_modules

HALF = mpop.CompressionConfig(compression=0.5, num_cores=3)


def _load(path: Path, cls: type = hf.AutoModel, config: Any = HALF, **options: Any) -> Any:
    return cls.from_pretrained(path, quantization_config=mpop.MPOConfig(compress=config), **options)


@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_what_compress_makes_and_saves_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    with pytest.warns(UserWarning, match="a cut without calibration"):
        loaded = _load(tmp_path / "dense", type(model)).eval()
    mpop.compress(model, HALF)
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # ties are kept
    loaded.save_pretrained(tmp_path / "a")
    mpop.save(model, tmp_path / "b")
    assert (
        json.loads((tmp_path / "a/config.json").read_text()).get("quantization_config")
        == (json.loads((tmp_path / "b/config.json").read_text())["quantization_config"])
    )
    torch.testing.assert_close(logits(mpop.load(tmp_path / "a")), logits(model))


def test_a_headed_model_of_a_bare_checkpoint_and_the_other_way(tmp_path: Path) -> None:
    model = build("bert-mlm")
    model.save_pretrained(tmp_path / "mlm")
    model.bert.save_pretrained(tmp_path / "bare")
    for path, cls in (
        (tmp_path / "mlm", hf.AutoModel),
        (tmp_path / "bare", hf.AutoModelForSequenceClassification),
    ):
        loaded = _load(path, cls)
        names = [name for name, _ in mpo_modules(loaded)]
        # What the checkpoint lacks is new and stays dense.
        assert len(names) == 2 * 6 + 1 and all("pooler" not in name for name in names)


def test_dtype_and_device_map(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        loaded = _load(tmp_path, hf.BertForSequenceClassification, device_map="cpu", **options)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert all(core.is_contiguous() for _, m in mpo_modules(loaded) for core in m.cores)


def test_offloading_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    mpop.compress(model)
    mpop.save(model, tmp_path)
    parts = {"bert": "disk", "classifier": "cpu", "dropout": "cpu"}
    with pytest.raises(ValueError, match="map without, got one over cpu, disk"):
        hf.BertForSequenceClassification.from_pretrained(
            tmp_path, device_map=parts, offload_folder=tmp_path / "off"
        )
    with pytest.raises(ValueError, match="not offloaded to a CPU or a disk"):
        hf.BertForSequenceClassification.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": "40KB"}
        )


def test_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("bert").save_pretrained(tmp_path)
    seen: list[weakref.ref] = []
    alive = []

    def counting(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(weight))
        return decompose_stack(weight, *args, **kwargs)

    monkeypatch.setattr(selection, "decompose_stack", counting)
    loaded = _load(tmp_path, hf.BertForSequenceClassification)
    # None of those decomposed before lives when the next one is.
    assert alive == [0] * len(list(mpo_modules(loaded))) and len(alive) == 14


def test_it_trains_and_dequantizes(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    loaded = _load(tmp_path, hf.BertForSequenceClassification).eval()
    mpop.freeze_central(loaded)
    logits(loaded).sum().backward()
    for _, module in mpo_modules(loaded):
        grads = [core.grad is not None for core in module.cores]
        assert grads == [k != module.central for k in range(len(grads))]
    before = logits(loaded)
    dense = loaded.dequantize()
    torch.testing.assert_close(logits(dense), before)
    assert not list(mpo_modules(dense)) and not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(tmp_path / "dense")
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(again), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mpop.CompressionConfig(exclude=("*.nope",)), "exclude: expected a pattern that fits"),
        (mpop.CompressionConfig(compression=1e-4), "expected a compression of at least"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_a_weight_is_read(
    config: mpop.CompressionConfig, message: str, tmp_path: Path
) -> None:
    build("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises((ValueError, OSError), match=message):
        _load(tmp_path, hf.BertForSequenceClassification, config)


def test_configurations_that_are_refused() -> None:
    with pytest.raises(ValueError, match="look at the whole model: load it, then call mpop"):
        mpop.MPOConfig(compress={"factors": "auto", "compression": 0.5})
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        mpop.MPOConfig(compress={"rank": 3})


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] = torch.inf
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        _load(tmp_path, hf.BertForSequenceClassification)
    assert "bert.encoder.layer.1.output.dense" in str(refusal.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if value.dim() < 2}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has none of"):
        _load(tmp_path, hf.BertForSequenceClassification)
