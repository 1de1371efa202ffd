"""Models whose checkpoints name, fuse or stack their tensors otherwise than their modules do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from saved import edit_config
from transformers.core_model_loading import revert_weight_conversion

import mpop
from mpo_kernels import MPOShape, decompose
from mpop.checkpoints.quantizer import attach
from mpop.models.config import INTERPOLATIVE
from mpop.models.matrices import dense_matrices, module_at, weight_of
from mpop.models.selection import select
from mpop.models.swapping import replace as hold

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
_IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
_TOWER = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}


def _qwen() -> hf.PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**_TEXT, "num_key_value_heads": 1, "rope_parameters": rope}
    tokens = {"image_token_id": 5, "video_token_id": 6}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=_TOWER, **tokens)
    return hf.Qwen2VLForConditionalGeneration(config)


def _mixtral() -> hf.PreTrainedModel:
    config = hf.MixtralConfig(**_TEXT, num_key_value_heads=1, num_local_experts=3)
    return hf.MixtralForCausalLM(config)


BUILDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    # renamed; in a file of a model with a head and of one without
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_IMAGES)),
    # queries, keys and values are one tensor of the file; of the second, their biases are too
    "gte": lambda: hf.GteForMaskedLM(hf.GteConfig(**_TEXT)),
    "jina": lambda: hf.JinaEmbeddingsV3ForMaskedLM(hf.JinaEmbeddingsV3Config(**_TEXT)),
    # experts are several, and one of the model
    "mixtral": _mixtral,
    # renamed by a rule of a part of the model
    "qwen2-vl": _qwen,
}


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return BUILDERS[name]()


def part_of(model: hf.PreTrainedModel) -> mpop.CompressionConfig:
    """Half of the matrices, so that some are fused with dense ones in a file."""
    names = [names[0] for names in dense_matrices(model)]
    chosen = random.Random(2).sample(names, len(names) // 2)
    return mpop.CompressionConfig(num_cores=3, include=chosen)


def assert_equal(model: hf.PreTrainedModel, other: hf.PreTrainedModel, **bound: Any) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(bound or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded(name: str, whole: bool, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    mpop.compress(model, mpop.CompressionConfig(num_cores=3) if whole else part_of(model))
    mpop.save(model, tmp_path / "mpo")
    loaded = mpop.load(tmp_path / "mpo")
    assert_equal(loaded, model)
    # What was loaded is saved as what was made.
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_equal(type(model).from_pretrained(tmp_path / "shards"), model)
    loaded.save_pretrained(tmp_path / "modules", save_original_format=False)
    assert_equal(mpop.load(tmp_path / "modules"), model)
    if whole:  # what stays dense has the names that others look for
        dense, mpo = (load_file(tmp_path / each / "model.safetensors") for each in ("dense", "mpo"))
        assert all(key in dense or ".cores." in key for key in mpo)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded_in_bytes(name: str, whole: bool, tmp_path: Path) -> None:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(num_cores=3) if whole else part_of(model))
    mpop.quantize(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_equal(mpop.load(tmp_path), model)


@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded_in_interpolative_form(name: str, tmp_path: Path) -> None:
    model = build(name)
    for names in select(model, replace(part_of(model), embeddings=False)):
        weight = weight_of(module_at(model, names[0])).detach()
        if weight.dim() == 3:  # of experts
            continue
        shape = MPOShape.low_rank(weight.shape[1], weight.shape[0], 5)
        hold(model, names, decompose(weight, shape), INTERPOLATIVE)
    attach(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_equal(mpop.load(tmp_path), model)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_compressed_while_loading(name: str, whole: bool, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    config = mpop.CompressionConfig(num_cores=3) if whole else part_of(model)
    loaded = type(model).from_pretrained(
        tmp_path, quantization_config=mpop.MPOConfig(compress=config)
    )
    mpop.compress(model, config)
    assert_equal(loaded, model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_base_model_of_a_headed_checkpoint_and_the_other_way(name: str, tmp_path: Path) -> None:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.save(model, tmp_path / "headed")
    base = type(model.base_model).from_pretrained(tmp_path / "headed")
    base.save_pretrained(tmp_path / "base")
    headed = type(model).from_pretrained(tmp_path / "base")
    for part in (base, headed.base_model):
        expected, found = model.base_model.state_dict(), part.state_dict()
        assert expected.keys() == {key for key in found if not key.startswith("pooler.")}
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_the_dense_checkpoint_when_merged(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    mpop.compress(model, part_of(model))
    mpop.save(model, tmp_path / "mpo")
    mpop.merge(mpop.load(tmp_path / "mpo")).save_pretrained(tmp_path / "merged")
    files = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "dense"))
    found, expected = files
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_before_its_modules_were_renamed(tmp_path: Path) -> None:
    model = build("vit")
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.save(model, tmp_path)
    modules = model.config.quantization_config.modules
    names = {f"{name}.cores.0": torch.tensor(k) for k, name in enumerate(modules)}
    old = revert_weight_conversion(model, names)
    entries = {int(k): key.removesuffix(".cores.0") for key, k in old.items()}
    assert "vit.encoder.layer.0.attention.attention.query" in entries.values()
    edit_config(
        tmp_path,
        lambda config: config["quantization_config"].update(
            modules={entries[k]: entry for k, entry in enumerate(modules.values())}
        ),
    )
    assert_equal(mpop.load(tmp_path), model)


def test_a_key_mapping_of_the_callers(tmp_path: Path) -> None:
    model = build("gte")
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"theirs.{key}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cores\.0: missing from the checkpoint"):
        mpop.load(tmp_path)
    assert_equal(mpop.load(tmp_path, key_mapping={r"^theirs\.": ""}), model)


def test_a_state_in_place_of_files(tmp_path: Path) -> None:
    model = build("gte")
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.save(model, tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    state = model.state_dict()  # a head that is tied is there as well
    loaded = type(model).from_pretrained(None, config=config, state_dict=state)
    assert_equal(loaded, model)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_a_core_of_a_renamed_module_is_checked(tmp_path: Path) -> None:
    model = build("vit")
    mpop.compress(model, mpop.CompressionConfig(num_cores=3))
    mpop.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("cores.1"))
    save_file(tensors | {key: torch.zeros(2, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cores\.1: expected .* by the configuration, got \[2, 3"):
        mpop.load(tmp_path)
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cores\.1: missing from the checkpoint"):
        mpop.load(tmp_path)
