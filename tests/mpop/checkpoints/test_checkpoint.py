"""Saving and loading: what comes back, and what a killed save leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_models import BUILDERS, build, inputs, logits
from torch.utils._python_dispatch import TorchDispatchMode

import mpop
from mpo_kernels import MPOLinear
from mpop.checkpoints import folder
from mpop.models.config import FORMAT_VERSION
from mpop.models.matrices import mpo_modules

QUERY = "bert.encoder.layer.0.attention.self.query"


def _compressed(name: str, **options: Any) -> hf.PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**(options or {"compression": 0.8})))
    return model


def _assert_equal(model: hf.PreTrainedModel, other: hf.PreTrainedModel) -> None:
    assert type(model) is type(other)
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(model), logits(other))
    tied = [len(list(each.parameters())) for each in (model, other)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = _compressed(name)
    mpop.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {file.name for file in (tmp_path / "a").iterdir()} <= files
    _assert_equal(mpop.load(tmp_path / "a"), model)
    _assert_equal(type(model).from_pretrained(tmp_path / "b"), model)
    names = load_file(tmp_path / "a/model.safetensors").keys()
    assert len(names) == len(list(model.parameters()))  # tied tensors are written once


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("bert", hf.AutoModelForMaskedLM),
        ("bert-mlm", hf.AutoModelForSequenceClassification),
        ("gpt2", hf.AutoModelForCausalLM),
        ("llama-tied", hf.AutoModelForSequenceClassification),
        ("t5", hf.AutoModelForSequenceClassification),
    ],
)
def test_base_and_headed_models_share_a_checkpoint(name: str, other: type, tmp_path: Path) -> None:
    model = _compressed(name)
    base = model.base_model
    mpop.save(model, tmp_path / "headed")
    auto = hf.AutoModel.from_pretrained(tmp_path / "headed")
    ids = inputs(model)
    if base is not model:
        assert type(auto) is type(base)
        expected, found = base(**ids)[0], auto(**ids)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    auto.save_pretrained(tmp_path / "base")
    headed = other.from_pretrained(tmp_path / "base")
    prefix, state = f"{headed.base_model_prefix}.", auto.state_dict()
    shared = {key: key.removeprefix(prefix) for key in headed.state_dict()}
    shared = {key: bare for key, bare in shared.items() if bare in state}
    assert all(torch.equal(headed.state_dict()[key], state[bare]) for key, bare in shared.items())
    assert {bare for bare in state if bare not in shared.values()} <= {
        key for key in state if key.startswith("pooler.")
    }
    assert logits(headed).isfinite().all()


def test_cores_of_a_matrix_that_another_class_reads_itself_are_refused(tmp_path: Path) -> None:
    mpop.save(_compressed("mobilebert"), tmp_path / "a")
    says = "word_embeddings: held as cores .* MobileBertForMaskedLM .*read by .*: merge"
    for load in (hf.AutoModelForMaskedLM.from_pretrained, hf.MobileBertForMaskedLM.from_pretrained):
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "a")


def test_an_included_head_and_conv1d_survive(tmp_path: Path) -> None:
    model = _compressed("llama", include=["lm_head", "*.q_proj"], ranks=6)
    mpop.save(model, tmp_path / "llama")
    loaded = mpop.load(tmp_path / "llama")
    assert isinstance(loaded.lm_head, MPOLinear)
    _assert_equal(loaded, model)
    model = _compressed("gpt2-lm")
    mpop.save(model, tmp_path / "gpt2")
    merged = mpop.merge(mpop.load(tmp_path / "gpt2"))
    merged.save_pretrained(tmp_path / "dense")
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not list(mpo_modules(dense))
    assert dense.transformer.h[0].mlp.c_fc.weight.shape == (24, 96)
    torch.testing.assert_close(logits(dense), logits(model), atol=1e-4, rtol=1e-4)


def test_frozen_centres_stay_frozen(tmp_path: Path) -> None:
    model = _compressed("bert-mlm")
    count = mpop.freeze_central(model)
    mpop.save(model, tmp_path / "light")
    for loaded in (
        mpop.load(tmp_path / "light"),
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "light"),
    ):
        assert mpop.count_parameters(loaded) == count
    mpop.unfreeze(loaded)
    loaded.save_pretrained(tmp_path / "full")
    assert mpop.count_parameters(mpop.load(tmp_path / "full")) == (count.total, count.total)
    mpop.save(model.requires_grad_(False), tmp_path / "full")  # put away, not light
    assert mpop.count_parameters(mpop.load(tmp_path / "full")) == (count.total, count.total)


def test_ranks_cut_after_loading_are_saved(saved: Path, tmp_path: Path) -> None:
    model = mpop.load(saved)
    model.get_submodule(QUERY).round(max_rank=3)
    model.save_pretrained(tmp_path / "cut")
    loaded = mpop.load(tmp_path / "cut")
    assert max(loaded.get_submodule(QUERY).shape.ranks) == 3
    _assert_equal(loaded, model)


def test_dtype_and_shards(tmp_path: Path) -> None:
    model = _compressed("bert").to(torch.bfloat16)
    mpop.save(model, tmp_path / "half")
    assert mpop.load(tmp_path / "half").dtype == torch.bfloat16
    loaded = mpop.load(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.half().dtype == torch.float16
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    _assert_equal(mpop.load(tmp_path / "shards"), model)


def test_a_state_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    model = _compressed("bert")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = mpop.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_model_card(tmp_path: Path) -> None:
    model = build("bert")
    total = sum(p.numel() for p in model.parameters())
    report = mpop.compress(model, mpop.CompressionConfig(compression=0.5))
    mpop.save(model, tmp_path / "a", base_model="some/bert", license="apache-2.0")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert (card.data.base_model, card.data.license) == ("some/bert", "apache-2.0")
    assert card.data.library_name == "transformers" and "mpop" in card.data.tags
    assert f"{total:,} of the dense model" in card.text and "import mpop" in card.text
    assert f"{report.parameters_after:,} parameters" in card.text
    for row in report.rows:
        (line,) = (line for line in card.text.splitlines() if f"`{row.name}`" in line)
        assert " ".join(map(str, row.ranks)) in line and f"{row.rel_error:.2g}" in line
    # One that somebody wrote is kept; a folder's name tells nobody anything.
    (tmp_path / "a" / "README.md").write_text("mine")
    again = mpop.load(tmp_path / "a")
    mpop.save(again, tmp_path / "a")
    mpop.save(again, tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    text = (tmp_path / "b" / "README.md").read_text()
    assert str(tmp_path) not in text and "base_model" not in text
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Bert"):
        mpop.model_card(build("bert"))


def test_a_card_is_kept_up_to_date(tmp_path: Path) -> None:
    model = _compressed("bert", compression=0.8)
    mpop.save(model, tmp_path, base_model="some/bert", license="apache-2.0")
    file = tmp_path / "README.md"
    before = file.read_text().replace("# bert, compressed", "# Mine") + "\nAnd what I say of it.\n"
    file.write_text(before.replace("license: apache-2.0", "license: apache-2.0\nlanguage: en"))
    again = mpop.load(tmp_path)
    again.get_submodule(QUERY).round(max_rank=2)
    mpop.save(again, tmp_path)
    after = file.read_text()
    (row,) = (line for line in after.splitlines() if f"`{QUERY}`" in line)
    assert "| 2 2 2 2 |" in row and row not in before
    assert f"{mpop.count_parameters(again).total:,} parameters" in after
    assert after.startswith("---\nbase_model: some/bert\n") and "language: en" in after
    assert "# Mine" in after and after.endswith("\nAnd what I say of it.\n")
    assert after.count("before any training after it.") == 1 and "`some/bert` whose" in after
    # Of another base model it is another card.
    other = _compressed("roberta")
    other.config._name_or_path = "some/roberta"
    mpop.save(other, tmp_path)
    text = file.read_text()
    assert "Mine" not in text and "# roberta, compressed" in text and "some/bert" not in text


def test_no_dense_weight_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the dispatch mode is of this thread only
    config = hf.BertConfig(
        vocab_size=997,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    model = hf.BertModel(config)
    mpop.compress(model, mpop.CompressionConfig(ranks=8))
    mpop.save(model, tmp_path / "model")

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta:
                Sizes.largest = max(Sizes.largest, result.nbytes)
            return result

    with Sizes():
        mpop.load(tmp_path / "model")
    # The largest that stays dense are the positions; a query would be 128 × 128.
    assert 0 < Sizes.largest <= 64 * 128 * 4


def test_saving_over_a_folder_keeps_its_other_files(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    build("bert").save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "runs").mkdir()
    (path / "runs/log").write_text("log")
    model = mpop.load(saved)
    mpop.save(model, path)
    assert {str(file.relative_to(path)) for file in path.rglob("*")} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "runs",
        "runs/log",
    }
    _assert_equal(mpop.load(path), model)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("step", ["_keep_others", "_exchange"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_save_leaves_the_old_checkpoint(
    step: str, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mpop.load(broken)
    before = load_file(broken / "model.safetensors")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    monkeypatch.setattr(folder, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if (child := os.fork()) == 0:
        mpop.save(model, broken)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    (left,) = broken.parent.glob(".*.tmp")
    after = load_file(broken / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    mpop.load(broken)
    with folder.replaced(broken.parent / "another"), pytest.raises(RuntimeError, match="stopped"):
        pass  # of another name, which leaves it
        raise RuntimeError("stopped")
    assert left.is_dir()
    mpop.save(model, broken)
    _assert_equal(mpop.load(broken), model)
    assert broken in broken.parent.iterdir() and not left.exists()


def test_what_another_process_is_saving_is_left_alone(broken: Path) -> None:
    model = mpop.load(broken)
    with folder.replaced(broken) as new:
        taken = new.rename(new.with_name(f".{broken.name}.1.tmp"))  # as of another process
        mpop.save(model, broken)
        assert taken.is_dir()
        taken.rename(new)
        model.save_pretrained(new)
    assert [file.name for file in broken.parent.iterdir()] == [broken.name]
    mpop.load(broken)


def test_a_failed_save_leaves_nothing_behind(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mpop.load(broken)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(hf.modeling_utils, "safe_save_file", fail)
    for path in (broken, broken.parent / "other"):
        with pytest.raises(OSError, match="disk full"):
            mpop.save(model, path)
    assert [file.name for file in broken.parent.iterdir()] == [broken.name]
    mpop.load(broken)


def test_exchange_without_the_system_call(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.ctypes, "CDLL", lambda _: object())
    model = mpop.load(broken)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    mpop.save(model, broken)
    _assert_equal(mpop.load(broken), model)
    assert [file.name for file in tmp_path.iterdir()] == [broken.name]


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a compressed model"):
        mpop.save(build("bert"), tmp_path / "dense")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: expected a folder"):
        mpop.save(_compressed("bert"), tmp_path / "file")
    with pytest.raises(ValueError, match="expected the name of a folder, got an empty one"):
        mpop.save(_compressed("bert"), "")


def test_a_new_head_is_allowed_where_another_class_is_asked_for(
    saved: Path, tmp_path: Path
) -> None:
    base = hf.AutoModel.from_pretrained(saved)
    mpop.save(base, tmp_path / "base")
    model, info = mpop.load(
        tmp_path / "base",
        hf.AutoModelForSequenceClassification,
        num_labels=3,
        output_loading_info=True,
    )
    assert model.classifier.out_features == 3
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"of another size.*classifier"):
        mpop.load(saved, num_labels=3)
    renewed = mpop.load(saved, num_labels=3, ignore_mismatched_sizes=True)
    assert renewed.classifier.out_features == 3
    # The pooler is part of the base model: a new one would be random where none is expected.
    mpop.save(_compressed("bert-mlm"), tmp_path / "mlm")
    with pytest.raises(ValueError, match=r"missing: .*pooler"):
        mpop.load(tmp_path / "mlm", hf.AutoModel)
    mpop.load(tmp_path / "mlm", hf.AutoModel, add_pooling_layer=False)


def test_where_files_lie(saved: Path, tmp_path: Path) -> None:
    expected = logits(mpop.load(saved))
    model = mpop.load(saved.parent, subfolder=saved.name)
    assert torch.equal(logits(model), expected)
    with pytest.raises(FileNotFoundError, match="other: expected a folder with a saved MPO"):
        mpop.load(saved.parent, subfolder="other")
    model.save_pretrained(tmp_path / "variant", variant="fp32")
    assert torch.equal(logits(mpop.load(tmp_path / "variant", variant="fp32")), expected)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        mpop.load(tmp_path / "variant")
    assert torch.equal(logits(mpop.load(saved, use_safetensors=True)), expected)
    # As the hub's files are kept.
    kept = tmp_path / "cache/models--user--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/v1").write_text("0123")
    shutil.copytree(saved, kept / "snapshots/0123/sub")
    where = {"cache_dir": tmp_path / "cache", "revision": "v1", "subfolder": "sub"}
    model = mpop.load("user/name", local_files_only=True, **where)
    assert torch.equal(logits(model), expected)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        mpop.load("user/name", local_files_only=True, **{**where, "revision": "v2"})


def test_a_dense_model_with_the_configuration_of_a_compressed_one(
    saved: Path, tmp_path: Path
) -> None:
    for config in (_compressed("bert").config, mpop.load(saved).config):
        model = hf.BertForSequenceClassification(config).eval()
        model.save_pretrained(tmp_path)
        loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path)
        assert not list(mpo_modules(loaded)) and not hasattr(loaded.config, "quantization_config")
        assert torch.equal(logits(loaded), logits(model))
        with pytest.raises(ValueError, match=r"got dense weights .* save them again"):
            mpop.load(tmp_path)
        loaded.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "quantization_config" not in text
        mpop.compress(loaded)
        mpop.save(loaded, tmp_path / "mpo")
        assert torch.equal(logits(mpop.load(tmp_path / "mpo")), logits(loaded))


def test_a_model_without_cores_any_more_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    model = _compressed("bert", include=["*.query"])
    for name, module in list(mpo_modules(model)):
        model.set_submodule(name, module.to_linear())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_saved_whatever_the_layout_of_its_tensors(tmp_path: Path) -> None:
    model = _compressed("gpt2-lm")
    mpop.balance(model)
    mpop.save(model, tmp_path / "balanced")
    _assert_equal(mpop.load(tmp_path / "balanced"), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.t() if parameter.dim() < 3 else parameter.transpose(1, 2)
            parameter.data = parameter.contiguous().transpose(
                *((0, -1), (1, 2))[parameter.dim() > 2]
            )
    mpop.save(model, tmp_path / "strided")
    _assert_equal(mpop.load(tmp_path / "strided"), model)


def test_configuration_in_json(saved: Path) -> None:
    text = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert text["quant_method"] == "mpo" and text["version"] == FORMAT_VERSION
    config = mpop.MPOConfig.from_dict(text)
    assert config.to_dict() == text
    model = mpop.load(saved)
    assert {name: spec.shape for name, spec in config.specs().items()} == {
        name: module.shape for name, module in mpo_modules(model)
    }
