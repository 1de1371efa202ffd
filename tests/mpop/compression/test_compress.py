"""Compressing and merging: every architecture, selection by name, and bad input."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
import weakref

import pytest
import torch
import transformers as hf
from tiny_models import BUILDERS, batches, build, inputs, logits
from torch import nn

import mpo_kernels
import mpop
from mpo_kernels import MPOEmbedding, MPOLinear, MPOShape
from mpo_kernels.cores.stack import decompose_stack
from mpop.models import selection
from mpop.models.matrices import mpo_modules

QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"


def _compress(model: hf.PreTrainedModel, **options) -> mpop.CompressionReport:
    return mpop.compress(model, mpop.CompressionConfig(**options))


def _types(model: hf.PreTrainedModel) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def _state(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", BUILDERS)
def test_full_rank_changes_no_logits_and_trains(name: str) -> None:
    model = build(name)
    expected = logits(model).detach()
    _compress(model)
    found = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    for _, module in mpo_modules(model):
        assert all(core.grad.isfinite().all() for core in module.cores)


@pytest.mark.parametrize("name", BUILDERS)
def test_merge_restores_modules_names_ties_and_logits(name: str) -> None:
    model, original = build(name), build(name)
    _compress(model)
    assert mpop.merge(model) is model
    torch.testing.assert_close(logits(model), logits(original), atol=1e-4, rtol=1e-4)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in original.named_parameters()
    }
    assert _types(model) == _types(original)
    assert model._tied_weights_keys == original._tied_weights_keys
    assert model.all_tied_weights_keys == original.all_tied_weights_keys
    assert not hasattr(model.config, "quantization_config")


def test_gradients_of_a_full_rank_model_are_those_of_the_dense_one() -> None:
    dense, model = build("bert"), build("bert")
    _compress(model)
    for each in (dense, model):
        logits(each).square().sum().backward()
    for name in ("classifier.weight", "bert.embeddings.position_embeddings.weight"):
        torch.testing.assert_close(
            model.get_parameter(name).grad, dense.get_parameter(name).grad, atol=1e-5, rtol=1e-4
        )


def test_what_is_compressed_by_default() -> None:
    model = build("bert")
    report = _compress(model)
    layers = [f"bert.encoder.layer.{k}." for k in range(2)]
    parts = [
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attention.output.dense",  # left out by the released code
        "intermediate.dense",
        "output.dense",
    ]
    expected = {layer + part for layer in layers for part in parts}
    assert {row.name for row in report.rows} == expected | {WORDS, "bert.pooler.dense"}
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.embeddings.position_embeddings) is nn.Embedding
    assert type(model.bert.embeddings.token_type_embeddings) is nn.Embedding


def test_feed_forward_up_and_down_have_factors_of_their_own() -> None:
    model, dense = build("bert"), build("bert")
    _compress(model, compression=0.6)
    for k, layer in enumerate(model.bert.encoder.layer):
        for part, (rows, columns) in (("intermediate", (48, 24)), ("output", (24, 48))):
            module = getattr(layer, part).dense
            assert math.prod(module.shape.in_factors) == columns
            assert math.prod(module.shape.out_factors) == rows
            weight = getattr(dense.bert.encoder.layer[k], part).dense.weight
            error = (module.to_linear().weight - weight).norm() / weight.norm()
            # A mis-reshaped matrix is no approximation: its relative error is about √2.
            assert error < 0.7


def test_albert_compresses_its_shared_layer_once() -> None:
    model = build("albert")
    report = _compress(model)
    assert sum(".query" in row.name for row in report.rows) == 1
    assert len(report.rows) == 9  # words, their projection, q, k, v, o, up, down, pooler


def test_llama_head_of_its_own_stays_dense_unless_included() -> None:
    model = build("llama")
    _compress(model)
    assert type(model.lm_head) is nn.Linear
    model = build("llama")
    expected = logits(model)
    report = _compress(model, include=["lm_head", "model.layers.0.*"])
    assert isinstance(model.lm_head, MPOLinear)
    assert {row.name for row in report.rows} > {"lm_head"}
    assert all(row.name.startswith(("lm_head", "model.layers.0.")) for row in report.rows)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("bert-mlm", "cls.predictions.decoder", WORDS),
        ("gpt2-lm", "lm_head", "transformer.wte"),
        ("llama-tied", "lm_head", "model.embed_tokens"),
        ("t5", "lm_head", "shared"),
        ("electra-mlm", "generator_lm_head", "electra.embeddings.word_embeddings"),
    ],
)
def test_tied_head_keeps_its_tie(name: str, head: str, words: str) -> None:
    model = build(name)
    tied_before = {n for n in model.state_dict() if n not in dict(model.named_parameters())}
    bias = getattr(model.get_submodule(head), "bias", None)
    _compress(model)
    embedding, output = model.get_submodule(words), model.get_submodule(head)
    assert isinstance(embedding, MPOEmbedding) and isinstance(output, MPOLinear)
    assert all(a is b for a, b in zip(embedding.cores, output.cores, strict=True))
    assert output.bias is bias
    model.tie_weights()
    assert all(a is b for a, b in zip(embedding.cores, output.cores, strict=True))
    mpop.merge(model)
    assert model.get_submodule(head).weight is model.get_submodule(words).weight
    assert {n for n in model.state_dict() if n not in dict(model.named_parameters())} == tied_before


def test_excluding_a_tied_head_leaves_both_sides_dense() -> None:
    model = build("gpt2-lm")
    report = _compress(model, exclude=["lm_head"])
    assert type(model.transformer.wte) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(row.name.startswith("transformer.h.") for row in report.rows)


def test_patterns_fit_whole_names_only() -> None:
    model = build("bert")
    report = _compress(model, include=["*.layer.0.*.query", "*.output.dense"])
    names = {row.name for row in report.rows}
    assert QUERY in names and "bert.encoder.layer.1.output.dense" in names
    assert not any("intermediate" in name or "layer.1.attention.self" in name for name in names)
    for option in ("include", "exclude"):
        with pytest.raises(ValueError, match=f"{option}.*'query'"):
            _compress(build("bert"), **{option: ["query"]})
    with pytest.raises(ValueError, match=r"overrides.*'\*\.Query'"):
        _compress(build("bert"), overrides={"*.Query": {"ranks": 2}})
    with pytest.raises(ValueError, match="position_embeddings"):
        _compress(build("bert"), include=["*.position_embeddings"])


def test_overrides_replace_the_budget_and_the_factors() -> None:
    model = build("bert")
    report = _compress(
        model,
        compression=0.5,
        overrides={
            "*.word_embeddings": {"ranks": 3, "num_cores": 3},
            "*.pooler.dense": {"in_factors": (1, 24), "out_factors": (24, 1), "ranks": 4},
            "*.layer.0.*": {"ranks": None},
            QUERY: {"ranks": 2},
        },
    )
    rows = {row.name: row for row in report.rows}
    assert rows[WORDS].shape == MPOShape.balanced(50, 24, 3, 3)
    assert rows["bert.pooler.dense"].shape == MPOShape((1, 24), (24, 1), 4)
    assert rows["bert.pooler.dense"].parameters_after == 2 * 24 * 4
    assert rows["bert.encoder.layer.0.output.dense"].rel_error < 1e-5
    assert rows[QUERY].ranks == (2, 2, 2, 2)
    row = rows["bert.encoder.layer.1.output.dense"]
    assert row.parameters_after <= 0.5 * row.parameters_before


def test_low_rank_factors_give_the_best_rank_k_matrix() -> None:
    model = build("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    weight = model.get_submodule(name).weight.detach()  # Conv1D: [in, out]
    report = _compress(
        model,
        include=[name],
        overrides={name: {"in_factors": (1, 24), "out_factors": (96, 1), "ranks": 5}},
    )
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = left[:, :5] @ torch.diag(values[:5]) @ right[:5]
    found = model.get_submodule(name).to_linear().weight.t()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    error = values[5:].norm() / values.norm()
    assert report.rows[0].rel_error == pytest.approx(float(error), rel=1e-4)
    entropy = values.square() / values.square().sum()
    assert report.rows[0].entropy == pytest.approx(
        float(-(entropy * entropy.log()).sum()), rel=1e-4
    )


def test_one_explicit_factor_is_one_core() -> None:
    model = build("bert")
    weight = model.get_submodule(QUERY).weight.detach().clone()
    one = {"in_factors": (24,), "out_factors": (24,)}
    report = _compress(model, include=[QUERY, WORDS], overrides={QUERY: one})
    row = next(row for row in report.rows if row.name == QUERY)
    assert row.ranks == () and row.entropy == 0 and row.rel_error < 1e-6
    assert QUERY in str(report) and json.dumps(report.to_dict())
    torch.testing.assert_close(model.get_submodule(QUERY).to_linear().weight, weight)
    assert next(row for row in mpop.inspect_model(model) if row.name == QUERY).entropies == ()


def test_devices_divide_the_first_factors_of_all_but_the_embeddings() -> None:
    model, devices = build("llama-tied"), 4
    report = _compress(model, tensor_parallel=devices)
    words, others = report.rows[0], report.rows[1:]
    assert words.name == "model.embed_tokens" and words.shape.in_features % devices
    for row in others:
        assert row.shape.in_factors[0] % devices == row.shape.out_factors[0] % devices == 0
    # A device's share of the inputs or the outputs is the same core cut, the others whole.
    original = build("llama-tied").model.layers[0].mlp.up_proj.weight.double()
    cores = list(model.double().model.layers[0].mlp.up_proj.cores)
    for rank in range(devices):
        for dim in (1, 2):
            share = cores[0].chunk(devices, dim)[rank]
            expected = original.chunk(devices, 2 - dim)[rank]
            found = mpo_kernels.reconstruct([share, *cores[1:]])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_relative_error_is_a_bound_on_each_matrix() -> None:
    model, dense = build("distilbert"), build("distilbert")
    report = _compress(model, rel_error=0.3, embeddings=False)
    for row in report.rows:
        weight = dense.get_submodule(row.name).weight.detach()
        found = model.get_submodule(row.name).to_linear().weight.detach()
        error = float((found - weight).norm() / weight.norm())
        assert error <= 0.3
        assert row.rel_error == pytest.approx(error, abs=1e-4)
    assert type(model.distilbert.embeddings.word_embeddings) is nn.Embedding


def test_zero_and_rank_deficient_matrices() -> None:
    model = build("bert")
    with torch.no_grad():
        model.get_submodule(QUERY).weight.zero_()
        model.bert.pooler.dense.weight.copy_(torch.ones(24, 1) @ torch.randn(1, 24))
    expected = logits(model)
    report = _compress(model)
    rows = {row.name: row for row in report.rows}
    assert rows[QUERY].rel_error == 0 and rows[QUERY].entropy == 0
    assert all(math.isfinite(row.rel_error) for row in report.rows)
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_report_counts_the_model_as_torch_does_and_prints() -> None:
    model = build("bert-mlm")
    before = sum(p.numel() for p in model.parameters())
    report = _compress(model, compression=0.5)
    after = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    for row in report.rows:
        cores = model.get_submodule(row.name).cores
        assert row.parameters_after == sum(core.numel() for core in cores)
        assert row.ranks == tuple(core.shape[3] for core in cores[:-1])
    text = str(report)
    assert all(row.name in text for row in report.rows)
    assert f"{before:,}" in text and f"{after:,}" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert len(report.to_dict()["rows"]) == len(report.rows)


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    weights = [weakref.ref(m.weight) for m in model.modules() if type(m) is nn.Linear]
    alive = []

    def counting(*args, **kwargs):
        alive.append(sum(ref() is not None for ref in weights))
        return decompose_stack(*args, **kwargs)

    monkeypatch.setattr(selection, "decompose_stack", counting)
    _compress(model, embeddings=False)
    assert alive == list(range(len(weights), 1, -1))  # the classifier stays


def test_device_dtype_mode_and_requires_grad_are_kept() -> None:
    model = build("bert").to(torch.bfloat16).train()
    model.get_submodule(QUERY).weight.requires_grad_(False)
    bias = model.get_submodule(QUERY).bias
    _compress(model)
    query = model.get_submodule(QUERY)
    assert query.training and query.bias is bias
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(core.requires_grad for core in query.cores)
    assert all(core.requires_grad for core in model.get_submodule(WORDS).cores)


def test_a_compressed_model_can_be_copied_and_cast() -> None:
    model = build("bert-mlm")
    _compress(model)
    twin = copy.deepcopy(model).to(torch.float64)
    torch.testing.assert_close(logits(twin).float(), logits(model), atol=1e-4, rtol=1e-4)
    assert twin.cls.predictions.decoder.cores[0] is next(mpo_modules(twin))[1].cores[0]


def test_t5_runs_in_half_precision() -> None:
    model = build("t5-gated")
    _compress(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    generated = model.generate(inputs(model)["input_ids"], max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2


@pytest.mark.parametrize(
    ("poison", "error", "message"),
    [
        (lambda m: m.weight.data.view(-1)[-1:].fill_(math.nan), ValueError, "NaN or Inf"),
        (lambda m: m.weight.data.view(-1)[-1:].fill_(-math.inf), ValueError, "NaN or Inf"),
        (lambda m: m.to("meta"), ValueError, "meta"),
        (
            lambda m: setattr(m, "weight", nn.Parameter(m.weight.to(torch.int8), False)),
            TypeError,
            "int8",
        ),
    ],
)
def test_a_bad_weight_leaves_the_model_untouched(poison, error: type, message: str) -> None:
    model = build("bert")
    poison(model.bert.pooler.dense)  # the last matrix
    before, types = _state(model), _types(model)
    with pytest.raises(error, match=f"pooler.*{message}"):
        _compress(model)
    assert _types(model) == types
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_model_without_words_is_compressed() -> None:
    config = hf.ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2)
    model = hf.ConvNextModel(config).eval()
    pixels = torch.randn(1, 3, 32, 32)
    before = model(pixels).last_hidden_state
    mpop.compress(model)
    assert len(list(mpo_modules(model))) == 4
    torch.testing.assert_close(model(pixels).last_hidden_state, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_cores", [2, 3, 5])
def test_the_least_compression_that_is_told_is_enough_for_every_matrix(num_cores: int) -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="compression of at least") as error:
        _compress(model, compression=1e-6, num_cores=num_cores)
    least = float(re.search(r"at least ([\d.e-]+)", str(error.value))[1])
    _compress(model, compression=least, num_cores=num_cores)
    assert any(set(module.shape.ranks) == {1} for _, module in mpo_modules(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overrides": {"*.pooler.dense": {"in_factors": [5, 5], "out_factors": [2, 2]}}},
            "pooler",
        ),
        ({"overrides": {"*.pooler.dense": {"ranks": [2, 2]}}}, "pooler.*4 ranks"),
        ({"tensor_parallel": 5}, r"query: .* tensor_parallel = 5 divides, got 24 × 24: exclude"),
        ({"tensor_parallel": 5, "factors": "auto", "compression": 0.5}, "tensor_parallel = 5"),
        (
            {
                "tensor_parallel": 2,
                "overrides": {"*.pooler.dense": {"in_factors": [4, 6], "out_factors": [3, 8]}},
            },
            r"pooler.*tensor_parallel = 2 divides.*got \(4, 6\) and \(3, 8\)",
        ),
        ({"ranks": (9, 999, 9, 9)}, "full"),
        ({"compression": 0.01}, "compression of at least"),
        ({"exclude": ["*"]}, "nothing to compress"),
        ({"include": [WORDS], "embeddings": False}, "nothing to compress"),
        ({"overrides": {WORDS: {"ranks": 2}}, "embeddings": False}, "word_embeddings"),
    ],
)
def test_a_plan_that_cannot_be_leaves_the_model_untouched(options: dict, message: str) -> None:
    model = build("bert")
    types = _types(model)
    with pytest.raises(ValueError, match=message):
        _compress(model, **options)
    assert _types(model) == types
    assert not hasattr(model.config, "quantization_config")


def test_an_interrupt_leaves_a_model_that_says_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("bert-mlm")
    expected = logits(model)
    calls = iter(range(3))

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decompose_stack(*args, **kwargs)

    monkeypatch.setattr(selection, "decompose_stack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _compress(model)
    assert len(model.config.quantization_config.modules) == 3
    torch.testing.assert_close(logits(mpop.merge(model)), expected, atol=1e-4, rtol=1e-4)


def test_models_that_cannot_be_compressed() -> None:
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        mpop.compress(nn.Linear(4, 4))
    model = build("bert")
    _compress(model)
    with pytest.raises(ValueError, match="already compressed"):
        _compress(model)
    with pytest.raises(ValueError, match="expected a compressed model"):
        mpop.merge(build("bert"))


def test_a_cut_that_sees_no_data_warns_once() -> None:
    for options in (
        {"compression": 0.6},
        {"compression": 0.6, "factors": "auto"},
        {"rel_error": 0.3},
        {"num_cores": 3, "ranks": 4},
        {"num_cores": 3, "overrides": {"*.query": {"ranks": 4}}},
    ):
        with pytest.warns(UserWarning) as warned:
            _compress(build("bert"), **options)
        assert ["without calibration" in str(each.message) for each in warned] == [True], options
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"share": 0.1}, {"num_cores": 3, "ranks": 9999}, {"rel_error": 0.0}):
            _compress(build("bert"), **options)
        config = mpop.CompressionConfig(compression=0.6, exclude=["*pooler.dense"])
        mpop.compress(build("bert"), config, batches(12))
