"""Healing a tiny Llama: the loss beside fp64, what trains and what stays, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_glue import last_json
from tiny_models import build
from tiny_text import llama, save_llama, tokenizer, words
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

import mpop
from mpop.cli import main
from mpop.finetuning.trainer import MPOTrainer
from mpop.language import healing

OPTIONS = {"seqlen": 16, "tokens": 900, "learning_rate": 1e-2, "batch_size": 3}


def cut(
    folder: Path,
    dense: Path,
    factors: str,
    dtype: torch.dtype = torch.float32,
    compression: float = 0.4,
) -> Path:
    """A compressed model with the tokenizer; returns `folder`."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    batches = mpop.text_batches(tokenizer(), dense / "a.txt", seqlen=32)
    config = mpop.CompressionConfig(
        factors=factors,
        compression=compression,
        embeddings=False,
        exclude=("*.k_proj",),
        **({"num_cores": 2} if factors == "balanced" else {}),
    )
    mpop.compress(model, config, batches)
    mpop.save(model, folder, base_model="someone/dense")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, and two texts."""
    folder = save_llama(tmp_path_factory.mktemp("dense"))
    (folder / "a.txt").write_text(words(1000, 1))
    (folder / "b.txt").write_text(words(300, 2))
    return folder


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(tmp_path_factory.mktemp("small"), dense, "balanced")


def command(model: Path, dense: Path, output: Path, *more: str, **options: Any) -> list[str]:
    paths = ("--model", model, "--teacher", dense, "--text", dense / "a.txt", "--output", output)
    values = {**OPTIONS, **options}.items()
    pairs = [part for name, value in values for part in (f"--{name.replace('_', '-')}", value)]
    return ["heal", *map(str, (*paths, *pairs, *more))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_loss_and_its_gradient_against_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "CHUNK", 4)  # does not divide 6
    own, other = torch.randn(2, 3, 7, 11, generator=torch.Generator().manual_seed(0)) * 3
    own.requires_grad_()
    exact = own.detach().double().requires_grad_()
    parts = (Categorical(logits=each[:, :-1]) for each in (other.double(), exact))
    expected = kl_divergence(*parts).mean()
    found = healing.divergence(own, other)
    torch.testing.assert_close(found.double(), expected)
    expected.backward()
    found.backward()
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    half = healing.divergence(own.bfloat16(), other.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize(
    ("factors", "method"), [("balanced", "light"), ("balanced", "full"), ("interpolative", "light")]
)
def test_cores_learn_and_the_rest_stays(
    factors: str, method: str, dense: Path, small: Path, tmp_path: Path, capsys: Any
) -> None:
    # Interpolative form keeps more of the same share: cut further there is as much to learn.
    rough = {"compression": 0.3}
    source = small if factors == "balanced" else cut(tmp_path / "small", dense, factors, **rough)
    output, text = tmp_path / "out", dense / "b.txt"
    more = ("--evaluate", str(text), "--method", method)
    assert main(command(source, dense, output, *more, "--json")) == 0
    captured = capsys.readouterr()
    result = last_json(captured.out)
    assert result == json.loads((output / "heal.json").read_text())
    assert result["divergence"] < 0.9 * result["divergence_before"]
    assert result["losses"][-1][1] < 0.9 * result["losses"][0][1]
    # 19 steps of at most three windows, of 66 that the text has; 15 tokens and BOS each.
    counts = {"steps": 19, "tokens": 19 * 48, "windows": 57, "seqlen": 16}
    assert counts.items() <= result.items()
    lines = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1 of 19: KL ") and lines[-1].startswith("step 19 of 19: KL ")
    ids = torch.tensor(tokenizer()(text.read_text()).input_ids)
    for model, name in ((output, ""), (source, "_before")):
        expected = mpop.perplexity(mpop.load(model), ids, seqlen=16, against=llama())
        for key in ("perplexity", "divergence"):
            assert result[key + name] == pytest.approx(getattr(expected, key), rel=1e-5)
    before, after = weights(source), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = mpop.load(source)
    model.requires_grad_(True)
    if method == "light":
        mpop.freeze_central(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert changed == {name for name in trained if "cores" in name or "norm" in name}
    assert any("cores" in name for name in changed)
    assert {"lm_head.weight", "model.layers.0.self_attn.k_proj.weight"} <= trained - changed
    assert {path.name for path in output.iterdir()} >= {"README.md", "tokenizer.json"}
    assert "base_model: someone/dense" in (output / "README.md").read_text()
    assert not (output / "healing").exists()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # the latter has other names in files
def test_resuming_ends_where_an_uninterrupted_run_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    dense = tmp_path / "dense"
    (llama() if kind == "llama" else build(kind)).save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    (dense / "a.txt").write_text(words(1000, 1))
    small = cut(tmp_path / "small", dense, "balanced")
    assert main(command(small, dense, tmp_path / "whole")) == 0
    step = MPOTrainer.training_step

    def interrupt(trainer: MPOTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 7:
            raise Interrupted
        return step(trainer, *args, **kwargs)

    parts, folder = tmp_path / "parts", tmp_path / "parts/healing"
    monkeypatch.setattr(MPOTrainer, "training_step", interrupt)
    with pytest.raises(Interrupted):
        main(command(small, dense, parts, "--resume"))  # of nothing yet
    monkeypatch.undo()
    assert [path.name for path in parts.iterdir()] == ["healing"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-7"]
    (folder / "checkpoint-8").mkdir()  # killed while it was written
    capsys.readouterr()
    assert main(command(small, dense, parts)) == 2
    assert "healing holds a run: resume it, or overwrite it" in capsys.readouterr().err
    assert main(command(small, dense, parts, "--resume", seed=3)) == 2
    assert "expected a run of seed = 3, got one of 0" in capsys.readouterr().err
    assert main(command(small, dense, parts, "--resume", "--json")) == 0
    captured = capsys.readouterr()
    assert "step 7 of" not in captured.err and "step 8 of 19" in captured.err
    expected, found = (
        json.loads((tmp_path / name / "heal.json").read_text()) for name in ("whole", "parts")
    )
    for name in ("tokens", "steps", "losses"):
        assert found[name] == expected[name]
    assert not folder.exists()
    whole, resumed, before = weights(tmp_path / "whole"), weights(parts), weights(small)
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert changed and all("core" in name or "norm" in name for name in changed)  # no router
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_step_has_windows_of_its_own(dense: Path, small: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "tokens": 1}
    result = mpop.heal(small, dense, dense / "a.txt", tmp_path / "out", **options)
    assert (result["windows"], result["steps"], result["tokens"]) == (3, 1, 48)


def test_few_windows_are_passed_over_again(dense: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "five.txt").write_text(words(75))
    options = {**OPTIONS, "tokens": 300}
    result = mpop.heal(small, dense, tmp_path / "five.txt", tmp_path / "out", **options)
    # Seven steps of three windows of 16.
    assert (result["windows"], result["steps"], result["tokens"]) == (5, 7, 7 * 48)


def test_a_model_stays_in_its_dtype(dense: Path, tmp_path: Path) -> None:
    half = cut(tmp_path / "half", dense, "balanced", torch.bfloat16)
    result = mpop.heal(half, dense, dense / "a.txt", tmp_path / "out", precision="bf16", **OPTIONS)
    assert result["losses"][-1][1] < 0.9 * result["losses"][0][1]
    assert {each.dtype for each in weights(tmp_path / "out").values()} == {torch.bfloat16}


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mpop ")]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


def test_refusals(dense: Path, small: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert "is dense; compress it first" in fails(capsys, command(dense, dense, out))
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"cat"', '"hat"'))
    line = fails(capsys, command(small, other, out))
    assert f"expected a model of the same vocabulary as {small}, got {other}" in line
    llama(30).save_pretrained(tmp_path / "wide")
    tokenizer().save_pretrained(tmp_path / "wide")
    line = fails(capsys, command(small, tmp_path / "wide", out))
    assert "one vocabulary, got 25 and 30 tokens" in line
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    line = fails(capsys, command(small, tmp_path / "broken", out))
    assert "broken: expected finite parameters, got NaN or Inf in model.norm.weight" in line
    (tmp_path / "short.txt").write_text(words(14))
    line = fails(capsys, command(small, dense, out, "--text", str(tmp_path / "short.txt")))
    assert "short.txt: expected at least the 15 tokens of one window, got 14" in line
    line = fails(capsys, command(small, dense, out, "--evaluate", str(tmp_path / "none.txt")))
    assert "missing file" in line
    line = fails(capsys, command(small, dense, out, "--evaluate", str(tmp_path / "short.txt")))
    assert "short.txt: expected at least the 16 tokens of one window, got 15" in line
    assert "seqlen: expected at least 2" in fails(capsys, command(small, dense, out, seqlen=1))
    line = fails(capsys, command(small, dense, dense, "--overwrite"))
    assert f"{dense} holds {dense}, which is read: choose another folder" in line
    for name in (small, dense):
        shutil.copytree(name, tmp_path / "more" / name.name)
        more = tokenizer()
        more.add_tokens(["the cat"])
        more.save_pretrained(tmp_path / "more" / name.name)
    line = fails(
        capsys, command(tmp_path / "more" / small.name, tmp_path / "more" / dense.name, out)
    )
    assert "expected tokens below 25, the model's vocabulary, got 25" in line
    stored = mpop.load(small)
    mpop.quantize(stored, torch.int8)
    mpop.save(stored, tmp_path / "int8")
    tokenizer().save_pretrained(tmp_path / "int8")
    line = fails(capsys, command(tmp_path / "int8", dense, out))
    assert "expected cores of 16 bits or more, got int8" in line
    assert not out.exists()
    for name, value in {"tokens": 0, "learning_rate": -1.0, "precision": "fp16"}.items():
        with pytest.raises(ValueError, match=f"^{name} must be "):
            mpop.heal(small, dense, dense / "a.txt", out, **{**OPTIONS, name: value})
    (tmp_path / "texts").mkdir()
    shutil.copy(dense / "a.txt", tmp_path / "texts")
    text, short = tmp_path / "texts", tmp_path / "short.txt"
    more = ("--text", str(text), "--evaluate", str(short), "--overwrite")
    for output, read in ((text, text), (tmp_path, short)):
        line = fails(capsys, command(small, dense, output, *more))
        assert f"{output} holds {read}, which is read: choose another folder" in line
    save_llama(out)
    assert "holds a model: choose another folder" in fails(capsys, command(small, dense, out))


def test_a_diverged_run_leaves_nothing(
    dense: Path, small: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    line = fails(capsys, command(small, dense, out, learning_rate=1e30), code=1)
    assert "the loss is nan at step" in line and "lower the learning rate" in line
    assert not out.exists()
    shutil.copytree(small, out)
    before = weights(out)
    fails(capsys, command(small, dense, out, "--overwrite", learning_rate=1e30), code=1)
    assert not (out / "healing").exists()
    assert all(torch.equal(each, before[name]) for name, each in weights(out).items())
    assert main(command(small, dense, out, "--overwrite", tokens=96)) == 0
    assert (out / "heal.json").is_file()


def test_the_seed_chooses_the_windows(dense: Path, small: Path, tmp_path: Path) -> None:
    """The first loss is that of the windows that `text_batches` gives for it."""
    options = {**OPTIONS, "tokens": 48, "seed": 5}
    result = mpop.heal(small, dense, dense / "a.txt", tmp_path / "out", **options)
    (batch,) = mpop.text_batches(
        tokenizer(), dense / "a.txt", samples=3, seqlen=16, seed=5, batch_size=3
    )
    with torch.no_grad():
        expected = healing.divergence(mpop.load(small)(**batch).logits, llama()(**batch).logits)
    assert result["losses"] == [[1, pytest.approx(expected.item(), rel=1e-5)]]
