"""One budget over a model: calibration, ranks, members, and what is refused."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import statistics
from pathlib import Path

import pytest
import torch
from tiny_models import BUILDERS, batches, build, inputs, logits
from torch import Tensor, nn

import mpop
from mpo_kernels import InterpolativeLinear, MPOShape, decompose
from mpo_kernels.layers.cost import LayerCost
from mpop.compression import calibration
from mpop.compression.allocation import Point, allocate, curve
from mpop.compression.calibration import Calibration, Moments, second_moments
from mpop.compression.permute import blocks, sort_hidden_units
from mpop.compression.sequential import Streams
from mpop.models.matrices import dense_matrices, is_embedding, module_at, mpo_modules, weight_of
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
        for names, moments in found.items():
            weight = weight_of(module_at(model, names[0])).detach()
            assert moments.slope > 0 and moments.whole(weight) > 0
            assert moments.gradients.shape == 2 * (len(weight),)
        assert model.training == was_training
        assert_unchanged(model, before)
        assert not any(
            module._forward_pre_hooks or module._forward_hooks for module in model.modules()
        )
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_gradients_are_those_of_the_likelihood_of_all_labels(self) -> None:
        """Against the exact mean over labels, for each of which autograd is asked."""
        model, batch = build("bert").double(), batches(1, 3, 6)[0]
        names = ("bert.encoder.layer.1.intermediate.dense",)
        found = second_moments(model, [batch] * 400, [names])[names]
        seen: list[Tensor] = []
        module = module_at(model, names[0])
        handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
        likely = model(**batch).logits.log_softmax(-1)
        handle.remove()
        mask = batch["attention_mask"].bool()
        exact = torch.zeros_like(found.gradients, dtype=torch.float64)
        for row in range(len(likely)):
            for label in range(likely.shape[1]):
                (g,) = torch.autograd.grad(likely[row, label], seen, retain_graph=True)
                g = g[row][mask[row]]
                exact += likely[row, label].detach().exp() * g.t() @ g
        exact /= mask.sum()
        assert found.slope == pytest.approx(float(exact.diagonal().mean()), rel=0.1)
        error = torch.linalg.norm(
            found.gradients / found.gradients.diagonal().mean() - exact / exact.diagonal().mean()
        )
        assert error < 0.1 * torch.linalg.norm(exact / exact.diagonal().mean())

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_what_noise_in_a_matrix_does_is_foretold(self, name: str) -> None:
        model, data = build(name).double(), batches(8, 8, 12)
        matrices = [n for n in dense_matrices(model) if not is_embedding(module_at(model, n[0]))]
        found = second_moments(model, data, matrices)
        fitted = [batch for k, batch in enumerate(data) if k % 4 != 1]

        def likely(batch: dict[str, Tensor]) -> Tensor:
            rows = model(**batch).logits.log_softmax(-1)
            return rows[batch["attention_mask"].bool()] if rows.dim() == 3 else rows

        with torch.no_grad():
            before = [likely(batch) for batch in fitted]
            ratios = []
            for names in matrices:
                weight = weight_of(module_at(model, names[0]))
                kept = weight.clone()
                noise = 0.02 * weight.std() * torch.randn_like(weight)
                weight += noise
                lost = sum(
                    float((old.exp() * (old - likely(batch))).sum())
                    for old, batch in zip(before, fitted, strict=True)
                )
                weight.copy_(kept)
                ratios.append(found[names].whole(noise) / lost)
        assert 0.5 < statistics.median(ratios) < 2
        assert min(ratios) > 0.2 and max(ratios) < 5

    def test_few_rows_shrink_what_is_fitted_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ("bert.encoder.layer.1.intermediate.dense",)
        with pytest.warns(UserWarning, match=r"little text .* 1 matrices .*intermediate.dense"):
            few = second_moments(build("bert"), batches(4, 2, 6), [names])[names]
        many = second_moments(build("bert"), batches(40, 16, 12), [names])[names]
        judge = many.judge / many.judge.diagonal().mean()
        assert few.rows < 10 * len(judge)
        assert torch.linalg.eigvalsh(few.fit)[0] > 0

        def unlikely(moment: Tensor) -> float:
            moment = moment.double() / moment.diagonal().mean()
            return float(torch.linalg.solve(moment, judge.double()).trace() + moment.logdet())

        monkeypatch.setattr(calibration, "_SHRINKAGES", (0.003,))
        with pytest.warns(UserWarning, match=r"by 0\.3% at most"):
            less = second_moments(build("bert"), batches(4, 2, 6), [names])[names]
        assert unlikely(few.fit) < unlikely(less.fit) - 1

    def test_sums_are_in_fp32_under_autocast(self) -> None:
        model, names = build("llama"), ("model.layers.1.mlp.down_proj",)
        seen: list[Tensor] = []
        handle = module_at(model, names[0]).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = second_moments(model, [inputs(model)] * 4, [names])[names]
        handle.remove()
        x = seen[1].flatten(0, 1).double()
        assert seen[1].dtype == torch.bfloat16
        torch.testing.assert_close(found.judge.double(), x.t() @ x, rtol=1e-5, atol=1e-6)
        gradients = found.gradients.double()
        assert torch.linalg.eigvalsh(gradients)[0] > -1e-5 * gradients.diagonal().max()

    def test_an_input_that_is_written_to_is_another(self) -> None:
        class Twice(nn.Module):
            def __init__(self, first: nn.Module) -> None:
                super().__init__()
                self.first, self.second = first, copy.deepcopy(first)

            def forward(self, x: Tensor) -> Tensor:
                y = self.first(x)
                return y + self.second(x.mul_(2))

        model = build("bert")
        model.bert.encoder.layer[0].intermediate.dense = Twice(
            model.bert.encoder.layer[0].intermediate.dense
        )
        stem = "bert.encoder.layer.0.intermediate.dense"
        names = [(f"{stem}.first",), (f"{stem}.second",)]
        with torch.no_grad():
            found = second_moments(model, batches(4, 16, 12), names)
        first, second = (found[each].judge for each in names)
        torch.testing.assert_close(second, 4 * first)

    def test_a_gradient_that_was_there_stays(self) -> None:
        model = build("mixtral")
        name = "model.layers.0.mlp.experts.down_proj"
        kept = torch.ones_like(model.get_parameter(name))
        model.get_parameter(name).grad = kept
        clean = second_moments(build("mixtral"), batches(4), [(name,)])[name,]
        found = second_moments(model, batches(4), [(name,)])[name,]
        assert model.get_parameter(name).grad is kept and bool((kept == 1).all())
        assert found.slope == pytest.approx(clean.slope)

    def test_no_rows(self) -> None:
        model = build("bert")
        before = state(model)
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
        for memory in (8 * 48**2, 2**30):  # what can be passed only once is kept
            options = {"calibration_memory": memory}
            again = mpop.compress(build("bert"), CONFIG, iter(batches()), **options)
            assert [row.shape for row in again.rows] == [row.shape for row in report.rows]
        for config in (CONFIG, mpop.CompressionConfig(ranks=4, embeddings=False)):
            model = build("bert")
            model.bert.encoder.layer[1].attention.output.LayerNorm.bias.data[0] = torch.inf
            before = state(model)
            with pytest.raises(ValueError, match="expected finite inputs"):
                # Finite are those of the matrices that come first.
                mpop.compress(model, config, batches(), calibration_memory=8 * 24**2)
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
