"""`mpop squeeze --text`: a tiny Llama cut while it foretells what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glue import last_json
from tiny_text import llama, save_llama, tokenizer, words

import mpop
from mpop.cli import main

FEW = (
    *("--max-rounds", "2", "--settle-steps", "6", "--window", "1"),
    *("--learning-rate", "1e-3", "--calibration-samples", "8"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, a text, and a model of full rank in the folder `small`."""
    folder = save_llama(tmp_path_factory.mktemp("dense"))
    (folder / "a.txt").write_text(words(1000, 1))
    (folder / "b.txt").write_text(words(200, 2))
    model = llama()
    mpop.compress(model, mpop.CompressionConfig(num_cores=2, embeddings=False))
    mpop.save(model, folder / "small")
    tokenizer().save_pretrained(folder / "small")
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    models = ("--model", str(folder / "small"), "--output", str(output))
    return ["squeeze", *models, "--max-drop", "0.3", "--text", str(folder / "a.txt"), *more]


def log_likelihood(model: torch.nn.Module, ids: torch.Tensor, seqlen: int) -> float:
    """Mean over windows that each begin with BOS."""
    size = seqlen - 1
    packed = torch.cat([torch.zeros(len(ids) // size, 1).long(), ids.view(-1, size)], dim=1)
    with torch.no_grad():
        likely = model(packed).logits[:, :-1].double().log_softmax(-1)
    return likely.gather(-1, packed[:, 1:, None]).mean().item()


def test_squeezing_on_a_text(folder: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    output.mkdir()
    text = shutil.copy(folder / "a.txt", output)  # other files than a model's stay
    options = ("--teacher", str(folder), "--seqlen", "21", *FEW, "--text", str(text), "--json")
    assert main(command(folder, output, *options)) == 0
    captured = capsys.readouterr()
    result = last_json(captured.out)
    assert result["parameters"] < result["parameters_before"]
    assert (result["train_samples"], result["eval_samples"]) == (45, 5)
    assert captured.err.count("metric -") == 2
    # What is held out is the last hundred tokens.
    ids = torch.tensor(tokenizer()((folder / "a.txt").read_text()).input_ids[-100:])
    assert result["metric_name"] == "log_likelihood"
    assert result["metric_before"] == pytest.approx(log_likelihood(llama(), ids, 21), rel=1e-5)
    made = mpop.load(output)
    assert result["metric"] == pytest.approx(log_likelihood(made, ids, 21), rel=1e-5)
    assert mpop.count_parameters(made).total == result["parameters"]
    # The loss is the divergence, not what the text's tokens cost.
    assert 0 < result["rounds"][-1]["loss"] < 1 < -result["metric"]
    again = command(folder, output, *options, "--resume", "--max-rounds", "3")
    assert main(again) == 0
    assert last_json(capsys.readouterr().out)["rounds"][:2] == result["rounds"]
    lone = command(folder, output, *options)
    assert main(lone) == 2
    assert "out holds a model: choose another folder, or replace" in capsys.readouterr().err
    assert main([*lone, "--overwrite", "--max-rounds", "1"]) == 0
    (anew,) = last_json(capsys.readouterr().out)["rounds"]
    assert {**anew, "seconds": 0} == {**result["rounds"][0], "seconds": 0}
    assert main([*again, "--max-rounds", "2", "--evaluate", str(folder / "b.txt")]) == 2
    assert "expected a run of evaluate = " in capsys.readouterr().err


def test_another_text_to_measure_on(folder: Path, tmp_path: Path, capsys: Any) -> None:
    text = folder / "b.txt"
    options = ("--teacher", str(folder), "--seqlen", "21", "--evaluate", str(text), *FEW)
    few = ("--max-rounds", "1", "--calibration-samples", "0", "--precision", "bf16")
    assert main(command(folder, tmp_path / "out", *options, *few, "--max-drop", "1e-9")) == 0
    ids = torch.tensor(tokenizer()(text.read_text()).input_ids[1:])
    before = -log_likelihood(llama(), ids, 21)
    line = capsys.readouterr().out.splitlines()[-1]
    found = float(line.split("perplexity ")[1].split()[0].replace(",", ""))
    assert found == pytest.approx(torch.tensor(before).exp().item(), rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--text: expected a --teacher to heal by, got none"),
        (("--eval-split", "dev"), "--eval-split: expected --task with it, got none"),
        (("--data-dir", "d"), "--data-dir: expected --task with it, got none"),
        (
            ("--teacher", "D", "--max-length", "9"),
            "--max-length: expected --task with it, got none",
        ),
        (("--teacher", "D", "--window", "0"), "expected a positive integer, got '0'"),
        (("--teacher", "D", "--task", "rte"), "--task: not allowed with argument --text"),
    ],
)
def test_bad_options(
    more: tuple[str, ...], message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    try:
        code = main(command(folder, tmp_path / "out", *more))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_models_and_texts(folder: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    options = ("--teacher", str(folder), "--seqlen", "64")
    dense = ["squeeze", "--model", str(folder), *command(folder, output, *options)[3:]]
    (tmp_path / "short.txt").write_text(words(600))
    for arguments, message in (
        (dense, "is dense; compress it first"),
        (command(folder, output, *options, "--text", str(tmp_path / "short.txt")), "of one window"),
        (command(folder, output, *options, "--evaluate", "none.txt"), "missing file none.txt"),
        (
            command(folder, folder, *options, "--overwrite"),
            f"{folder} holds {folder}, which is read",
        ),
        (command(folder, save_llama(tmp_path / "other"), *options, "--resume"), "holds a model"),
        (
            [
                "squeeze",
                "--model",
                "m",
                "--output",
                "o",
                "--task",
                "rte",
                "--max-drop",
                "0.1",
                "--seqlen",
                "8",
            ],
            "--seqlen: expected --text with it, got none",
        ),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
