"""What is put on modules, and what becomes of it where an MPO takes their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import build, inputs, logits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mpop
from mpo_kernels import MPOEmbedding, MPOLinear

QUERY = "bert.encoder.layer.1.attention.self.query"


class Params4bit(nn.Parameter):
    """Of another class, as quantised weights are."""


def _replace_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)  # type: ignore[method-assign]


def _quantize_weight(linear: nn.Linear) -> None:
    linear.weight = Params4bit(linear.weight.detach())


PUT_ON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pruned": (lambda q: prune.l1_unstructured(q, "weight", 0.5), "weight_mask, weight_orig"),
    "pruned-bias": (lambda q: prune.l1_unstructured(q, "bias", 0.5), "bias_mask, bias_orig"),
    "norm": (weight_norm, "weight_g, weight_v"),
    "spectral": (spectral_norm, "weight_orig, weight_u, weight_v"),
    "new-norm": (parametrizations.weight_norm, "parametrizations.weight.original0, "),
    "new-spectral": (parametrizations.spectral_norm, "parametrizations.weight.0._u, "),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.0.base, "),
    "buffer": (lambda q: q.register_buffer("mask", torch.ones(3)), "mask"),
    "forward": (_replace_forward, "a forward of its own"),
    "weight": (_quantize_weight, "a Params4bit for a weight"),
}


@pytest.mark.parametrize("kind", PUT_ON)
def test_a_matrix_with_something_put_on_it_is_refused(kind: str) -> None:
    model = build("bert")
    put_on, found = PUT_ON[kind]
    put_on(model.get_submodule(QUERY))
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        expected = logits(model)
    message = rf"{QUERY}: expected a plain Linear, got one with {found}.*: undo that .*exclude it"
    for action in (mpop.compress, mpop.inspect_model):
        with pytest.raises(ValueError, match=message) as caught:
            action(model)
        assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert torch.equal(logits(model), expected)
        assert [(name, type(module)) for name, module in model.named_modules()] == modules
        mpop.compress(model, mpop.CompressionConfig(exclude=["*.1.*.query"]))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_compressed_may_have_it() -> None:
    model = build("bert")
    parametrizations.spectral_norm(model.classifier)
    assert mpop.compress(model).rows


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_an_embedding_that_needs_its_rows_is_refused(option: str) -> None:
    model = build("bert")
    setattr(model.bert.embeddings.word_embeddings, option, 1.0 if option == "max_norm" else True)
    with pytest.raises(ValueError, match=f"word_embeddings: .* plain Embedding, .* with {option}"):
        mpop.compress(model)


def _observed() -> nn.Module:
    model = build("bert").eval()
    query = model.get_submodule(QUERY)
    query.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(model)


def _with_4_bits() -> nn.Module:
    model = build("bert")
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.set_submodule(QUERY, kind(24, 24))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.ao.quantization.quantize_dynamic(build("bert"), {nn.Linear}), "torch.ao"),
        (_observed, "torch.ao"),
        (_with_4_bits, "bitsandbytes"),
    ],
    ids=["dynamic", "observed", "bitsandbytes"],
)
def test_a_model_with_quantised_layers_is_refused(make: Any, found: str) -> None:
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"expected a model without modules of {found}, got a "):
        mpop.compress(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_hooks_go_over_to_what_takes_a_layers_place() -> None:
    model, seen = build("bert"), []
    query, words = model.get_submodule(QUERY), model.get_input_embeddings()
    handles = [
        query.register_forward_hook(lambda module, args, y: seen.append("forward") or 2 * y),
        query.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("before") or (args, kwargs), with_kwargs=True
        ),
        query.register_full_backward_hook(lambda module, dx, dy: seen.append("backward")),
        words.register_forward_hook(lambda module, args, y: seen.append("words")),
    ]
    fired = ["before", "backward", "forward", "words"]

    def run() -> torch.Tensor:
        seen.clear()
        y = model(**inputs(model)).logits
        y.sum().backward()
        assert sorted(seen) == sorted(fired)
        return y.detach()

    expected = run()
    mpop.compress(model)
    assert isinstance(model.get_submodule(QUERY), MPOLinear)
    assert isinstance(model.get_input_embeddings(), MPOEmbedding)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    mpop.quantize_centres(model, 8)
    torch.testing.assert_close(run(), expected, rtol=0.1, atol=0.1)
    mpop.dequantize_centres(model)
    torch.testing.assert_close(run(), expected, rtol=0.1, atol=0.1)
    mpop.merge(model)
    assert type(model.get_submodule(QUERY)) is nn.Linear
    run()
    for handle in handles:
        handle.remove()
    fired.clear()
    run()


def test_a_hook_of_transformers_is_still_its_own() -> None:
    model = build("llama")
    model.enable_input_require_grads()
    mpop.compress(model)
    model.requires_grad_(False)
    assert logits(model).requires_grad
    model.disable_input_require_grads()
    assert not logits(model).requires_grad


def test_each_embedding_over_one_table_keeps_its_hooks() -> None:
    model = build("t5")
    model.encoder.embed_tokens.register_forward_hook(lambda module, args, y: 2 * y)
    right = logits(model)
    mpop.compress(model)
    torch.testing.assert_close(logits(model), right, atol=1e-4, rtol=1e-4)
    assert model.encoder.embed_tokens.cores[0] is model.decoder.embed_tokens.cores[0]
    mpop.merge(model)
    torch.testing.assert_close(logits(model), right, atol=1e-4, rtol=1e-4)
    assert model.encoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm"])
def test_layers_stay_on_the_devices_that_accelerate_gave_them(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        expected = logits(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    devices = {
        key: module._hf_hook.execution_device
        for key, module in model.named_modules()
        if hasattr(module, "_hf_hook")
    }
    bias = getattr(model.get_output_embeddings(), "bias", None)
    for step in (mpop.compress, mpop.merge):
        step(model)
        with torch.no_grad():
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        for key, device in devices.items():
            assert model.get_submodule(key)._hf_hook.execution_device == device, key
        assert getattr(model.get_output_embeddings(), "bias", None) is bias


class Doubled(nn.Module):
    def forward(self, core: Tensor) -> Tensor:
        return 2 * core


def _pruned(model: nn.Module, layer: nn.Module) -> None:
    prune.l1_unstructured(layer.cores, "2", 0.5)


def _parametrised(model: nn.Module, layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer.cores, "2", Doubled())


def _replaced(model: nn.Module, layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


@pytest.mark.parametrize("put_on", [_pruned, _parametrised, _replaced])
def test_what_is_put_on_layers_of_cores_is_not_lost(put_on, tmp_path: Path) -> None:
    model = build("bert")
    mpop.compress(model)
    put_on(model, model.bert.encoder.layer[0].attention.self.query)
    right = logits(model)
    for change in (
        mpop.balance,
        mpop.merge,
        mpop.quantize_centres,
        lambda model: mpop.save(model, tmp_path / "m"),
        lambda model: model.save_pretrained(tmp_path / "n"),
    ):
        with pytest.raises(ValueError, match=r"self\.query: expected a plain MPOLinear, got one"):
            change(model)
    torch.testing.assert_close(logits(model), right, rtol=0, atol=0)
