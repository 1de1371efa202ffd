"""Classes of model that answer, end a text, pad or count positions in ways of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from tiny_glue import save_tokenizer, write_tsv
from tiny_models import VOCABULARY, build

import mpop
from mpop.data.glue import TASKS
from mpop.data.lengths import longest
from mpop.finetuning import rows
from mpop.finetuning.squeeze_task import squeeze_on_task
from mpop.finetuning.task import evaluate, finetune

FAST: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "disable_tqdm": True}


def gpt2(**options: Any) -> hf.PreTrainedModel:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 20}
    config = hf.GPT2Config(vocab_size=VOCABULARY, **sizes, **options)
    return hf.GPT2ForSequenceClassification(config)


def xlnet() -> hf.PreTrainedModel:
    sizes = {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 48}
    return hf.XLNetForSequenceClassification(hf.XLNetConfig(vocab_size=VOCABULARY, **sizes))


def roberta() -> hf.PreTrainedModel:
    model = build("roberta")
    return type(model)(hf.RobertaConfig(**{**model.config.to_dict(), "pad_token_id": 0}))


# A model, the padding token of its tokenizer, and the tokens of a row that it takes of 40.
MODELS = {
    "t5": (lambda: build("t5-classifier"), "<pad>", 40),
    "bart": (lambda: build("bart-classifier"), "<pad>", 20),
    "xlnet": (xlnet, "<pad>", 40),
    "roberta": (roberta, "<pad>", 19),
    "gpt2 without padding": (gpt2, None, 20),
    "gpt2 whose tokenizer has none": (lambda: gpt2(pad_token_id=3), None, 20),
    "gpt2 with hidden states": (lambda: gpt2(pad_token_id=0, output_hidden_states=True), None, 20),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 with rows of few words and of many, and of one that spells the end of a text."""
    folder, task = tmp_path_factory.mktemp("glue"), TASKS["sst2"]
    texts = ["the film is fine", "a poor </s> plot", "dog " * 60, "cat"]
    for split, name in task.layouts[0].items():
        count = 40 if split == "train" else 16
        made = [[texts[k % 4], str(k % 2)] for k in range(count)]
        write_tsv(folder / task.folder / name, task, made)
    return folder


def saved(name: str, folder: Path) -> Path:
    make, pad, _ = MODELS[name]
    make().save_pretrained(folder)
    return save_tokenizer(folder, pad, "left" if name == "xlnet" else "right")


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "dense") for name in MODELS), ("t5", "light"), ("bart", "light"), ("xlnet", "light")],
)
def test_it_is_trained_and_evaluated(name: str, method: str, data: Path, tmp_path: Path) -> None:
    model, output = saved(name, tmp_path / "model"), tmp_path / "out"
    options = {"data_dir": data, "max_length": 40}
    result = finetune(model, "sst2", output, method, **options, **FAST)
    assert result["max_length"] == MODELS[name][2]
    # In batches of another size: what pads a row is not seen.
    again = evaluate(output, "sst2", **options, batch_size=5, predictions=tmp_path / "again.npz")
    assert again["value"] == result["value"]
    with np.load(output / "predictions.npz") as a, np.load(tmp_path / "again.npz") as b:
        assert a["dev"].shape == (16, 2)
        np.testing.assert_allclose(a["dev"], b["dev"], atol=1e-5)


def test_what_a_row_spells_is_text_for_this_run_alone(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = rows.padding_tokenizer(tmp_path, build("t5-classifier"))
    assert tokenizer("a </s> cat")["input_ids"].count(1) == 1
    tokenizer.save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path)("a </s> cat")["input_ids"].count(1) == 2


def test_nothing_to_pad_with_is_told(data: Path, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, None)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a tokenizer with a token to pad with"):
        finetune(tmp_path, "sst2", tmp_path / "out", data_dir=data)


def test_rows_to_calibrate_with_fit_the_model(data: Path, tmp_path: Path) -> None:
    model = build("bart-classifier")
    source = save_tokenizer(tmp_path)
    for count, sizes in ((40, [32, 8]), (32, [16, 16]), (3, [2, 1])):  # one is to judge by
        batches = rows.calibration_batches(model, source, "sst2", data, count)
        assert [len(batch["input_ids"]) for batch in batches] == sizes
        longest = 20 if count == 40 else batches[0]["input_ids"].shape[1]
        assert batches[0]["input_ids"].shape[1] == longest <= 20


def test_what_is_trained_is_saved_before_anything_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an encoder-decoder, which is then squeezed by what the cuts do to its logits."""

    def fail(*arguments: Any) -> None:
        raise OSError("no space left")

    model, tuned, small = (
        saved("bart", tmp_path / "model"),
        tmp_path / "tuned",
        tmp_path / "small",
    )
    with monkeypatch.context() as patched:
        patched.setattr(rows, "compute_metrics", fail)
        with pytest.raises(OSError, match="no space left"):
            config = mpop.CompressionConfig(include=["*.fc1", "*.fc2"])
            finetune(model, "sst2", tuned, "light", config=config, data_dir=data, **FAST)
    before = evaluate(tuned, "sst2", data_dir=data)
    monkeypatch.setattr("mpop.finetuning.squeeze_task.plot_trace", fail)
    options: dict[str, Any] = {"max_rounds": 1, "settle_steps": 1, "window": 1, "max_drop": 1.0}
    with pytest.raises(OSError, match="no space left"):
        squeeze_on_task(tuned, "sst2", small, **options, data_dir=data)
    report = json.loads((small / "squeeze.json").read_text())
    assert report["metric_before"] == before["value"]
    after = evaluate(small, "sst2", data_dir=data)
    assert after["value"] == report["metric"]
    assert after["total_parameters"] == report["parameters"] < before["total_parameters"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("bert", 20),
        ("roberta", 18),  # the first two are the padding's and what is before it
        ("gpt2", 20),
        ("t5", None),
        (xlnet, None),
        (lambda: hf.MptModel(hf.MptConfig(d_model=8, n_heads=2, n_layers=1, max_seq_len=9)), 9),
    ],
)
def test_the_longest_text(model: Any, expected: int | None) -> None:
    assert longest(build(model) if isinstance(model, str) else model()) == expected
