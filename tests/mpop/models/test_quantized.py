"""Linears in int8 or e4m3: the bytes that are saved are loaded, and nothing changes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from saved import edit_config, edit_tensors
from tiny_glue import last_json
from tiny_models import BUILDERS, batches, build, logits
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import mpop
import mpop.peft
from mpo_kernels import MPOLinear, MPOShape, QuantizedMPOLinear
from mpop.checkpoints.opening import load_as_saved
from mpop.cli import main
from mpop.cli.compress import STORES as CHOICES
from mpop.models.config import STORES
from mpop.models.left import left_dense
from mpop.models.light import count_bytes
from mpop.models.matrices import mpo_modules

DTYPES = list(STORES.values())
# A byte a number instead of four, and four for each bond: of these small matrices that is a tenth.
SHARE = 0.3
QUERY = "bert.encoder.layer.0.attention.self.query"


def compressed(name: str, **options: Any) -> PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**options))
    return model


def held_in_bytes(model: nn.Module) -> dict[str, QuantizedMPOLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedMPOLinear)}


def bytes_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if "_core_" in key or ".scale_" in key}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded_they_are_the_same_bytes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = compressed(name)
    floating, count = logits(model), mpop.count_parameters(model)
    mpop.save(model, tmp_path / "floating")
    linears = [n for n, module in mpo_modules(model) if type(module) is MPOLinear]
    dense = sum(part.parameters for part in left_dense(model))
    memory = mpop.quantize(model, dtype)
    assert sum(part.parameters for part in left_dense(model)) == dense
    assert list(held_in_bytes(model)) == linears
    assert memory.after < SHARE * memory.before
    expected = logits(model)
    # Rounding a number of e4m3 loses up to 1/16 of it, of int8 1/254 of the largest of its slice.
    assert 0 < error(expected, floating) < (0.05 if dtype == torch.int8 else 0.2)
    mpop.save(model, tmp_path / "bytes")
    loaded = mpop.load(tmp_path / "bytes", type(model)).eval()
    assert torch.equal(logits(loaded), expected)
    assert mpop.count_parameters(loaded).total == mpop.count_parameters(model).total == count.total
    files = [tmp_path / folder / "model.safetensors" for folder in ("floating", "bytes")]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert sizes[0] - sizes[1] == memory.before - memory.after
    assert files[1].stat().st_size < files[0].stat().st_size
    entries = [_entries(file.parent) for file in files]
    assert [entries[1][name].pop("store") for name in linears] == [str(dtype)[6:]] * len(linears)
    assert entries[0] == entries[1]


def _entries(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]["modules"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "llama-tied"])
def test_transformers_loads_them_in_any_precision(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = compressed(name)
    mpop.quantize(model, dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    held = bytes_in({key: tensor for file in files for key, tensor in load_file(file).items()})
    for precision in (torch.float32, torch.bfloat16):
        loaded = type(model).from_pretrained(tmp_path, dtype=precision)
        for state in (loaded.state_dict(), loaded.half().float().state_dict()):
            found = bytes_in(state)
            assert found.keys() == held.keys()
            assert all(found[key].dtype == held[key].dtype for key in held)
            assert all(torch.equal(found[key], held[key]) for key in held)
    assert {tensor.dtype for tensor in held.values()} == {torch.int8, torch.float32}
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_some_in_int8_some_in_e4m3_and_the_others_in_16_bits(tmp_path: Path) -> None:
    model = compressed("bert").bfloat16()
    mpop.quantize(model, torch.int8, ["*.query", "*.key"])
    mpop.quantize(model, torch.float8_e4m3fn, ["*.intermediate.dense"])
    dtypes = {name: module.dtype for name, module in held_in_bytes(model).items()}
    assert {name.split(".")[-1]: dtype for name, dtype in dtypes.items()} == {
        "query": torch.int8,
        "key": torch.int8,
        "dense": torch.float8_e4m3fn,
    }
    assert len(dtypes) == 6
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(loaded), logits(model))
    value = QUERY.replace("query", "value")
    assert {core.dtype for core in loaded.get_submodule(value).cores} == {torch.bfloat16}
    card = (tmp_path / "README.md").read_text()
    assert "4 of the matrices have cores in int8" in card
    assert "2 of the matrices have cores in float8_e4m3fn" in card


def test_a_layer_that_lay_otherwise_is_saved(tmp_path: Path) -> None:
    model = compressed("bert")
    query = model.get_submodule(QUERY)
    for core in query.cores:
        core.data = core.data.transpose(1, 2).contiguous().transpose(1, 2)
    mpop.quantize(model)
    assert not all(tensor.is_contiguous() for tensor in bytes_in(model.state_dict()).values())
    mpop.save(model, tmp_path)
    assert torch.equal(logits(mpop.load(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("name", ["bert", "gpt2-lm"])
def test_merged_they_are_dense(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    mpop.quantize(model)
    mpop.save(model, tmp_path / "bytes")
    merged = mpop.merge(mpop.load(tmp_path / "bytes").eval())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "dense")
    dense = type(build(name)).from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(logits(dense), logits(merged))
    assert dense.state_dict().keys() == build(name).state_dict().keys()


def test_bytes_are_counted_as_they_are_saved(tmp_path: Path) -> None:
    for quantised in (False, True):
        model = compressed("llama-tied")
        if quantised:
            mpop.quantize(model)
        mpop.save(model, tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
        matrices = [
            n for key, n in sizes.items() if "_core_" in key or ".scale_" in key or ".cores." in key
        ]
        assert count_bytes(model) == (sum(matrices), sum(sizes.values()))
        line = f"The matrices take {sum(matrices):,} bytes, the model {sum(sizes.values()):,}."
        assert line in (tmp_path / "README.md").read_text()
    model = compressed("bert")
    before = count_bytes(model)
    mpop.quantize_centres(model, 4)
    assert count_bytes(model) == before  # they are saved as plain cores


def test_the_command(bert: Path, tmp_path: Path, capsys: Any) -> None:
    assert set(CHOICES) == set(STORES)
    command = ["compress", "--model", str(bert), "--compression", "0.5"]
    found = {}
    for store in (None, *CHOICES):
        output = tmp_path / str(store)
        chosen = [] if store is None else ["--store", store]
        capsys.readouterr()
        assert main([*command, "--output", str(output), *chosen, "--json"]) == 0
        found[store] = last_json(capsys.readouterr().out)
        loaded = mpop.load(output)
        assert found[store]["store"] == store
        assert (found[store]["matrix_bytes"], found[store]["bytes_after"]) == count_bytes(loaded)
        assert bool(held_in_bytes(loaded)) == (store is not None)
        words = loaded.get_input_embeddings()
        assert {core.dtype for core in words.cores} == {torch.float32}
    dense = count_bytes(load_as_saved(bert)).total
    assert found["int8"]["bytes_after"] < found[None]["bytes_after"] < dense
    again = [*command, "--output", str(tmp_path / "again"), "--store", "int8"]
    assert main(again) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("its bytes"))
    now = found["int8"]["bytes_after"]
    assert line.split()[2:] == [f"{dense:,}", f"{now:,}", f"{now / dense:.3f}"]


def test_commands_evaluate_it_and_do_not_train_it(
    data: Path, bert: Path, tmp_path: Path, capsys: Any
) -> None:
    options = ["--task", "sst2", "--data-dir", str(data), "--max-length", "16"]
    tuned, output = tmp_path / "tuned", tmp_path / "output"
    train = ["finetune", *options, "--epochs", "1"]
    assert main([*train, "--model", str(bert), "--output", str(tuned), "--method", "light"]) == 0
    model = mpop.load(tuned)
    mpop.quantize(model)
    mpop.save(model, tuned)
    assert main(["evaluate", "--model", str(tuned), *options]) == 0
    for method in ("full", "light"):
        capsys.readouterr()
        assert (
            main([*train, "--model", str(tuned), "--output", str(output), "--method", method]) == 2
        )
        line = capsys.readouterr().err.splitlines()[-1]
        assert "query: expected cores of 16 bits or more, got int8" in line
        assert not output.exists()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: mpop.unfreeze(model),
    "train lightly": lambda model: mpop.freeze_central(model),
    "balance": mpop.balance,
    "squeeze": lambda model: mpop.squeeze(
        model, evaluate=lambda: 1.0, finetune=None, max_drop=0.1, calibration=batches()
    ),
    "compress": mpop.compress,
    "quantise centres": mpop.quantize_centres,
    "adapt": lambda model: get_peft_model(model, mpop.peft.LightConfig()),
    "adapt by LoRA": lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "inspect": mpop.inspect_model,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_cores_is_refused(change: str) -> None:
    model = compressed("bert")
    mpop.quantize(model, torch.float8_e4m3fn, ["*.0.*.query", "*.value"])
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    with pytest.raises(
        ValueError,
        match=rf"{QUERY}: expected cores of 16 bits .*, got float8_e4m3fn, .* before mpop.quantize",
    ):
        CHANGES[change](model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_what_cannot_be_quantised_is_refused_and_left() -> None:
    with pytest.raises(ValueError, match="expected a compressed model, got a dense Bert"):
        mpop.quantize(build("bert"))
    model = compressed("bert")
    for dtype in (torch.int4, torch.float16, "int8"):
        with pytest.raises(ValueError, match=r"dtype: expected torch.int8 or .*, got "):
            mpop.quantize(model, dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"include: .* got '\*\.words', which fits none of 13"):
        mpop.quantize(model, include=["*.query", "*.words"])
    with pytest.raises(ValueError, match=r"include: .* got '\*\.word_embeddings', which fits none"):
        mpop.quantize(model, include=["*.word_embeddings"])
    with pytest.raises(TypeError, match="include: expected a sequence"):
        mpop.quantize(model, include="*.query")
    key = QUERY.replace("query", "key")
    kept = model.get_submodule(key).cores[1].data.clone()
    model.get_submodule(key).cores[1].data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=rf"{key}: .*NaN or Inf in core 1: leave it out"):
        mpop.quantize(model)
    assert not held_in_bytes(model)
    model.get_submodule(key).cores[1].data.copy_(kept)
    mpop.quantize(model, include=["*.key"])
    with pytest.raises(ValueError, match=rf"{key}: expected an MPO linear, got one in torch.int8"):
        mpop.quantize(model)
    assert len(held_in_bytes(model)) == 2
    other = compressed("bert")
    other.set_submodule(key, MPOLinear(24, 24, MPOShape((24,), (24,))))
    with pytest.raises(ValueError, match=rf"{key}: expected a layer of two cores or more, got one"):
        mpop.quantize(other)
    assert not held_in_bytes(other)
    other = compressed("bert")
    mpop.quantize_centres(other)
    with pytest.raises(ValueError, match=r"call mpop\.dequantize_centres"):
        mpop.quantize(other)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a scale is missing": (
        lambda path: edit_tensors(path, lambda state: state.pop(f"{QUERY}.scale_1")),
        r"query\.scale_1: missing from the checkpoint",
    ),
    "bytes of another kind": (
        lambda path: edit_config(path, lambda c: _entry(c).update(store="float8_e4m3fn")),
        r"query\.float8_e4m3fn_core_0: missing from the checkpoint",
    ),
    "no bytes": (
        lambda path: edit_config(path, lambda c: _entry(c).pop("store")),
        r"query\.cores\.0: missing from the checkpoint",
    ),
    "a core of another size": (
        lambda path: edit_tensors(
            path,
            lambda state: state.update({f"{QUERY}.int8_core_1": torch.ones(2, 2, 2, 2).char()}),
        ),
        r"query\.int8_core_1: expected .* got \[2, 2, 2, 2\] in the file",
    ),
    "a core too many": (
        lambda path: edit_tensors(
            path, lambda state: state.update({f"{QUERY}.int8_core_5": torch.ones(1).char()})
        ),
        "expected 5 cores by the configuration, got more",
    ),
    "an unknown store": (
        lambda path: edit_config(path, lambda c: _entry(c).update(store="int4")),
        r"query': store: expected one of .*'int4'",
    ),
    "a frozen one": (
        lambda path: edit_config(path, lambda c: _entry(c).update(frozen=True)),
        r"query': store: expected .* frozen: True",
    ),
}


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["modules"][QUERY]


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_checkpoint(case: str, tmp_path: Path) -> None:
    model = compressed("bert")
    mpop.quantize(model)
    mpop.save(model, tmp_path)
    spoil, message = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        mpop.load(tmp_path)


def test_the_base_model_alone(tmp_path: Path) -> None:
    """Whose modules have other names than in the file."""
    model = compressed("bert")
    mpop.quantize(model)
    mpop.save(model, tmp_path)
    base = mpop.load(tmp_path, AutoModel)
    found, held = bytes_in(base.state_dict()), bytes_in(model.state_dict())
    assert {f"bert.{key}" for key in found} == held.keys()
    assert all(torch.equal(tensor, held[f"bert.{key}"]) for key, tensor in found.items())


def test_weights_beside_the_bytes_are_not_taken_for_them(tmp_path: Path) -> None:
    model = compressed("bert", embeddings=False)
    mpop.quantize(model)
    mpop.save(model, tmp_path)
    weights = {
        f"{name}.weight": torch.zeros(m.weight.shape) for name, m in held_in_bytes(model).items()
    }
    edit_tensors(tmp_path, lambda state: state.update(weights))
    with pytest.raises(ValueError, match="tensors are unexpected"):
        mpop.load(tmp_path)
    assert len(held_in_bytes(mpop.load(tmp_path, AutoModel))) == len(weights)


def test_a_head_apart_from_its_words_is_loaded_apart(tmp_path: Path) -> None:
    """Though the configuration ties it."""
    model = build("t5")
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())
    mpop.compress(model, mpop.CompressionConfig(include=["*.SelfAttention.q", "shared", "lm_head"]))
    mpop.quantize(model)
    assert "lm_head" in held_in_bytes(model)
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
