"""The table of language models on a tiny decoder, and its ways of cutting against plain algebra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from tiny_glue import write_glue
from transformers import AutoModelForCausalLM

import mpop
from bench.language import table
from bench.language.ways import ROUNDINGS, WAYS, cut
from mpop.compression.calibration import Moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("language")
    tiny_text.save_llama(made / "model")
    for seed, name in enumerate(("valid", "test")):
        (made / f"{name}.txt").write_text(tiny_text.words(3000, seed))
    write_glue(made / "glue")
    return made


def test_it_goes_on_where_it_was(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "_WINDOWS", {"test 16": 4, "test 32": 2, "other 16": 2})
    options = ["--output", str(folder / "out"), "--texts", str(folder)]
    options += ["--data-dir", str(folder / "glue"), "--model", str(folder / "model")]
    options += ["--ratios", "0.7", "--samples", "24", "--seqlen", "32"]
    table.main([*options, "--budget-minutes", "0"])
    runs = folder / "out" / "runs.jsonl"
    assert [json.loads(line)["way"] for line in runs.read_text().splitlines()] == [
        *("dense", "int8", "int4")
    ]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = mpop.CompressionConfig(compression=0.5, num_cores=2, embeddings=False)
    mpop.compress(model, config, [{"input_ids": torch.arange(20).view(1, 20)}] * 9)
    mpop.save(model, folder / "small")
    options += ["--saved", f"ours-healed={folder / 'small'}"]
    table.main([*options, "--ways", "svd", "aware", "form", "ours", "ours-int8"])
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    names = [
        *("dense", "int8", "int4", "ours-healed"),
        *("svd", "aware", "form", "ours", "ours-int8"),
    ]
    assert [row["way"] for row in rows] == names
    dense, int8, _, healed, _, aware, form, ours, in_bytes = rows
    assert ours["of_matrices"] == form["of_matrices"] and ours["perplexity"] != form["perplexity"]
    assert healed["ratio"] == round(healed["of_matrices"], 2) and healed["ratio"] <= 0.5
    assert healed["bytes"] == 2 * mpop.count_parameters(model).total
    assert in_bytes["of_matrices"] == ours["of_matrices"] and in_bytes["bytes"] < ours["bytes"]
    for name, found in in_bytes["perplexity"].items():
        assert found == pytest.approx(ours["perplexity"][name], rel=0.05)
    assert dense["of_matrices"] == dense["of_model"] == 1
    assert int8["perplexity"]["test 16"] == pytest.approx(dense["perplexity"]["test 16"], rel=0.05)
    assert int8["bytes"] < dense["bytes"]
    for row in (aware, ours):
        assert 0.6 < row["of_matrices"] <= 0.7 and row["of_model"] < 1
    text = (folder / "out" / "table.md").read_text()
    assert "`ours`" in text and "python -m bench.language.table" in text
    assert rows[0]["commit"] in text and rows[0]["cpu"] in text
    assert {line[1] for line in cells(text)} == {"bf16"}
    assert "- `ours-healed`: `ours` after `mpop heal`" in text
    table.main([*options, "--ways", "svd", "--seeds", "1", "--precision", "fp32"])
    *_, in_fp32 = [json.loads(line) for line in runs.read_text().splitlines()]
    svd = rows[4]["perplexity"]["test 16"]
    # The same cut, which sees no text: only what computes with it differs.
    assert in_fp32["perplexity"]["test 16"] == pytest.approx(svd, rel=0.02)
    assert in_fp32["perplexity"]["test 16"] != svd
    text = (folder / "out" / "table.md").read_text()
    assert {line[1] for line in cells(text) if line[0] == "`svd`"} == {"bf16; draw 1 in fp32"}
    assert (folder / "out" / "table.svg").stat().st_size > 0


def cells(text: str) -> list[list[str]]:
    """Of the table's lines, below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_of_each_ratio_the_best_comes_first() -> None:
    measured = dict.fromkeys(("of_matrices", "of_model", "bytes", "commit", "cpu"), 0)
    measured |= {"seed": 0, "precision": "bf16"}
    found = [("a", 0.8, 5.0), ("b", 0.6, 7.0), ("c", 0.8, None), ("d", 0.8, 3.0)]
    rows = [
        {"way": way, "ratio": ratio, "perplexity": dict.fromkeys(table._WINDOWS, value), **measured}
        for way, ratio, value in found
    ]
    assert "".join(row["way"] for row in table.summary(rows)) == "dacb"


@pytest.mark.parametrize("name", ["aware", "ranks", "both", "form", "ours-int8", "chain-3"])
def test_a_budget_holds_and_the_rank_is_of_it(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    weights = {("a",): random(20, 12), ("b",): random(12, 30)}
    moments = {}
    for names, weight in weights.items():
        x, g = random(400, weight.shape[1]), random(400, len(weight))
        moments[names] = Moments(x.t() @ x, x.t() @ x, 400, 0.1, g.t() @ g)
    model = torch.nn.ModuleDict({n: torch.nn.Linear(*w.t().shape) for (n,), w in weights.items()})
    for (leaf,), weight in weights.items():
        model[leaf].weight.data = weight
    way = WAYS[name]._replace(sequential=False)  # there are no blocks
    found = list(cut(model, [], weights, moments, way, 0.6))
    assert sum(matrix.parameters for matrix in found) <= 0.6 * (240 + 360)
    for names, new, parameters, num_bytes in found:
        size, way = 2 * parameters, WAYS[name]
        if parameters < new.numel():
            # Each row has its place, of eight bytes, and where all is in bytes a scale of four, as
            # has each column of what is made of rows.
            rank = int(torch.linalg.matrix_rank(new, rtol=1e-4))
            size = parameters + 4 * (len(new) + rank) if way.in_bytes else size
            size += 8 * len(new) * way.interpolative
        assert num_bytes == size
        assert new.shape == weights[names].shape
        if WAYS[name].num_cores is None and parameters < new.numel():
            saved = rank**2 if WAYS[name].interpolative else 0
            assert parameters == rank * sum(new.shape) - saved


@pytest.mark.parametrize("name", ROUNDINGS)
def test_what_is_rounded_is_near(name: str) -> None:
    weight = torch.randn(8, 128)
    new, num_bytes = ROUNDINGS[name](weight)
    bits = int(name.removeprefix("int"))
    steps = [len(row.unique()) for row in new.view(-1, 128 if bits == 8 else 64)]
    assert max(steps) <= 2**bits
    assert (new - weight).abs().max() < 1.1 * weight.abs().max() * 2.0**-bits
    assert weight.numel() * bits / 8 < num_bytes < weight.numel() * (bits + 1) / 8
