"""A decoder from the shell: cut on text, measured on text, and one line for what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_glue import last_json
from tiny_models import build
from tiny_text import llama, save_llama, tokenizer, words

import mpop
from mpop.cli import main
from mpop.data import text as text_module
from mpop.language.perplexity import continuation


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a .txt and two .jsonl files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(words(600, 1))
    (folder / "b.jsonl").write_text("".join(f'{{"text": "{words(60, k)}"}}\n' for k in range(10)))
    chat = [{"role": "user", "content": words(30, 3)}, {"role": "assistant", "content": words(30)}]
    (folder / "c.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 10)
    return folder


@pytest.fixture(scope="module")
def cut(dense: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cut") / "model"
    assert main(compress(dense, output, texts / "a.txt")) == 0
    return output


def compress(model: Path, output: Path, source: Path | str, *more: str) -> list[str]:
    cores = () if "--factors" in more else ("--num-cores", "2")
    options = ("--compression", "0.6", *cores, "--seqlen", "32", "--no-embeddings")
    paths = ("--model", str(model), "--output", str(output), "--calibrate", str(source))
    return ["compress", *paths, *options, *more]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("mpop ")]
    assert len(lines) == 1 and lines[0].startswith(f"mpop {arguments[0]}: error: ")
    return lines[0]


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.jsonl", ""])
def test_every_source_calibrates(name: str, dense: Path, texts: Path, tmp_path: Path, capsys: Any):
    assert main([*compress(dense, tmp_path / "out", texts / name), "--json"]) == 0
    captured = capsys.readouterr()
    result = last_json(captured.out)
    assert result["rows"] and all(row["output_error"] is not None for row in result["rows"])
    assert "warning" not in captured.err
    ids = torch.tensor([tokenizer()(words(20)).input_ids])
    assert torch.isfinite(mpop.load(tmp_path / "out")(ids).logits).all()


def test_windows_are_those_that_were_asked_for(dense: Path, texts: Path, tmp_path: Path, capsys):
    """At most what the model takes, and the same as in Python."""
    more = ("--samples", "12", "--seed", "3", "--seqlen", "4096")
    assert main([*compress(dense, tmp_path / "out", texts, *more), "--json"]) == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    model = llama()
    options = {"samples": 12, "seed": 3, "seqlen": 64}
    batches = mpop.text_batches(tokenizer(), texts, **options)
    config = mpop.CompressionConfig(compression=0.6, num_cores=2, embeddings=False)
    expected = mpop.compress(model, config, batches).to_dict()["rows"]
    assert [row["output_error"] for row in rows] == [row["output_error"] for row in expected]


@pytest.mark.filterwarnings("default:a cut without calibration:UserWarning")
def test_what_may_ruin_a_model_is_said(dense: Path, texts: Path, tmp_path: Path, capsys: Any):
    few = compress(dense, tmp_path / "few", texts / "a.txt", "--samples", "8")
    assert main(few) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert line.startswith(
        "mpop compress: warning: little text to calibrate with: the second moments of"
    )
    blind = ["compress", "--model", str(dense), "--output", str(tmp_path / "few"), "--overwrite"]
    assert main([*blind, "--ranks", "4"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "without calibration" in line and "--calibrate FILE" in line


def test_a_path_goes_before_a_task_and_that_before_the_hub(
    dense: Path, texts: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_module, "hub_reachable", lambda: False)
    line = fails(capsys, compress(dense, tmp_path / "out", "some/set"))
    assert "some/set: expected a .txt or .jsonl file" in line and "cannot be reached" in line
    of_task = compress(dense, tmp_path / "task", "SST-2", "--data-dir", str(data))
    at = of_task.index("--seqlen")
    assert main([*of_task[:at], *of_task[at + 2 :], "--samples", "48"]) == 0
    capsys.readouterr()
    line = fails(capsys, [*of_task, "--overwrite"])
    assert "--seqlen: expected --calibrate TEXT with it, got a task" in line
    (tmp_path / "SST-2").write_text("a film")
    assert "SST-2: expected a .txt" in fails(capsys, compress(dense, tmp_path / "out", "SST-2"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "missing file"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\x00\x01", "expected text, got binary data"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"body": 1}', "a.jsonl:1: expected a text of str, or the messages of a chat"),
        ("a.txt", b"the cat", "of one window, got"),
    ],
)
def test_bad_texts(name: str, content: bytes | None, message: str, dense, tmp_path, capsys):
    path, output = tmp_path / name, tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    assert message in fails(capsys, compress(dense, output, path))
    assert message in fails(capsys, ["perplexity", "--model", str(dense), "--text", str(path)])
    assert not output.exists()


def test_what_is_no_model_stays(
    dense: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What is read most of all, and the current folder."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    shutil.copy(texts / "a.txt", mine)
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    few = ("--overwrite", "--samples", "8")
    assert "a.txt, which is read" in fails(capsys, compress(dense, mine, mine / "a.txt", *few))
    assert "mine, which is read" in fails(capsys, compress(dense, mine, mine, *few))
    for folder, here in ((mine, "."), (mine, mine), (mine, tmp_path), (tmp_path, "mine/..")):
        monkeypatch.chdir(folder)
        line = fails(capsys, compress(dense, Path(here), texts / "a.txt", *few))
        assert "expected another folder than the current one, or one above it" in line
    (mine / "link.txt").symlink_to(texts / "a.txt")
    assert "link.txt, which is read" in fails(
        capsys, compress(dense, mine, mine / "link.txt", *few)
    )
    (mine / "link.txt").unlink()
    assert before == {file.name: file.read_bytes() for file in mine.iterdir()}
    assert main(compress(dense, mine, texts / "a.txt", *few)) == 0
    assert mpop.load(mine)
    assert all((mine / name).read_bytes() == held for name, held in before.items())
    with pytest.raises(ValueError, match="expected another folder than the current one"):
        mpop.save(mpop.load(mine), ".")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    mpop.save(mpop.load(mine), tmp_path / "new")
    monkeypatch.chdir(tmp_path)


def test_options_that_mean_nothing(dense: Path, texts: Path, tmp_path: Path, capsys: Any):
    """Without what they are of, or empty, as of a shell's variable that is not set."""
    whole = compress(dense, tmp_path / "out", texts)
    at = whole.index("--calibrate")
    blind = [*whole[:at], *whole[at + 2 :]]
    assert "--seqlen: expected --calibrate with it, got none" in fails(capsys, blind)
    line = fails(capsys, [*whole, "--data-dir", str(tmp_path)])
    assert "--data-dir: expected --calibrate TASK with it" in line
    for arguments in ([*whole, "--calibrate", ""], ["perplexity", "--model", "m", "--text", ""]):
        assert "expected a value, got an empty one" in fails(capsys, arguments)
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_model_has_not(dense: Path, tmp_path: Path, capsys: Any):
    model, text = tmp_path / "more", tmp_path / "a.txt"
    text.write_text(words(600, 1))
    shutil.copytree(dense, model)
    more = tokenizer()
    more.add_tokens(["the cat"])
    more.save_pretrained(model)
    for arguments, message in (
        (compress(model, tmp_path / "out", text), "got ids up to 25 in [1, 32]"),
        (
            ["perplexity", "--model", str(model), "--text", str(text)],
            "a.txt: expected tokens below",
        ),
    ):
        assert message in fails(capsys, arguments)
    assert not (tmp_path / "out").exists()
    batches = mpop.text_batches(tokenizer(), text, seqlen=48)
    with pytest.raises(ValueError, match=r"positions that the model has, got .* in \[1, 48\]"):
        mpop.compress(build("gpt2-lm"), calibration=batches)


def test_without_a_tokenizer(dense: Path, texts: Path, tmp_path: Path, capsys: Any):
    llama().save_pretrained(tmp_path / "bare")
    for arguments in (
        compress(tmp_path / "bare", tmp_path / "out", texts),
        ["perplexity", "--model", str(tmp_path / "bare"), "--text", str(texts)],
    ):
        line = fails(capsys, arguments)
        assert line.endswith("bare: expected a tokenizer beside the model, got none")
    assert not (tmp_path / "out").exists()


def test_perplexity(dense: Path, cut: Path, texts: Path, capsys: Any):
    text = texts / "a.txt"
    command = ["perplexity", "--model", str(cut), "--text", str(text), "--seqlen", "16"]
    assert main([*command, "--against", str(dense), "--json"]) == 0
    found = last_json(capsys.readouterr().out)
    assert main(["perplexity", "--model", str(dense), *command[3:], "--json"]) == 0
    alone = last_json(capsys.readouterr().out)
    assert found["against"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    ids = torch.tensor(tokenizer()(text.read_text()).input_ids)
    assert len(ids) == 601
    expected = mpop.perplexity(mpop.load(cut), ids, seqlen=16, against=llama())
    assert found["perplexity"] == pytest.approx(math.exp(expected.nats), rel=1e-6)
    assert found["divergence"] == pytest.approx(expected.divergence, rel=1e-5) and (
        found["divergence"] > 0.01
    )
    counts = {"windows": 37, "tokens": 592, "targets": 555, "dropped_tokens": 9, "seqlen": 16}
    assert counts.items() <= found.items()
    # Of the 592 tokens one is BOS, so it is the first 591 words.
    assert found["bytes"] == len(" ".join(text.read_text().split()[:591]))
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte(found["bytes"]))
    greedy = tokenizer().decode(continuation(llama(), ids[:8], 8))
    assert found["against"]["continuation"] == greedy
    assert found["prompt"].split() == ["<s>", *text.read_text().split()[:7]]
    assert main([*command, "--against", str(dense)]) == 0
    printed = capsys.readouterr().out
    for part in (
        f"{found['perplexity']:,.4f}  {found['against']['perplexity']:,.4f}",
        "37 windows of 16 that do not overlap, the 9 tokens that remain dropped; 15 targets",
        "BOS before the text only",
        f"mean KL(dense || compressed) of a token: {found['divergence']:.4f} nats",
        repr(found["against"]["continuation"]),
    ):
        assert part in printed
    assert main([*command, "--precision", "bf16", "--batch-size", "8", "--json"]) == 0
    half = last_json(capsys.readouterr().out)
    assert half["precision"] == "bfloat16"
    assert half["perplexity"] == pytest.approx(found["perplexity"], rel=0.1)


def test_beginnings_of_messages_are_counted(dense: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "chat.txt").write_text(f"<s> {words(20)} <s> {words(20)}")
    command = ["perplexity", "--model", str(dense), "--seqlen", "16"]
    assert main([*command, "--text", str(tmp_path / "chat.txt")]) == 0
    assert "15 targets a window; 3 BOS; exp" in capsys.readouterr().out


def test_a_divergence_that_rounds_below_zero(
    cut: Path, texts: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mpop.Perplexity(1.0, 16, 37, 9, mpop.Perplexity(1.0, 16, 37, 9), -1e-9)
    monkeypatch.setattr(mpop, "perplexity", lambda *args, **kwargs: found)
    paths = ("--model", cut, "--text", texts / "a.txt", "--against", cut)
    assert main(["perplexity", *map(str, paths), "--seqlen", "16"]) == 0
    assert "of a token: 0.0000 nats" in capsys.readouterr().out


def test_models_that_cannot_be_measured(
    dense: Path, bert: Path, texts: Path, tmp_path: Path, capsys: Any
):
    command = ["perplexity", "--text", str(texts / "a.txt"), "--model"]
    line = fails(capsys, [*command, str(bert)])
    assert "expected a decoder with a language modelling head" in line and "BertModel" in line
    line = fails(capsys, [*command, str(dense), "--against", str(bert)])
    assert f"expected a model of the same vocabulary as {dense}, got {bert}" in line
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][2] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    line = fails(capsys, [*command, str(broken)], code=1)
    assert "expected finite losses, got nan in window 1 of" in line


def test_rows_in_bytes(dense: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    command = compress(dense, tmp_path / "o", texts / "a.txt", "--factors", "interpolative")
    assert main([*command, "--store", "int8", "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    entries = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert {entry["store"] for entry in entries["modules"].values()} == {"int8"}
    held = load_file(tmp_path / "o" / "model.safetensors")
    assert result["matrix_bytes"] == sum(
        held[f"{name}.{tensor}"].nbytes
        for name in entries["modules"]
        for tensor in ("int8_core_0", "int8_core_1", "scale_0", "scale_1", "scale_2", "order")
    )
