"""vLLM gives what transformers gives: decoders, encoders, and checkpoints that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import edit_config, edit_tensors
from served import PROMPTS, expected, generated, ids_of, served

from tests.serving.checkpoints import CASES, newer, save

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    **CASES,
    "biases": ("llama-biases", {"num_cores": 3, "ranks": 20, "embeddings": False}),
    "tied": ("qwen3-tied", {"num_cores": 3, "rel_error": 0.1}),
    "fused on disk": ("gpt2", {"compression": 0.9}),
}
ENCODERS = {"balanced": {"compression": 0.7}, "auto": {"compression": 0.7, "factors": "auto"}}
KEY = "encoder.layer.1.attention.self.key"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", DECODERS)
def test_decoders(case: str, eager: bool, tmp_path: Path) -> None:
    name, options = DECODERS[case]
    model = save(tmp_path / "model", name, **options)
    with served(tmp_path / "model", enforce_eager=eager) as llm:
        found = generated(llm)
    for (tokens, logprobs), (want, want_logprobs) in zip(found, expected(model), strict=True):
        assert tokens == want
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)


def test_half_precision_and_what_is_held(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "llama", num_cores=3, ranks=12, embeddings=False)
    with served(tmp_path / "model", enforce_eager=True, dtype="bfloat16") as llm:
        found = generated(llm)
        (sizes,) = llm.apply_model(
            lambda served: {
                name: (parameter.dtype, parameter.numel())
                for name, parameter in served.named_parameters()
                if "layers" in name and "norm" not in name
            }
        )
    for (_, logprobs), (_, want) in zip(found, expected(model.bfloat16()), strict=True):
        assert logprobs == pytest.approx(want, abs=0.2)
    held = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    cores = sum(
        12 * (a * b + e * f) + 144 * c * d
        for entry in held["modules"].values()
        for (a, c, e), (b, d, f) in [(entry["in_factors"], entry["out_factors"])]
    )
    assert {dtype for dtype, _ in sizes.values()} == {torch.bfloat16}
    assert sum(size for _, size in sizes.values()) <= 1.3 * cores


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", ENCODERS)
def test_embeddings(case: str, eager: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "model", "bert", **ENCODERS[case])
    with served(tmp_path / "model", enforce_eager=eager, runner="pooling") as llm:
        found = [output.outputs.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]
    for embedding, prompt in zip(found, PROMPTS, strict=True):
        first = model(torch.tensor([ids_of(prompt)])).last_hidden_state[0, 0]
        want = torch.nn.functional.normalize(first, dim=0)
        torch.testing.assert_close(torch.tensor(embedding), want, rtol=0, atol=1e-5)


def test_pooled_as_the_folder_says(tmp_path: Path) -> None:
    """`mpop compress` keeps these files of a sentence-transformers model."""
    model = save(tmp_path, "bert", compression=0.7)
    types = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{name}"}
        for path, name in zip(("", "1_Pooling", "2_Normalize"), types, strict=True)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with served(tmp_path, enforce_eager=True, runner="pooling") as llm:
        found = [output.outputs.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]
    for embedding, prompt in zip(found, PROMPTS, strict=True):
        mean = model(torch.tensor([ids_of(prompt)])).last_hidden_state[0].mean(0)
        want = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(torch.tensor(embedding), want, rtol=0, atol=1e-5)


def test_a_classifier_whose_pooler_is_dense(tmp_path: Path) -> None:
    options = {"compression": 0.7, "exclude": ["*pooler.dense"]}
    model = save(tmp_path / "model", "bert-classifier", **options)
    with served(tmp_path / "model", enforce_eager=True, runner="pooling") as llm:
        found = [output.outputs.probs for output in llm.classify(PROMPTS, use_tqdm=False)]
    for probabilities, prompt in zip(found, PROMPTS, strict=True):
        want = model(torch.tensor([ids_of(prompt)])).logits[0].softmax(0)
        torch.testing.assert_close(torch.tensor(probabilities), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (newer, "upgrade mpop"),
        (
            lambda path: edit_config(
                path, lambda c: c["quantization_config"]["modules"][KEY].update(ranks=[10**9] * 4)
            ),
            f"{KEY}.*ranks of at most the full",
        ),
        (
            lambda path: edit_config(path, lambda c: c.update(intermediate_size=100)),
            "intermediate.dense: expected 100 features in each of 1 processes .* got 200",
        ),
        (
            lambda path: edit_tensors(path, lambda t: t.pop(f"{KEY}.cores.2")),
            f"{KEY}.cores.2: missing from the checkpoint",
        ),
        (
            lambda path: edit_tensors(
                path, lambda t: t.update({f"{KEY}.cores.2": torch.zeros(2, 3, 4, 5)})
            ),
            rf"{KEY}.cores.2: expected \[.*\] by the configuration, got \[2, 3, 4, 5\]",
        ),
    ],
    ids=["newer version", "ranks", "other model", "missing core", "core of another shape"],
)
def test_what_is_wrong_is_said(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(path, "bert")
    spoil(path)
    with pytest.raises(ValueError, match=message), served(path, runner="pooling"):
        pass
