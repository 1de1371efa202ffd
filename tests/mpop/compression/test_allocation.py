"""One budget over a model: calibration, ranks, members, and what is refused."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import pytest
import torch
from tiny_models import BUILDERS, batches, build, inputs, logits
from torch import Tensor, nn

import mpop
from mpo_kernels.layers.cost import LayerCost
from mpop.compression.allocation import Point, allocate, curve
from mpop.compression.calibration import Calibration, second_moments
from mpop.compression.permute import blocks, sort_hidden_units
from mpop.models.matrices import dense_matrices, module_at, mpo_modules
from mpop.models.selection import select

CONFIG = mpop.CompressionConfig(compression=0.5, factors="auto", embeddings=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(mpo_modules(model))


class TestSecondMoments:
    def test_they_are_those_of_the_inputs_without_padding(self) -> None:
        model, data = build("bert"), batches()
        names = ("bert.encoder.layer.1.intermediate.dense",)
        words = ("bert.embeddings.word_embeddings",)
        found = second_moments(model, data, [names, words])
        model.eval()
        seen: list[Tensor] = []
        module = module_at(model, names[0])
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            for batch in data:
                model(**batch)
        parts: list[list[Tensor]] = [[], []]
        for number, (x, batch) in enumerate(zip(seen, data, strict=True)):
            parts[number % 4 == 1].append(x[batch["attention_mask"].bool()])
        for rows, moment in zip(parts, found[names], strict=False):
            x = torch.cat(rows).double()
            torch.testing.assert_close(moment.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
        counts = sum(found[words][:2])
        ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
        assert torch.equal(counts, torch.bincount(ids, minlength=50).float())
        assert found[names].rows == len(torch.cat(parts[0]))

    @pytest.mark.parametrize("name", BUILDERS)
    def test_every_architecture(self, name: str) -> None:
        model = build(name)
        before, was_training = state(model), model.training
        data = [inputs(model)] * 40
        matrices = select(model, mpop.CompressionConfig())
        found = second_moments(model, data, matrices)
        assert set(found) == set(matrices)
        source, changes = Calibration(model, data, 2**30), []
        for names in matrices:
            held = module_at(model, names[0]).weight
            name = f"{names[0]}.weight"
            assert source.change({name: held.detach().clone()}) == 0
            assert module_at(model, names[0]).weight is held
            changes.append(source.change({name: torch.zeros_like(held)}) > 0)
        assert sum(changes) >= 0.7 * len(changes)  # small attention is uniform without keys too
        assert model.training == was_training
        assert_unchanged(model, before)
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_too_few_rows(self) -> None:
        model = build("bert")
        before = state(model)
        with pytest.raises(ValueError, match=r"layer.0.*: expected at least 24 rows .*give more"):
            mpop.compress(model, CONFIG, batches(2, 2, 4))
        with pytest.raises(ValueError, match="calibration batches, got none"):
            mpop.compress(model, CONFIG, [])
        assert_unchanged(model, before)

    def test_inputs_that_are_not_finite(self) -> None:
        model = build("bert")
        model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = torch.nan
        with pytest.raises(ValueError, match="expected finite inputs, got NaN or Inf in calibra"):
            mpop.compress(model, CONFIG, batches())

    def test_groups_within_a_memory_see_every_matrix_once(self) -> None:
        model = build("bert")
        matrices = [n for n in dense_matrices(model) if "layer" in n[0]]
        source = Calibration(model, batches(), 8 * 48**2)
        groups = list(source.groups(matrices))
        assert len(groups) > 3
        assert [n for group, _ in groups for n in group] == matrices
        assert all(set(group) == set(moments) for group, moments in groups)
        report = mpop.compress(model, CONFIG, batches(), calibration_memory=8 * 48**2)
        assert report.rows
        with pytest.raises(ValueError, match=r"can be iterated \d+ times, as a list"):
            mpop.compress(build("bert"), CONFIG, iter(batches()), calibration_memory=8 * 48**2)
        assert mpop.compress(build("bert"), CONFIG, iter(batches())).rows
        for config in (CONFIG, mpop.CompressionConfig(ranks=4, embeddings=False)):
            model = build("bert")
            before = state(model)
            with pytest.raises(ValueError, match=r"output.dense: expected at least 48 rows"):
                # Enough for the matrices that come first.
                mpop.compress(model, config, batches(5, 1, 12), calibration_memory=8 * 24**2)
            assert_unchanged(model, before)

    def test_the_two_sides_of_a_t5_have_masks_of_their_own(self) -> None:
        model = build("t5")
        ids = torch.randint(2, 50, (16, 12))
        masks = torch.arange(12).expand(16, 12) < torch.tensor([[3], [9]])[:, :, None]
        batch = {"input_ids": ids, "attention_mask": masks[0].long()}
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": masks[1].long()}
        stem = "decoder.block.0.layer"
        names = {
            (f"{stem}.0.SelfAttention.q",): 9,
            (f"{stem}.1.EncDecAttention.q",): 9,
            (f"{stem}.1.EncDecAttention.k",): 3,
            ("encoder.block.0.layer.0.SelfAttention.q",): 3,
        }
        found = second_moments(model, [batch] * 4, list(names))
        assert {name: moments.rows for name, moments in found.items()} == {
            name: 3 * 16 * length for name, length in names.items()
        }

    def test_batches_that_are_none(self) -> None:
        for wrong in ("abc", [{"input_ids": [[1, 2]]}]):
            with pytest.raises(TypeError, match="expected batches of named tensors"):
                mpop.compress(build("bert"), CONFIG, wrong)
        with pytest.raises(ValueError, match="in two batches or more"):
            mpop.compress(build("bert"), mpop.CompressionConfig(), batches(1, 64))


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
        x = torch.randn(100, 12)
        points = curve(torch.randn(20, 12), x.t() @ x, LayerCost())
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

    def test_a_matrix_of_low_rank_keeps_it(self) -> None:
        """The cut that its sensitivity is measured by must be one that loses something."""
        model = build("bert")
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        weight.data = torch.randn(48, 4) @ torch.randn(4, 24) / 5
        report = mpop.compress(model, CONFIG, batches())
        (row,) = [r for r in report.rows if r.name.endswith("layer.0.intermediate.dense")]
        assert row.output_error < 1e-3 and row.parameters_after < 0.5 * row.parameters_before

    def test_calibration_lowers_the_errors_of_planned_factors_too(self) -> None:
        config = mpop.CompressionConfig(num_cores=3, compression=0.4, embeddings=True)
        aware = mpop.compress(build("bert"), config, batches(40))
        plain = mpop.compress(build("bert"), config)
        assert [row.shape for row in aware.rows] == [row.shape for row in plain.rows]
        assert all(a.rel_error >= p.rel_error for a, p in zip(aware.rows, plain.rows, strict=True))
        assert all(row.output_error is not None for row in aware.rows)

    def test_refusals(self) -> None:
        for options, message in [
            ({"factors": "best"}, "factors: expected 'balanced' or 'auto'"),
            ({"factors": "auto"}, "share one budget: expected a compression"),
            ({"factors": "auto", "compression": 0.5, "overrides": {"*": {}}}, "no overrides"),
            ({"objective": "latency"}, "expected factors 'auto'"),
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


def _on_one_process(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = build("bert")
    report = mpop.compress(model, CONFIG, batches()[4 * rank : 4 * rank + 4])
    torch.save((report.to_dict(), model.state_dict()), f"{folder}/{rank}.pt")
    try:
        mpop.compress(build("bert"), CONFIG, batches(2, 1, 4))
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
    assert all("expected at least" in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
