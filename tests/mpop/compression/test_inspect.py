"""Inspecting dense and compressed models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import build

import mpop
from mpo_kernels import decompose

QUERY = "bert.encoder.layer.0.attention.self.query"


def _entropy(values: torch.Tensor) -> float:
    v = values.double().square() / values.double().square().sum()
    return float(-(v * v.log()).sum())


def test_a_dense_model_is_seen_as_it_would_be_compressed() -> None:
    model = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = mpop.inspect_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(row.is_dense and row.parameters == row.shape.dense_parameters for row in rows)
    report = mpop.compress(model)
    assert [(row.name, row.shape) for row in rows] == [(r.name, r.shape) for r in report.rows]


def test_first_bond_by_an_independent_svd() -> None:
    model = build("bert")
    weight = model.get_submodule(QUERY).weight.detach()
    rows = {row.name: row for row in mpop.inspect_model(model)}
    i, j = rows[QUERY].shape.in_factors[0], rows[QUERY].shape.out_factors[0]
    # [(i_1 j_1), rest]: the unfolding whose singular values the first bond carries.
    matrix = weight.t().reshape(i, 24 // i, j, 24 // j).transpose(1, 2).reshape(i * j, -1)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(rows[QUERY].spectra[0].float(), values, atol=1e-5, rtol=1e-4)
    assert rows[QUERY].entropies[0] == pytest.approx(_entropy(values), abs=1e-4)


def test_trained_cores_are_canonicalised_first() -> None:
    model = build("bert")
    mpop.compress(model, mpop.CompressionConfig(compression=0.7))
    module = model.get_submodule(QUERY)
    with torch.no_grad():
        for core in module.cores:
            core.add_(0.1 * torch.randn_like(core))
    row = {row.name: row for row in mpop.inspect_model(model)}[QUERY]
    assert row.shape == module.shape and not row.is_dense
    assert row.parameters == sum(core.numel() for core in module.cores)
    expected = decompose(module.to_linear().weight, module.shape.with_ranks(None))
    for found, spectrum in zip(row.spectra, expected.spectra, strict=True):
        spectrum = spectrum[: len(found)]
        torch.testing.assert_close(found, spectrum, atol=1e-5, rtol=1e-4)
    assert all(s <= math.log(r) + 1e-9 for s, r in zip(row.entropies, row.shape.ranks, strict=True))


def test_rows_as_text_and_json() -> None:
    model = build("gpt2-lm")
    for _ in range(2):
        rows = mpop.inspect_model(model)
        text = mpop.format_rows(rows)
        assert all(row.name in text for row in rows)
        assert f"{sum(row.parameters for row in rows):,}" in text
        assert json.loads(json.dumps([row.to_dict() for row in rows]))[0]["name"] == rows[0].name
        if rows[0].is_dense:
            mpop.compress(model)


def test_tied_and_shared_matrices_are_listed_once() -> None:
    model = build("t5")
    mpop.compress(model)
    names = [row.name for row in mpop.inspect_model(model)]
    assert len(names) == len(set(names))
    assert [name for name in names if "embed" in name or name in ("shared", "lm_head")] == [
        "shared"
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    model = build("bert")
    with torch.no_grad():
        model.get_submodule(QUERY).weight.zero_()
    mpop.compress(model, mpop.CompressionConfig(num_cores=3, ranks=6))
    path = tmp_path / f"spectra.{suffix}"
    mpop.plot_spectra(model, path)
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in head
    assert path.stat().st_size > 10_000
