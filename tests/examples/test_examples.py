"""Each example trains, and has the property that it is named for."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch

from examples.mpo_adapter import MPOAdapter
from examples.mpo_experts import Mixture
from examples.over_parameterised import widened
from examples.problem import loss_of, teacher, train
from examples.shared_centre import share_centre, stack
from mpo_kernels import MPOLinear, MPOShape

SCRIPTS = sorted(
    file.stem
    for file in Path(importlib.import_module("examples").__path__[0]).glob("*.py")
    if file.stem not in ("__init__", "problem")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_lowers_the_loss(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    importlib.import_module(f"examples.{name}").main()
    before, after = map(
        float, re.search(r"loss (\S+) -> ([\d.]+)", capsys.readouterr().out).groups()
    )
    assert after < 0.6 * before


def test_an_adapter_starts_as_nothing_and_merges() -> None:
    target, model = teacher(), teacher(seed=5)
    x, exact = torch.randn(3, 64), copy.deepcopy(model)
    model[0] = MPOAdapter(model[0], rank=4)
    assert torch.equal(model(x), exact(x))
    weight = model[0].linear.weight.clone()
    train(model, target, [p for p in model.parameters() if p.requires_grad], steps=5)
    assert torch.equal(model[0].linear.weight, weight)
    torch.testing.assert_close(model[0].merged()(x), model[0](x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), exact(x))


def test_experts_hold_one_centre_and_all_train_it() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64)
    experts = Mixture(linear, experts=3)
    cores = experts.experts.cores
    assert [core.dim() for core in cores] == [5, 4, 5]
    x = torch.randn(4, 64)
    y, gate = experts(x), experts.gate(x).softmax(-1)
    right = torch.stack([x @ weight.t() for weight in experts.experts.to_weight()], 1) + linear.bias
    torch.testing.assert_close(y, (right * gate[..., None]).sum(1))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in experts.parameters())
    alone = 3 * MPOLinear.from_linear(linear, MPOShape.balanced(64, 64, 3)).shape.num_parameters
    assert sum(core.numel() for core in cores) < 0.6 * alone


def test_layers_hold_one_centre() -> None:
    model = stack(depth=3)
    layers = list(model)[::2]
    assert len({id(layer.cores[layer.central]) for layer in layers}) == 1
    layers[0].freeze_central()
    assert not layers[2].cores[layers[2].central].requires_grad
    with pytest.raises(ValueError, match="expected layers of one shape"):
        share_centre([MPOLinear(8, 8, MPOShape((2, 4), (4, 2), r)) for r in (2, 3)])


def test_a_chain_is_exact_before_and_after() -> None:
    target, model = teacher(), teacher(seed=5)
    x, exact = torch.randn(3, 64), copy.deepcopy(model)
    model[0] = widened(model[0])
    assert sum(p.numel() for p in model[0].parameters()) > 64 * 65
    torch.testing.assert_close(model(x), exact(x), rtol=1e-4, atol=1e-5)
    train(model, target, model[0].parameters(), steps=20, rate=1e-3)
    after = loss_of(model, target)
    assert after < loss_of(exact, target)
    model[0] = model[0].to_linear()
    assert loss_of(model, target) == pytest.approx(after, rel=1e-3)
