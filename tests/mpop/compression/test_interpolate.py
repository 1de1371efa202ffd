"""Matrices in interpolative form: what the model computes, saves, trains and refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from saved import edit_config, edit_tensors
from tiny_models import batches, build, inputs, logits
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, TrainingArguments

import mpop
import mpop.peft
from mpo_kernels import (
    InterpolativeLinear,
    MPOExperts,
    MPOLinear,
    MPOShape,
    QuantizedInterpolativeLinear,
    decompose,
)
from mpop.checkpoints.quantizer import attach
from mpop.finetuning.trainer import MPOTrainer
from mpop.models.config import INTERPOLATIVE, STORES
from mpop.models.left import left_dense
from mpop.models.light import count_bytes
from mpop.models.matrices import describe, module_at, weight_of
from mpop.models.selection import select
from mpop.models.swapping import replace, update_ties

RANK = 10
QUERY = {
    "bert": "bert.encoder.layer.0.attention.self.query",
    "llama": "model.layers.0.self_attn.q_proj",
}
QUERY["llama-tied"] = QUERY["llama"]


def compressed(name: str, form: str | None = None, *include: str) -> PreTrainedModel:
    """With every linear at a low rank, which is its full one where that is less."""
    model = build(name)
    chosen = include or None
    for names in select(model, mpop.CompressionConfig(embeddings=False, include=chosen)):
        weight = weight_of(module_at(model, names[0])).detach()
        shape = MPOShape.low_rank(weight.shape[1], weight.shape[0], RANK)
        replace(model, names, decompose(weight, shape), form)
    update_ties(model)
    attach(model)
    return model


def rows_of(model: Any) -> dict[str, InterpolativeLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, InterpolativeLinear)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "gpt2-lm", "albert"])
def test_the_model_stays_the_same_and_is_saved(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    before, counted, left = logits(model), mpop.count_parameters(model), left_dense(model)
    plain = [m for m in model.modules() if isinstance(m, MPOLinear)]
    changed = mpop.interpolate(model)
    assert changed.before == sum(m.shape.num_parameters for m in plain)
    assert changed.before - changed.after == sum(m.shape.ranks[0] ** 2 for m in plain)
    assert len(rows_of(model)) == len(plain) and left_dense(model) == left
    assert all(m.label == n for n, m in rows_of(model).items())
    total = counted.total - changed.before + changed.after
    assert mpop.count_parameters(model) == (total, total)
    expected = logits(model)
    assert error(expected, before) < 1e-5
    directly = compressed(name, INTERPOLATIVE)
    assert torch.equal(logits(directly), expected)
    assert describe(directly).to_dict() == describe(model).to_dict()

    mpop.save(model, tmp_path / "saved")
    loaded = mpop.load(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), expected)
    assert list(rows_of(loaded)) == list(rows_of(model))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        held = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    parts = [n for key, n in held.items() if ".cores." in key or key.endswith(".order")]
    assert count_bytes(model) == (sum(parts), sum(held.values()))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"{len(plain)} are held as rows of theirs" in card
    dense = counted.total + sum(m.shape.dense_parameters for m in plain) - changed.before
    share = f"{total / dense:.3f} of the {dense:,} of the dense model"
    assert f"{total:,} parameters, {share}" in card

    half = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    layers = rows_of(half).values()
    assert {core.dtype for layer in layers for core in layer.cores} == {torch.bfloat16}
    assert {layer.order.dtype for layer in layers} == {torch.int64}
    assert error(logits(half).float(), expected) < 0.1

    merged = mpop.merge(loaded)
    assert error(logits(merged), before) < 1e-5
    assert merged.state_dict().keys() == build(name).state_dict().keys()


def test_the_base_model_alone_and_shards(tmp_path: Path) -> None:
    model = compressed("llama", INTERPOLATIVE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert len(rows_of(base)) == len(rows_of(model))
    batch = inputs(model)
    assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_light_training_leaves_the_larger_core(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    total = mpop.count_parameters(model).total
    mpop.freeze_central(model)
    changed = mpop.interpolate(model)  # which keeps what trains
    layers = rows_of(model)
    larger = {n: max(layer.cores, key=lambda core: core.numel()) for n, layer in layers.items()}
    trained, whole = mpop.count_parameters(model)
    assert whole == total - changed.before + changed.after
    assert trained == whole - sum(core.numel() for core in larger.values())
    mpop.save(model, tmp_path)
    assert mpop.count_parameters(mpop.load(tmp_path)) == (trained, whole)
    expected = logits(model)
    mpop.balance(model)
    assert torch.equal(logits(model), expected)
    state = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = MPOTrainer(model, arguments, mpo_learning_rate=0.25)
    optimizer = trainer.create_optimizer()
    rated = [p for group in optimizer.param_groups if group["lr"] == 0.25 for p in group["params"]]
    cores = [core for layer in layers.values() for core in layer.cores if core.requires_grad]
    assert {id(p) for p in rated} == {id(core) for core in cores} and len(cores) == len(layers)
    logits(model).square().sum().backward()
    optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not tensor.equal(state[key])}
    for n, layer in layers.items():
        assert f"{n}.cores.{1 - layer.central}" in moved
        assert not moved & {f"{n}.cores.{layer.central}", f"{n}.order"}
    mpop.unfreeze(model)
    assert mpop.count_parameters(model) == (whole, whole)


def test_biases_and_what_trains_go_over() -> None:
    model = compressed("bert")
    query = model.get_submodule(QUERY["bert"])
    query.cores.requires_grad_(False)
    query.bias.requires_grad_(False)
    mpop.interpolate(model)
    layer = rows_of(model)[QUERY["bert"]]
    assert layer.bias is query.bias and layer.rel_error == query.rel_error
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for m in rows_of(model).values() if m is not layer for p in m.cores)


def test_what_is_included() -> None:
    model = compressed("bert")
    mpop.interpolate(model, ["*.query", "*.0.*.value"])
    assert len(rows_of(model)) == 3
    mpop.interpolate(model, ["*.1.*.value"])
    with pytest.raises(ValueError, match=r"include: .* got '\*\.query', which fits none of"):
        mpop.interpolate(model, ["*.query"])
    mpop.interpolate(model)
    with pytest.raises(ValueError, match=r"expected linears of plain low rank, got none in 13"):
        mpop.interpolate(model)
    with pytest.raises(TypeError, match="include: expected a sequence of patterns"):
        mpop.interpolate(model, "*.query")
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Bert"):
        mpop.interpolate(build("bert"))
    chains = build("bert")
    mpop.compress(chains)
    with pytest.raises(ValueError, match="expected linears of plain low rank, got none in 14"):
        mpop.interpolate(chains)


def test_nothing_is_changed_where_a_core_is_not_finite() -> None:
    model = compressed("bert")
    name = QUERY["bert"].replace("query", "value")
    model.get_submodule(name).cores[1].data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=rf"{name}: expected finite cores, got NaN or Inf in core"):
        mpop.interpolate(model)
    assert not rows_of(model)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "squeeze": (
        lambda model: mpop.squeeze(
            model, evaluate=lambda: 1.0, finetune=None, max_drop=0.1, calibration=batches()
        ),
        r"squeeze first, and call mpop\.interpolate after it",
    ),
    "quantise centres": (
        mpop.quantize_centres,
        r"take the model as it was before mpop\.interpolate",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_needs_plain_cores_is_refused(change: str) -> None:
    model = compressed("bert", INTERPOLATIVE)
    expected = logits(model)
    function, message = CHANGES[change]
    with pytest.raises(ValueError, match=rf"{QUERY['bert']}: expected plain cores, .*: {message}"):
        function(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", QUERY)
def test_in_bytes(name: str, store: str, tmp_path: Path) -> None:
    model = compressed(name)
    changed = mpop.interpolate(model)
    expected, counts = logits(model), mpop.count_parameters(model)
    found = mpop.quantize(model, STORES[store])
    layers = {m for m in model.modules() if isinstance(m, QuantizedInterpolativeLinear)}
    held = [tensor for layer in layers for tensor in (*layer.scales, layer.order)]
    assert found.after == changed.after + sum(tensor.nbytes for tensor in held)
    assert count_bytes(model).matrices == found.after
    assert error(logits(model), expected) < (0.02 if store == "int8" else 0.1)
    assert mpop.count_parameters(model).total == counts.total
    mpop.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"matrices have cores in {store}" in card and "are held as rows of theirs" in card
    again = mpop.load(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    spec = again.config.quantization_config.specs()[QUERY[name]]
    assert (spec.store, spec.experts, spec.form) == (store, None, INTERPOLATIVE)
    merged = mpop.merge(copy.deepcopy(again))
    assert error(logits(merged), logits(model)) < 1e-4
    with pytest.raises(ValueError, match=f"expected cores of 16 bits or more, got {store}"):
        mpop.interpolate(model)
    mpop.optimize_for_inference(model)  # which leaves them as they are
    assert torch.equal(logits(again), logits(model))


def test_inspected_they_have_the_spectra_of_the_matrices() -> None:
    model = compressed("bert")
    plain = mpop.inspect_model(model)
    changed = mpop.interpolate(model)
    rows = mpop.inspect_model(model)
    assert [(row.name, row.shape) for row in rows] == [(row.name, row.shape) for row in plain]
    for row, other in zip(rows, plain, strict=True):
        torch.testing.assert_close(row.spectra, other.spectra, rtol=1e-4, atol=1e-5)
    assert sum(row.parameters for row in rows) == changed.after
    assert f"{changed.after:,}" in mpop.format_rows(rows)


@pytest.mark.parametrize(
    "config",
    [
        mpop.peft.LightConfig(target_modules=["value", "output.dense"]),
        LoraConfig(target_modules=["value", "output.dense"], init_lora_weights=False),
    ],
    ids=["light", "lora"],
)
def test_adapters(config: Any, tmp_path: Path) -> None:
    model = compressed("bert", INTERPOLATIVE)
    base = logits(model)
    adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    expected = logits(adapted)
    assert error(expected, base) > 1e-3
    logits(adapted).sum().backward()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(again), expected)


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["modules"][QUERY["bert"]]


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no order": (
        lambda path: edit_tensors(path, lambda state: state.pop(f"{QUERY['bert']}.order")),
        r"query\.order: missing from the checkpoint",
    ),
    "a core of another rank": (
        lambda path: edit_tensors(
            path, lambda state: state.update({f"{QUERY['bert']}.cores.0": torch.ones(15, 9)})
        ),
        r"query\.cores\.0: expected \[14, 10\] by the configuration, got \[15, 9\] in the file",
    ),
    "plain by the configuration": (
        lambda path: edit_config(path, lambda c: _entry(c).pop("form")),
        r"query\.cores\.0: expected \[1, 1, 24, 10\] by the configuration, got \[14, 10\]",
    ),
    "an unknown form": (
        lambda path: edit_config(path, lambda c: _entry(c).update(form="skeleton")),
        r"query': form: expected 'interpolative', .* got 'skeleton' of a linear",
    ),
    "a chain": (
        lambda path: edit_config(
            path, lambda c: _entry(c).update(in_factors=[2, 12], out_factors=[12, 2])
        ),
        r"query': form: .* of low rank, .*in_factors=\(2, 12\)",
    ),
    "in bytes by the configuration": (
        lambda path: edit_config(path, lambda c: _entry(c).update(store="int8")),
        r"query\.int8_core_0: missing from the checkpoint",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_checkpoint(case: str, tmp_path: Path) -> None:
    mpop.save(compressed("bert", INTERPOLATIVE, "*.query"), tmp_path)
    entry = _entry(json.loads((tmp_path / "config.json").read_text()))
    assert entry["form"] == "interpolative" and entry["ranks"] == [RANK]
    spoil, message = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        mpop.load(tmp_path)


def test_experts_have_no_such_form() -> None:
    model, include = build("mixtral"), ("*.experts.*",)
    config = mpop.CompressionConfig(compression=0.6, factors="auto", include=include)
    mpop.compress(model, config, batches(16))
    held = [module for module in model.modules() if isinstance(module, MPOExperts)]
    assert held and all(module.shape.is_low_rank for module in held)
    with pytest.raises(ValueError, match="plain low rank, got none in 4 matrices"):
        mpop.interpolate(model)
