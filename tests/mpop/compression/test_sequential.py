"""Two streams through a model, and what is fitted to them, against the models themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import batches, build
from torch import Tensor, nn

import mpop
from mpo_kernels import MPOShape, decompose
from mpo_kernels.cores.stack import reconstruct_stack
from mpop.compression import sequential
from mpop.compression.calibration import Moments, second_moments
from mpop.compression.sequential import Inputs, Streams, in_sequence
from mpop.models.matrices import dense_matrices, is_embedding, module_at, turned, weight_of

# The second block's matrices of which one's inputs are looked at, and what is before it.
BEFORE = {
    "bert": "bert.encoder.layer.1.attention.self.value bert.encoder.layer.1.attention.output.dense",
    "llama": "model.layers.1.mlp.gate_proj",
    "gpt2": "transformer.h.1.attn.c_attn",
}
CHAINS = {
    "bert": "bert.encoder.layer.1.intermediate.dense",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.down_proj",
    "llama-tied": "model.layers.1.self_attn.q_proj",
    "mixtral": "model.layers.1.self_attn.o_proj",
}


STAGES = {
    "bert": [3, 1, 1, 1],
    "gpt2": [1, 1, 1, 1],
    "llama": [3, 1, 2, 1],
    "llama-tied": [3, 1, 2, 1],
    "mixtral": [2, 3, 1],
}


def rows_of(model: Any, name: str, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """What a module is fed, by batch, where no padding is."""
    seen: list[Tensor] = []
    handle = module_at(model, name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    return [x[mask] for x, mask in zip(seen, masks, strict=True)]


class TestInputs:
    def made(self, noise: float) -> tuple[Inputs, list[Tensor], list[Tensor], Moments]:
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(7, 7, generator=generator, dtype=torch.float64) / 3
        xs, cuts = [], []
        for _ in range(8):
            x = torch.randn(400, 7, generator=generator, dtype=torch.float64) @ mixing
            other = torch.randn(400, 7, generator=generator, dtype=torch.float64)
            xs.append(x)
            cuts.append(x @ (torch.eye(7) + 0.3 * mixing).double() + noise * other)
        inputs = Inputs(7, torch.device("cpu"))
        for number, (x, cut) in enumerate(zip(xs, cuts, strict=True)):
            inputs.add(x.float(), cut.float(), number % 4 == 1)
        gradients = torch.randn(5, 5, generator=generator)
        empty = torch.zeros(0)
        moments = inputs.moments(Moments(empty, empty, 0, 1.0, gradients @ gradients.t()))
        assert moments is not None
        return inputs, xs, cuts, moments

    def test_the_target_gives_what_the_weight_gave(self) -> None:
        inputs, xs, cuts, moments = self.made(0.0)
        weight = torch.randn(5, 7)
        target = inputs.target(weight, moments)
        x, cut = torch.cat(xs).float(), torch.cat(cuts).float()
        before = torch.linalg.norm(x @ weight.t() - cut @ weight.t())
        # What the ridge leaves of what can be undone exactly.
        assert torch.linalg.norm(x @ weight.t() - cut @ target.t()) < 0.1 * before
        best = torch.linalg.lstsq(cut.double(), x.double() @ weight.double().t()).solution.t()
        assert torch.linalg.norm(target - best) < 0.3 * torch.linalg.norm(weight - best)

    def test_errors_are_those_of_the_rows_to_judge_by(self) -> None:
        inputs, xs, cuts, _ = self.made(0.3)
        weight, made = torch.randn(5, 7), torch.randn(5, 7)
        x, cut = (torch.cat([side[1], side[5]]) for side in (xs, cuts))
        found = inputs.errors(weight, made)
        whole = torch.linalg.norm(x @ weight.double().t())
        lost = torch.linalg.norm(x @ weight.double().t() - cut @ made.double().t())
        assert found.output == pytest.approx(float(lost / whole), rel=1e-4)
        own = torch.linalg.norm(weight - made) / torch.linalg.norm(weight)
        assert found.weight == pytest.approx(float(own), rel=1e-5)

    def test_errors_below_the_rounding_of_the_sums(self) -> None:
        inputs = Inputs(7, torch.device("cpu"))
        x, change = torch.randn(400, 7), 1e-5 * torch.randn(400, 7)
        inputs.add(x, x + change, True)
        weight = torch.randn(5, 7, dtype=torch.float64)
        made = weight + 1e-5 * torch.randn(5, 7)
        whole, cut = x.double() @ weight.t(), (x + change).double() @ made.t()
        expected = torch.linalg.norm(whole - cut) / torch.linalg.norm(whole)
        assert inputs.errors(weight, made).output == pytest.approx(float(expected), rel=0.01)

    def test_what_rows_held_out_do_not_bear_out_is_left(self) -> None:
        inputs, _, _, moments = self.made(0.3)
        weight = torch.randn(5, 7)
        assert not torch.equal(inputs.target(weight, moments), weight)
        inputs._cross[1].neg_()  # the other way there
        torch.testing.assert_close(inputs.target(weight, moments), weight)


@pytest.mark.parametrize("name", CHAINS)
def test_the_streams_are_two_models(name: str) -> None:
    """Sums of what a matrix of the second block is fed, in fp64 by hooks of whole models."""
    model, data = build(name), batches()
    model = model if name == "mixtral" else model.double()  # experts have no product in fp64
    streams = Streams.through(model, data)
    assert streams is not None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = copy.deepcopy(model).eval()
    matrices = [
        n for n in dense_matrices(model) if "layer" in n[0] or "h." in n[0] or "emb" in n[0]
    ]
    for names in matrices:
        block, module = streams.block_of(names), module_at(model, names[0])
        assert (block is None) == is_embedding(module)
        weight = weight_of(module).detach()
        # What comes after in the same block is dense in both.
        if weight.dim() == 3 or (block == 1 and names[0] not in BEFORE.get(name, "")):
            continue
        found = decompose(weight, MPOShape.low_rank(*weight.t().shape, 5))
        streams.hold(names, found)
        made = reconstruct_stack(found.cores, found.shape)
        module_at(cut, names[0]).weight.data = turned(module, made).contiguous()
    wanted = CHAINS[name]
    within = [n for n in matrices if streams.block_of(n) == 1]
    stages = streams.stages(1, within)
    assert sorted(n for _, stage in stages for n in stage) == sorted(within)
    assert [len(stage) for _, stage in stages] == STAGES[name]
    inputs = streams.inputs(wanted)
    dense, reduced = (rows_of(each.eval(), wanted, data) for each in (model, cut))
    for which in (0, 1):
        chosen = [n for n in range(len(data)) if (n % 4 == 1) == bool(which)]
        x, y = (torch.cat([side[n] for n in chosen]) for side in (dense, reduced))
        for found, expected in (
            (inputs._cut[which], y.t() @ y),
            (inputs._cross[which], (x - y).t() @ y),
            (inputs._lacking[which], (x - y).t() @ (x - y) * which),
        ):
            torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_that_are_no_chain_are_fitted_as_they_are() -> None:
    model, data = build("albert"), batches()
    assert Streams.through(model, data) is None
    config = mpop.CompressionConfig(compression=0.5, factors="auto", embeddings=False)
    report = mpop.compress(model, config, data)
    assert report.rows and all(row.output_error is not None for row in report.rows)


def test_what_is_written_to_between_blocks_is_no_chain() -> None:
    model, data = build("llama"), batches()
    assert Streams.through(model, data) is not None
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: args[0].add_(0.1) * 0)
    assert Streams.through(model, data) is None
    handle.remove()
    assert Streams.through(model, data) is not None


@pytest.mark.parametrize("error", [None, KeyError("what the block before leaves")])
def test_blocks_that_need_more_of_the_others_are_no_chain(error: Exception | None) -> None:
    """As where keys and values are shared: told by running each alone."""
    model, data, left = build("llama"), batches(), []
    first, second = model.model.layers
    whole = second.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not left and error is not None:
            raise error
        return whole(x, *args, **kwargs) + (left.pop() if left else 0)

    model.register_forward_pre_hook(lambda *_: left.clear())  # of each call its own
    first.self_attn.register_forward_hook(lambda *given: left.append(given[2][0]))
    second.forward = forward
    assert Streams.through(model, data) is None
    assert vars(second)["forward"] is forward and "forward" not in vars(first)
    assert mpop.compress(model, mpop.CompressionConfig(ranks=6, embeddings=False), data).rows


class Routed(nn.Module):
    """A linear that is fed some of the tokens, which depend on what they are."""

    def __init__(self, inner: nn.Module, always: int) -> None:
        super().__init__()
        self.inner, self.always = inner, always

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.always:
            return self.inner(x)
        chosen = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[chosen] = self.inner(x[chosen])
        return y


@pytest.mark.parametrize("always", [0, 12])
def test_what_is_fed_other_tokens_is_fitted_as_it_is(always: int) -> None:
    """Always, or in batches that come after one with all of them."""
    model, lengths = build("llama"), [12, *([10] * 7)]
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp, always)
    data = [batches(1, 8, length)[0] for length in lengths]
    streams = Streams.through(model, data)
    assert streams is not None
    matrices = [n for n in dense_matrices(model) if "layers.1." in n[0]]
    found = dict(streams.stages(1, matrices))
    routed = {n for n in matrices if ".mlp." in n[0]}
    assert routed <= set(found.get(None, [])) if not always else None not in found
    if always:
        names = [name for name in found if name and ".mlp." in name]
        streams.hold(matrices[0], decompose(torch.randn(24, 24), MPOShape.low_rank(24, 24, 3)))
        assert names and all(streams.inputs(name) is None for name in names)
    config = mpop.CompressionConfig(compression=0.5, num_cores=2, embeddings=False)
    rows = mpop.compress(model, config, data).rows
    assert {n[0] for n in routed} <= {row.name for row in rows}


def test_each_module_keeps_its_mode() -> None:
    model = build("bert").train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    matrices = [n for n in dense_matrices(model) if "layer" in n[0]]
    second_moments(model, batches(), matrices)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert Streams.through(model, batches()) is not None
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("options", [{"factors": "interpolative"}, {"num_cores": 2}])
def test_the_report_says_what_outputs_lose(options: dict[str, Any]) -> None:
    """Of the two models' layers on the batches to judge by, those before a matrix cut as well."""
    model, dense, data = build("llama"), build("llama").eval(), batches()
    rows = mpop.compress(model, mpop.CompressionConfig(compression=0.6, **options), data).rows
    judged, model = data[1::4], model.eval()
    tables = [row for row in rows if is_embedding(module_at(dense, row.name))]
    assert len(tables) == ("num_cores" in options)
    for row in rows:
        with torch.no_grad():
            y, made = (
                module_at(each, row.name)(torch.cat(rows_of(each, row.name, judged)))
                for each in (dense, model)
            )
        error = float((made - y).norm() / y.norm())
        assert row.output_error == pytest.approx(error, rel=2e-3, abs=1e-4)


def lost(config: mpop.CompressionConfig, data: list[dict[str, Tensor]], **options: Any) -> float:
    """What a cut model's distributions lose on batches that it has not seen."""
    model, dense = build("llama").double(), build("llama").double().eval()
    mpop.compress(model, config, data[:32], **options)
    total = 0.0
    with torch.no_grad():
        for batch in data[32:]:
            old, new = (each(**batch).logits.log_softmax(-1) for each in (dense, model.eval()))
            mask = batch["attention_mask"].bool()
            total += float((old.exp() * (old - new)).sum(-1)[mask].sum())
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"compression": 0.5, "factors": "interpolative"},
        {"compression": 0.5, "num_cores": 2},
        {"ranks": 6, "num_cores": 2},
    ],
)
def test_it_loses_less_than_each_matrix_by_itself(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches(48, 16)
    config = mpop.CompressionConfig(**options, embeddings=False)
    anchored = lost(config, data)
    monkeypatch.setattr(Streams, "through", classmethod(lambda *_: None))
    apart = lost(config, data)
    assert anchored < 0.97 * apart


def test_little_memory_loses_as_much() -> None:
    """In more groups than blocks."""
    data = batches(48, 16)
    config = mpop.CompressionConfig(compression=0.5, factors="interpolative", embeddings=False)
    few = lost(config, data, calibration_memory=8 * 24**2)
    assert few == pytest.approx(lost(config, data), rel=0.02)


def test_so_many_positions_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batches(8, 8, 12)  # of 96 positions
    for positions, count in ((2, 2), (300, 4), (2**17, 8)):
        monkeypatch.setattr(sequential, "_POSITIONS", positions)
        streams = Streams.through(model, data)
        assert streams is not None and len(streams._batches) == count


def test_exact_matrices_stay_exact() -> None:
    model, dense = build("llama"), build("llama").eval()
    config = mpop.CompressionConfig(num_cores=3, overrides={"*layers.0*": {"compression": 0.3}})
    mpop.compress(model, config, batches())
    name = "model.layers.1.mlp.up_proj"
    exact, found = module_at(dense, name).weight, module_at(model, name).to_linear().weight
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_the_report_is_of_the_dense_weights() -> None:
    model, dense = build("llama"), build("llama")
    config = mpop.CompressionConfig(compression=0.5, num_cores=2, embeddings=False)
    for row in mpop.compress(model, config, batches()).rows:
        exact, found = module_at(dense, row.name).weight, module_at(model, row.name).to_linear()
        lost = torch.linalg.norm(found.weight - exact) / torch.linalg.norm(exact)
        assert row.rel_error == pytest.approx(float(lost), rel=1e-3)


def test_a_fit_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batches()
    matrices = [n for n in dense_matrices(model) if "layers" in n[0]]
    moments = second_moments(model, data, matrices)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fit(names: Any, weight: Tensor, known: Moments | None) -> Any:
        if "layers.1" in names[0]:
            raise FloatingPointError("no")
        return decompose(weight, MPOShape.low_rank(*weight.t().shape, 3))

    with pytest.raises(FloatingPointError, match="no"):
        list(in_sequence(model.train(), data, [(matrices, moments)], fit))
    assert model.training and not any("forward" in vars(m) for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def broken(*_: Any) -> None:
        raise RuntimeError("in the midst of a block")

    monkeypatch.setattr(Inputs, "add", broken)
    with pytest.raises(RuntimeError, match="in the midst"):
        list(in_sequence(model, data, [(matrices, moments)], fit))
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model, nn.Module) and model.training
