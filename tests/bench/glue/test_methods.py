"""Every method of the table, and the tables of fits and gradients, on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glue import save_bert, write_glue

import mpop
from bench.glue import fit, gradient, methods, times
from mpo_kernels import MPOShape, decompose
from mpo_kernels.cores.chain import merge_cores
from mpo_kernels.cores.gauge import balanced
from mpop.checkpoints.opening import load_as_saved
from mpop.data.glue import get_task
from mpop.finetuning.classifier import load_for_training
from mpop.models.matrices import mpo_modules


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), train=160, dev=24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# One share, with a table, stands for all of its kind.
_ALIKE = {f"{kind}-{name}" for kind in ("light", "lora") for name in (*methods.SHARES, "10-words")}


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in _ALIKE])
def test_a_run_of_each(
    method: str, glue: Path, encoder: Path, cache: Path, tmp_path: Path, capsys: Any
) -> None:
    options = {
        "method": method,
        "task": "sst2",
        "model": str(encoder),
        "data_dir": str(glue),
        "cache": str(cache),
        "output": str(tmp_path / "model"),
        "keep": str(tmp_path / "kept.pt"),
        "seed": 0,
        "eval_split": "dev",
        "learning_rate": 1e-3,
        "mpo_learning_rate": 1e-3,
        "epochs": 1.0,
        "max_train_samples": None,
        "batch_size": 16,
        "max_length": 16,
        "precision": "fp32",
    }
    capsys.readouterr()
    methods.main([json.dumps(options)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense = sum(p.numel() for p in load_as_saved(encoder).parameters()) + 2 * 33
    trained, total = result["trainable_parameters"], result["total_parameters"]
    assert 0 <= result["value"] <= 1 and result["disk_bytes"] > 10_000
    assert result["eval_samples"] == 24
    costs = times.measure(torch.load(tmp_path / "kept.pt", weights_only=False), torch.bfloat16)
    assert 0 < costs["latency_seconds"] < costs["step_seconds"]
    if method.startswith(("light", "lora")) or method in ("biases", "squeezed", "chosen-light"):
        assert trained < 0.65 * total
    else:
        assert trained == total
    encoder_weights = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32
    if method in ("svd", "aware-svd", "dir", "chosen", "chosen-light"):
        assert 0.4 * encoder_weights < dense - total < 0.62 * encoder_weights
    if method.endswith("-quarter"):
        assert 0.7 * encoder_weights < dense - total < 0.85 * encoder_weights
    if method == "dense":
        assert total == dense
    if method == "squeezed":
        assert result["rounds"]
        loaded = mpop.load(tmp_path / "model")
        assert mpop.count_parameters(loaded).total == total


def test_lora_trains_as_many_as_light_fine_tuning(encoder: Path) -> None:
    models = []
    for prepare, compress in ((methods.METHODS["lora"].prepare, False), (None, True)):
        model = load_for_training(
            encoder,
            get_task("sst2"),
            "light" if compress else "dense",
            mpop.CompressionConfig(embeddings=False) if compress else None,
        )
        models.append(model if prepare is None else prepare(model))
    adapters = [p for n, p in models[0].named_parameters() if p.requires_grad and "lora" in n]
    cores = [p for n, p in models[1].named_parameters() if p.requires_grad and "cores" in n]
    lora, light = (sum(p.numel() for p in tensors) for tensors in (adapters, cores))
    assert lora == pytest.approx(light, rel=0.1)


def test_the_table_of_fits(glue: Path, encoder: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--output", str(tmp_path), "--data-dir", str(glue), "--model", str(encoder)]
    fit.main([*options, "--samples", "96", "--test-samples", "64"])
    found = json.loads((tmp_path / "fit.json").read_text())
    assert len(found["matrices"]) == 13
    ratios = found["ratio_to_svd"]
    assert ratios["SVD"] == 1 and ratios["aware SVD"] < 1 and ratios["chosen"] < 1
    assert set(found["last_hidden_error"]) == {
        *fit.FITS,
        "chosen, ranks allocated",
        "aware SVD, ranks allocated",
    }
    text = (tmp_path / "fit.md").read_text()
    assert "mean ratio to SVD" in text and str(tmp_path) not in text
    assert torch.isfinite(torch.tensor(list(found["last_hidden_error"].values()))).all()


@pytest.mark.parametrize(("in_features", "out_features"), [(12, 18), (10, 13)])
def test_what_auxiliary_tensors_can_follow(in_features: int, out_features: int) -> None:
    shape = MPOShape(*((2, 3, 2), (3, 2, 3)), in_features=in_features, out_features=out_features)
    weight, whole = torch.randn(2, out_features, in_features, dtype=torch.float64)
    cores, central = decompose(weight, shape).cores, shape.central

    def matrix(*trained: torch.Tensor) -> torch.Tensor:
        chain = [*trained[:central], cores[central], *trained[central:]]
        return merge_cores(chain)[0, :in_features, :out_features, 0].t()

    trained = tuple(core for k, core in enumerate(cores) if k != central)
    jacobian = torch.autograd.functional.jacobian(matrix, trained)
    moves = torch.cat([part.reshape(weight.numel(), -1) for part in jacobian], dim=1)
    basis, sizes, _ = torch.linalg.svd(moves, full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes[0]]
    share = (basis.T @ whole.reshape(-1)).square().sum() / whole.square().sum()
    found = gradient.followed(whole, weight, shape)
    assert 0 < found < 1 and found == pytest.approx(float(share), abs=1e-6)


def test_the_table_of_gradients(glue: Path, encoder: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--output", str(tmp_path), "--data-dir", str(glue), "--model", str(encoder)]
    gradient.main([*options, "--task", "sst2", "--steps", "2"])
    found = json.loads((tmp_path / "gradient.json").read_text())
    assert len(found["matrices"]) == 13 and found["rows"] == 16
    for row in found["matrices"].values():
        assert 0 < row["light"] < 1 and 0 < row["drawn"] < row["best"] <= 1 + 1e-9
    text = (tmp_path / "gradient.md").read_text()
    assert "light fine-tuning" in text and str(tmp_path) not in text


def test_two_runs_that_make_the_same_model_at_once_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "model").write_text(text)

    def late(folder: Path) -> None:
        monkeypatch.setattr("os.getpid", lambda: 2)
        methods._made_once(tmp_path, "model", "the same", lambda other: write(other, "other"))
        write(folder, "ours")

    monkeypatch.setattr("os.getpid", lambda: 1)
    found = methods._made_once(tmp_path, "model", "the same", late)
    assert (found / "model").read_text() == "other"
    assert list(tmp_path.iterdir()) == [found]


def test_light_fine_tuning_of_the_encoder_begins_balanced(encoder: Path) -> None:
    model = load_as_saved(encoder)
    methods.METHODS["light-encoder"].compress(model, None)
    for _, module in mpo_modules(model):
        again = balanced(list(module.cores), module.central)
        for core, same in zip(module.cores, again, strict=True):
            torch.testing.assert_close(core.detach().norm(), same.norm())
