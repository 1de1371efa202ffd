"""One budget over a model: ranks, members, and what is refused."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import pytest
import torch
from tiny_models import BUILDERS, assert_unchanged, batches, build, logits, state
from torch import nn

import mpop
from mpo_kernels import InterpolativeLinear, MPOShape, decompose
from mpo_kernels.layers.cost import LayerCost
from mpop.compression.allocation import Point, allocate, curve
from mpop.compression.calibration import Moments
from mpop.compression.permute import blocks, sort_hidden_units
from mpop.compression.sequential import Streams
from mpop.models.matrices import dense_matrices, is_embedding, module_at
from mpop.models.selection import select

CONFIG = mpop.CompressionConfig(compression=0.5, factors="auto", embeddings=False)


class TestAllocate:
    def test_against_every_combination(self) -> None:
        """On curves of equal steps greedy is exact."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            curves = []
            for _ in range(3):
                gains = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
                lost = [sum(gains[k:]) for k in range(5)]
                curves.append([Point(10 * (k + 1), loss) for k, loss in enumerate(lost)])
            for budget in (30, 60, 95, 150):
                found = allocate(curves, budget)
                assert sum(point.cost for point in found) <= budget
                best = min(
                    sum(point.lost for point in points)
                    for points in itertools.product(*curves)
                    if sum(point.cost for point in points) <= budget
                )
                assert sum(point.lost for point in found) == pytest.approx(best)

    def test_a_budget_out_of_reach_says_the_least(self) -> None:
        curves = [[Point(10, 1.0), Point(20, 0.0)], [Point(5, 1.0)]]
        with pytest.raises(
            ValueError, match="budget of at least 15, one rank for each of 2 matrices, got 14"
        ):
            allocate(curves, 14)
        model = build("bert")
        before = state(model)
        config = mpop.CompressionConfig(compression=0.01, factors="auto")
        with pytest.raises(ValueError, match=r"compression of at least 0\.\d+, the cheapest"):
            mpop.compress(model, config)
        config = mpop.CompressionConfig(compression=1.0, factors="auto")
        with pytest.raises(ValueError, match=r"no matrix is worth an MPO .*expected a lower one"):
            mpop.compress(model, config)
        assert_unchanged(model, before)

    def test_a_curve_is_convex_and_ends_with_dense(self) -> None:
        x, g = torch.randn(100, 12), torch.randn(100, 20)
        moments = Moments(x.t() @ x, x.t() @ x, 100, 0.3, g.t() @ g)
        weight = torch.randn(20, 12)
        points = curve(weight, moments, LayerCost())
        cut = decompose(
            weight,
            MPOShape.low_rank(12, 20, 1),
            second_moment=moments.fit,
            gradient_moment=moments.gradients,
        )
        lost = cut.output_error**2 * moments.whole(weight)
        assert points[0].lost == pytest.approx(lost, rel=0.05)  # but for what regularises
        assert points[-1] == Point(240, 0.0) and points[0].cost == 32
        slopes = [(a.lost - b.lost) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
        assert all(a >= b > 0 for a, b in itertools.pairwise(slopes))


class TestHiddenUnits:
    @pytest.mark.parametrize("name", BUILDERS)
    def test_their_order_is_nothing_to_the_model(self, name: str) -> None:
        model = build(name)
        expected, before = logits(model).detach(), state(model)
        selected = select(model, mpop.CompressionConfig())
        found = list(blocks(selected))
        # One shared block in ALBERT, several a layer in MobileBERT; BART's are not known.
        least, most = {"albert": (1, 1), "bart": (0, 0)}.get(name.split("-")[0], (2, 99))
        assert least <= len(found) <= most
        undo = sort_hidden_units(model, selected)
        moved = [not torch.equal(value, before[key]) for key, value in model.state_dict().items()]
        assert sum(moved) >= 2 * len(found)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        undo()
        assert_unchanged(model, before)

    def test_units_in_disorder_are_put_together(self) -> None:
        """A matrix of bond 1 between digits, but for the order of its inputs."""
        order = torch.randperm(24)
        weight = torch.kron(torch.arange(1.0, 5).outer(torch.tensor([1.0, 9.0])), torch.ones(3, 12))
        model = build("bert")
        for layer in model.bert.encoder.layer:
            linear = nn.Linear(24, 12)
            linear.weight.data = weight[:, order]
            layer.output.dense = linear
            layer.intermediate.dense = nn.Linear(24, 24)
        sort_hidden_units(model, select(model, CONFIG))
        found = model.bert.encoder.layer[0].output.dense.weight
        assert torch.equal(found, weight) or torch.equal(found, weight.flip(1))


class TestCompress:
    @pytest.mark.parametrize("calibrated", [False, True])
    def test_the_budget_holds_for_all_matrices_together(self, calibrated: bool) -> None:
        model = build("bert")
        whole = sum(
            module_at(model, names[0]).weight.numel()
            for names in dense_matrices(model)
            if "layer" in names[0] or "pooler" in names[0]
        )
        report = mpop.compress(model, CONFIG, batches() if calibrated else None)
        held = sum(row.parameters_after for row in report.rows)
        left = whole - sum(row.parameters_before for row in report.rows)
        assert 0.4 * whole < held + left <= 0.5 * whole
        kept = [part.parameters for part in report.left if "worth more dense" in part.reason]
        assert left > 0 and kept == [left]
        assert len({round(r.parameters_after / r.parameters_before, 2) for r in report.rows}) > 2
        assert all((row.output_error is not None) == calibrated for row in report.rows)
        assert all(row.to_dict() if hasattr(row, "to_dict") else True for row in report.rows)
        model(**batches(1)[0])

    def test_devices_share_what_is_chosen(self) -> None:
        model = build("llama")
        config = mpop.CompressionConfig(compression=0.5, factors="auto", tensor_parallel=4)
        report = mpop.compress(model, config)
        words = [row for row in report.rows if "embed" in row.name]
        others = [row for row in report.rows if "embed" not in row.name]
        assert others and all(row.shape.splits(4) for row in others)
        assert all(not row.shape.splits(4) for row in words)

    def test_what_the_model_does_not_need_is_cut_first(self) -> None:
        """Outputs that are multiplied by nothing cost the model nothing."""
        model = build("bert")
        model.bert.encoder.layer[1].attention.output.dense.weight.data.zero_()
        report = mpop.compress(model, CONFIG, batches())
        kept = {row.name: row.parameters_after / row.parameters_before for row in report.rows}
        idle = kept["bert.encoder.layer.1.attention.self.value"]
        assert idle < 0.15 < kept.get("bert.encoder.layer.1.intermediate.dense", 1.0)

    def test_a_matrix_of_low_rank_keeps_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cut that its sensitivity is measured by must be one that loses something."""
        model = build("bert")
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        weight.data = torch.randn(48, 4) @ torch.randn(4, 24) / 5
        report = mpop.compress(model, CONFIG, batches())
        (row,) = [r for r in report.rows if r.name.endswith("layer.0.intermediate.dense")]
        assert row.rel_error < 1e-3 and row.parameters_after < 0.5 * row.parameters_before
        # With what it is fed as dense feeds it.
        monkeypatch.setattr(Streams, "through", classmethod(lambda *_: None))
        model = build("bert")
        model.bert.encoder.layer[0].intermediate.dense.weight.data = weight.data
        report = mpop.compress(model, CONFIG, batches())
        (row,) = [r for r in report.rows if r.name.endswith("layer.0.intermediate.dense")]
        assert row.output_error < 1e-3 and row.parameters_after < 0.5 * row.parameters_before

    def test_calibration_keeps_planned_factors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where each matrix is fitted by itself."""
        monkeypatch.setattr(Streams, "through", classmethod(lambda *_: None))
        config = mpop.CompressionConfig(num_cores=3, compression=0.4, embeddings=True)
        aware = mpop.compress(build("bert"), config, batches(40))
        plain = mpop.compress(build("bert"), config)
        assert [row.shape for row in aware.rows] == [row.shape for row in plain.rows]
        assert all(a.rel_error >= p.rel_error for a, p in zip(aware.rows, plain.rows, strict=True))
        assert all(row.output_error is not None for row in aware.rows)

    def test_calibration_lowers_what_planned_factors_lose(self) -> None:
        config = mpop.CompressionConfig(num_cores=3, compression=0.4, embeddings=True)
        data = batches(48)
        lost = []
        for seen in (data[:40], None):
            model, dense = build("bert").eval(), build("bert").eval()
            report = mpop.compress(model, config, seen)
            assert all(r.parameters_after <= 0.4 * r.parameters_before for r in report.rows)
            assert all((r.output_error is None) == (seen is None) for r in report.rows)
            with torch.no_grad():
                pairs = [(model(**b).logits, dense(**b).logits) for b in data[40:]]
            lost.append(float(sum((new - old).square().sum() for new, old in pairs)))
        assert lost[0] < 0.8 * lost[1]

    def test_refusals(self) -> None:
        for options, message in [
            ({"factors": "best"}, "factors: expected 'balanced' or 'auto' or 'interpolative'"),
            ({"factors": "auto"}, "share one budget: expected a compression .* got none"),
            ({"factors": "auto", "share": 0.1}, "no other bound .* got {'share': 0.1}"),
            ({"factors": "auto", "compression": 0.5, "overrides": {"*": {}}}, "no overrides"),
            ({"objective": "latency"}, "expected factors 'auto'"),
            ({"share": 0.1, "rows": 4}, "at 4 rows: expected factors 'auto', got 'balanced'"),
            (
                {"factors": "auto", "compression": 0.5, "num_cores": 3},
                "num_cores: chosen by factors 'auto', expected none, got 3",
            ),
            ({"share": 0.1, "num_cores": 2}, "num_cores: chosen by a share, expected none, got 2"),
            ({"objective": "joy"}, "objective: expected one of"),
        ]:
            with pytest.raises(ValueError, match=message):
                mpop.CompressionConfig(**options)

    def test_it_saves_and_loads(self, tmp_path: Path) -> None:
        model = build("bert")
        mpop.compress(model, CONFIG, batches())
        mpop.save(model, tmp_path)
        loaded, data = mpop.load(tmp_path).eval(), batches(1)[0]
        with torch.no_grad():
            assert torch.equal(loaded(**data).logits, model.eval()(**data).logits)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_interpolative_under_one_budget(name: str, embeddings: bool, tmp_path: Path) -> None:
    model, data = build(name), batches(16)
    before = mpop.count_parameters(model).total
    options = {"compression": 0.7, "factors": "interpolative", "embeddings": embeddings}
    report = mpop.compress(model, mpop.CompressionConfig(**options), data)
    held = {row.name: module_at(model, row.name) for row in report.rows}
    for row in report.rows:
        module = held[row.name]
        is_linear = not is_embedding(module) and row.experts == 1
        assert isinstance(module, InterpolativeLinear) == is_linear
        assert row.form == ("interpolative" if is_linear else None)
        assert row.parameters_after == sum(core.numel() for core in module.cores)
        assert row.parameters_after < row.parameters_before
    assert mpop.count_parameters(model).total == report.parameters_after < before
    selected = [n for n in dense_matrices(build(name)) if "head" not in n[0]]
    assert len(report.rows) <= len(selected)
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path).eval()
    batch = data[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_interpolative_loses_less_than_two_cores() -> None:
    """At the same parameters, by what the model's distributions lose."""
    data = batches(40)

    def lost(factors: str) -> float:
        model, dense = build("llama").double(), build("llama").double()
        config = mpop.CompressionConfig(compression=0.8, factors=factors, embeddings=False)
        report = mpop.compress(model, config, data[:32])
        kept = sum(row.parameters_after for row in report.rows)
        left = set(dict(dense.named_modules())) - {row.name for row in report.rows}
        whole = sum(row.parameters_before for row in report.rows)
        assert left and kept <= whole
        total = 0.0
        with torch.no_grad():
            for batch in data[32:]:
                old, new = (each(**batch).logits.log_softmax(-1) for each in (dense, model))
                total += float((old.exp() * (old - new)).sum())
        return total

    assert lost("interpolative") < 0.8 * lost("auto")


def _on_one_process(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = build("bert")
    report = mpop.compress(model, CONFIG, batches()[4 * rank : 4 * rank + 4])
    torch.save((report.to_dict(), model.state_dict()), f"{folder}/{rank}.pt")
    try:
        mpop.compress(build("bert"), CONFIG, batches(1))
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_processes_share_the_matrices(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_on_one_process, (2, port, str(tmp_path)), nprocs=2)
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all("two batches or more" in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
