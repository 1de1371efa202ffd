"""Dimension squeezing: which bonds go, what is kept, and that it can be killed at any moment."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import batches, build, inputs
from torch import Tensor, nn

import mpop
from mpo_kernels import MPOLinear, MPOShape, reconstruct, round_cores
from mpop.finetuning.settle import Settler, has_settled
from mpop.finetuning.squeeze import choose_cuts, relative_squares, round_trained, squeeze
from mpop.models.matrices import mpo_modules
from mpop.models.swapping import to_dense


class TestSettled:
    def test_a_window_that_is_not_full_says_nothing(self) -> None:
        assert not has_settled([1.0] * 9, 5, 0.02)
        assert has_settled([1.0] * 10, 5, 0.02)

    def test_a_falling_loss_has_not(self) -> None:
        assert not has_settled([1 / (k + 1) for k in range(40)], 20, 0.02)
        assert has_settled([1 / (k + 1) for k in range(40)] + [0.02] * 40, 20, 0.02)
        assert has_settled([float(k) for k in range(1, 11)], 5, 0.02)  # a rising one has


class Rows(nn.Module):
    """A layer that is told to be another one; with dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        target = nn.Linear(24, 30)
        self.layers = nn.ModuleList(
            MPOLinear.from_linear(target, shape)
            for shape in (MPOShape((4, 3, 2), (2, 3, 5)), MPOShape((6, 4), (5, 6)))
        )
        self.target = target.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        given = sum(layer(self.dropout(x)) for layer in self.layers) / 2
        return SimpleNamespace(loss=(given - self.target(x)).square().mean())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_settling_autocasts_where_asked(dtype: torch.dtype | None) -> None:
    linear, seen = nn.Linear(24, 2), []

    def forward(x: Tensor) -> Any:
        y = linear(x)
        seen.append(y.dtype)
        return SimpleNamespace(loss=y.float().square().mean())

    model = nn.Module()
    model.linear, model.forward = linear, forward
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    data = list(torch.randn(8, 24))
    collate = lambda rows: {"x": torch.stack(rows)}  # noqa: E731
    Settler(model, data, collate, optimizer, batch_size=4, max_steps=2, autocast=dtype)()
    assert seen == [dtype or torch.float32] * 2


def rows_and_tuner(max_steps: int = 6) -> tuple[Rows, Settler]:
    model = Rows()
    torch.manual_seed(1)
    data = list(torch.randn(50, 24))
    for layer in model.layers:
        layer.freeze_central()
    trained = [p for p in model.parameters() if p.requires_grad]
    tuner = Settler(
        model,
        data,
        lambda rows: {"x": torch.stack(rows)},
        torch.optim.AdamW(trained, lr=1e-3),
        batch_size=8,
        window=2,
        max_steps=max_steps,
    )
    return model, tuner


def quality(model: Rows) -> Callable[[], float]:
    """1 less the relative error of the outputs."""
    x = torch.randn(100, 24, generator=torch.Generator().manual_seed(2))

    def evaluate() -> float:
        with torch.no_grad():
            model.eval()
            whole = (model.target(x) - model.target(x).mean(0)).square().mean()
            return 1 - float((model(x).loss / whole).sqrt())

    return evaluate


def results(report: mpop.SqueezeReport) -> dict[str, Any]:
    """All of it but the times."""
    found = report.to_dict()
    for made in found["rounds"]:
        del made["seconds"]
    return found


def squares_of(modules: dict[str, MPOLinear]) -> dict[str, list[list[float]]]:
    return {name: relative_squares(module) for name, module in modules.items()}


class TestCuts:
    def test_the_smallest_singular_values_go_first(self) -> None:
        """Of two matrices with known spectra."""
        flat, steep = (torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2))
        steep = steep * torch.logspace(0, -6, 16)
        modules = {}
        for name, weight in (("flat", flat), ("steep", steep)):
            linear = nn.Linear(16, 16)
            linear.weight.data = weight.clone()
            modules[name] = MPOLinear.from_linear(linear, MPOShape.low_rank(16, 16, 16))
        ranks, error = choose_cuts(
            modules, {name: relative_squares(m) for name, m in modules.items()}, 0.2
        )
        assert set(ranks) == {"steep"}
        kept = ranks["steep"][0]
        squares = torch.logspace(0, -12, 16)
        assert error == pytest.approx(
            float((squares[kept:].sum() / squares.sum()).sqrt()), rel=1e-3
        )
        assert (16 - kept) * 32 >= 0.2 * 1024 > (16 - kept - 1) * 32

    def test_equal_matrices_are_cut_alike(self) -> None:
        """Of flat spectra no bond goes far ahead of the others."""
        torch.manual_seed(0)
        modules = {
            f"layer {k}": MPOLinear.from_linear(nn.Linear(64, 64), MPOShape.balanced(64, 64, 3))
            for k in range(4)
        }
        ranks, error = choose_cuts(
            modules, {name: relative_squares(m) for name, m in modules.items()}, 0.1
        )
        first = MPOShape.balanced(64, 64, 3).ranks
        assert len(ranks) == 4 and error < 1
        for made in ranks.values():
            assert all(rank > 0.7 * full for rank, full in zip(made, first, strict=True))

    def test_under_a_second_moment_low_rank_knows_what_its_output_loses(self) -> None:
        torch.manual_seed(0)
        layer = MPOLinear(30, 21, MPOShape.low_rank(30, 21, 12))
        x = torch.randn(500, 30) * torch.logspace(0, -2, 30)
        moment = x.t() @ x
        squares = relative_squares(layer, moment)[0]
        assert len(squares) == 21 and sum(squares) == pytest.approx(1)
        with torch.no_grad():
            before = layer(x)
        plain = to_dense(layer).weight
        lost = layer.round(ranks=(5,), second_moment=moment).output_error
        assert lost == pytest.approx(math.sqrt(sum(squares[5:])), rel=0.02)  # but for the ridge
        with torch.no_grad():
            measured = (layer(x) - before).norm() / (before - layer.bias).norm()
        assert measured == pytest.approx(lost, rel=0.02)
        cut = torch.linalg.svd(plain)
        truncated = cut.U[:, :5] * cut.S[:5] @ cut.Vh[:5]
        assert measured < 0.9 * ((plain - truncated) @ x.t()).norm() / (plain @ x.t()).norm()

    def test_trained_cores_are_cut_from_canonical_form(self) -> None:
        torch.manual_seed(0)
        layer = MPOLinear(24, 30, MPOShape((4, 3, 2), (2, 3, 5)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        before = [core.detach().clone() for core in layer.cores]
        round_trained(layer, (4, 6), optimizer)
        best = round_cores(before, ranks=(4, 6))
        assert all(torch.equal(a, b) for a, b in zip(layer.cores, best.cores, strict=True))
        sliced = [before[0][..., :4], before[1][:4, ..., :6], before[2][:6]]
        whole = to_dense(layer).weight

        def error(cores: list[Tensor]) -> float:
            return float((reconstruct(cores) - reconstruct(before)).norm())

        assert error(best.cores) < 0.9 * error(sliced)
        torch.testing.assert_close(whole, to_dense(layer).weight)

    def test_the_optimizer_goes_on_with_what_it_knew(self) -> None:
        model, tuner = rows_and_tuner()
        tuner()
        layer = model.layers[0]
        known = {
            k: tuner.optimizer.state[core]["exp_avg"].clone()
            for k, core in enumerate(layer.cores)
            if core.requires_grad
        }
        round_trained(layer, layer.shape.ranks, tuner.optimizer)  # a change of gauge alone
        round_trained(layer, (3, 4), tuner.optimizer)
        for k, core in enumerate(layer.cores):
            if core.requires_grad:
                state = tuner.optimizer.state[core]
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == core.shape
                assert (state["exp_avg_sq"] >= 0).all() and state["step"] == 6
                assert 0.05 < state["exp_avg"].norm() / known[k].norm() < 20
        before = [core.detach().clone() for core in layer.cores]
        tuner()
        moved = [not torch.equal(a, b) for a, b in zip(layer.cores, before, strict=True)]
        assert moved == [core.requires_grad for core in layer.cores]


class TestSqueeze:
    def test_it_ends_with_the_smallest_within_the_bound(self, tmp_path: Path) -> None:
        model, tuner = rows_and_tuner()
        evaluate = quality(model)
        told: list[Any] = []
        report = squeeze(
            model,
            evaluate=evaluate,
            finetune=tuner,
            max_drop=0.3,
            max_steps=12,
            state=tmp_path / "s" / "state.pt",
            on_round=told.append,
        )
        assert tuple(told) == report.rounds and len(told) <= 12
        assert {made.kept for made in told} == {True, False}
        kept = [made for made in told if made.kept]
        assert report.parameters == kept[-1].parameters == min(r.parameters for r in kept)
        assert report.parameters == mpop.count_parameters(model).total
        assert evaluate() == pytest.approx(report.metric) and report.metric == kept[-1].metric
        assert report.metric >= report.metric_before - 0.3
        assert report.parameters < 0.9 * report.parameters_before
        assert all(made.metric < report.metric_before - 0.3 for made in told if not made.kept)
        assert "rounds kept" in str(report)
        lines = (tmp_path / "s" / "trace.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [made.step for made in told]
        mpop.plot_trace(report, tmp_path / "trace.png")
        assert (tmp_path / "trace.png").stat().st_size > 1000

    def test_free_cuts_grow_and_dear_ones_halve(self) -> None:
        model, tuner = rows_and_tuner()
        metrics = iter([0.9, 0.9, 0.95, 0.5, 0.92, 0.91, 0.91])
        report = squeeze(
            model,
            evaluate=lambda: next(metrics),
            finetune=tuner,
            max_drop=0.1,
            max_steps=5,
            step=0.04,
        )
        assert [made.kept for made in report.rounds] == [True, True, False, True, True]
        fractions = [made.fraction for made in report.rounds]
        assert fractions == pytest.approx([0.04, 0.06, 0.09, 0.045, 0.045])

    def test_a_large_first_step_stays_as_it_is(self) -> None:
        model, tuner = rows_and_tuner()
        report = squeeze(
            model, evaluate=lambda: 0.9, finetune=tuner, max_drop=0.1, max_steps=2, step=0.3
        )
        assert [made.fraction for made in report.rounds] == [0.3, 0.3]

    def test_a_trace_that_lags_behind_is_made_up_for(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"evaluate": lambda: 0.9, "max_drop": 0.1}
        options |= {"max_steps": 2, "state": tmp_path / "state.pt"}
        model, tuner = rows_and_tuner()
        squeeze(model, finetune=tuner, **options)
        trace = tmp_path / "trace.jsonl"
        whole = trace.read_text()
        trace.write_text(whole.splitlines(keepends=True)[0])
        model, tuner = rows_and_tuner()
        squeeze(model, finetune=tuner, resume=True, **options)
        assert trace.read_text() == whole and len(whole.splitlines()) == 2

    def test_nothing_that_may_go_leaves_the_model_as_it_was(self) -> None:
        model, tuner = rows_and_tuner()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        metrics = iter([0.9])
        report = squeeze(model, evaluate=lambda: next(metrics, 0.1), finetune=tuner, max_drop=0.1)
        assert report.parameters == report.parameters_before and not any(
            r.kept for r in report.rounds
        )
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_round_that_diverges_or_has_no_metric_is_undone(self, bad: float) -> None:
        model, tuner = rows_and_tuner()
        metrics = iter([0.9, 0.9, bad, 0.9, 0.9])
        calls = iter(range(100))

        class Fragile:
            optimizer = tuner.optimizer
            state_dict, load_state_dict = tuner.state_dict, tuner.load_state_dict

            def __call__(self) -> float:
                if next(calls) == 2:
                    raise FloatingPointError("the loss is nan")
                return tuner()

        report = squeeze(
            model, evaluate=lambda: next(metrics), finetune=Fragile(), max_drop=0.1, max_steps=5
        )
        assert report.metric == 0.9
        assert [made.kept for made in report.rounds] == [True, False, False, True, True]
        assert [made.metric for made in report.rounds] == [0.9, None, None, 0.9, 0.9]
        assert report.rounds[2].loss is None
        mpop.plot_trace(report, io.BytesIO())
        assert all(value.isfinite().all() for value in model.state_dict().values())

    def test_a_drop_of_just_the_bound_is_within_it(self) -> None:
        model, tuner = rows_and_tuner()
        metrics = iter([0.8, 0.7])
        report = squeeze(
            model, evaluate=lambda: next(metrics), finetune=tuner, max_drop=0.1, max_steps=1
        )
        assert report.rounds[0].kept

    @pytest.mark.parametrize(
        "name", ["AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adafactor", "NAdam"]
    )
    def test_optimizers_of_torch(self, name: str) -> None:
        model, tuner = rows_and_tuner()
        trained = [p for p in model.parameters() if p.requires_grad]
        more = {"momentum": 0.9} if name == "SGD" else {}
        tuner.optimizer = getattr(torch.optim, name)(trained, lr=1e-3, **more)
        report = squeeze(
            model, evaluate=lambda: 1.0, finetune=tuner, max_drop=0.1, max_steps=3, step=0.1
        )
        assert all(made.kept and made.loss < 1 for made in report.rounds)

    @pytest.mark.parametrize("where", ["tuning", "evaluating", "between"])
    @pytest.mark.parametrize("after", [1, 3])
    def test_killed_and_resumed_it_ends_the_same(
        self, where: str, after: int, tmp_path: Path
    ) -> None:
        def run(state: Path, resume: bool, fuse: float) -> tuple[Rows, mpop.SqueezeReport]:
            model, tuner = rows_and_tuner()
            torch.manual_seed(5 + resume)
            measured, trained, seen = quality(model), tuner.__call__, [0, 0, 0]

            def burn(which: int) -> None:
                seen[which] += 1
                if seen[which] > fuse:
                    raise KeyboardInterrupt

            class Fused:
                optimizer = tuner.optimizer
                state_dict, load_state_dict = tuner.state_dict, tuner.load_state_dict

                def __call__(self) -> float:
                    loss = trained()
                    if where == "tuning":
                        burn(0)
                    return loss

            def evaluate() -> float:
                if where == "evaluating":
                    burn(1)
                torch.rand(3)  # as a DataLoader does, even where it does not shuffle
                return measured()

            report = squeeze(
                model,
                evaluate=evaluate,
                finetune=Fused(),
                max_drop=0.3,
                max_steps=6,
                state=state,
                resume=resume,
                on_round=lambda made: burn(2) if where == "between" else None,
            )
            return model, report

        torch.manual_seed(5)
        whole, expected = run(tmp_path / "whole.pt", False, math.inf)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "state.pt", False, after)
        again, found = run(tmp_path / "state.pt", True, math.inf)
        assert results(found) == results(expected)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name

    @pytest.mark.parametrize("is_tied", [True, False])
    def test_a_transformers_model_with_a_tied_head(self, is_tied: bool) -> None:
        model = build("bert-mlm")
        mpop.compress(model, mpop.CompressionConfig(num_cores=3))
        if not is_tied:  # any more
            model.cls.predictions.decoder = copy.deepcopy(model.cls.predictions.decoder)
        mpop.freeze_central(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        batch = inputs(model)
        rows = [{name: value[k] for name, value in batch.items()} for k in range(2)]

        def collate(given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            made = {name: torch.stack([row[name] for row in given]) for name in given[0]}
            return {**made, "labels": made["input_ids"]}

        tuner = Settler(model, rows, collate, optimizer, batch_size=2, max_steps=2)
        report = squeeze(
            model,
            evaluate=lambda: 1.0,
            finetune=tuner,
            max_drop=0.0,
            max_steps=3,
            step=0.1,
            calibration=None if is_tied else batches(),
        )
        assert report.parameters < 0.85 * report.parameters_before
        head, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
        assert (head.cores[0] is table.cores[0]) == is_tied
        model(**batch)

    def test_with_calibration_what_the_output_does_not_notice_goes_first(
        self, tmp_path: Path
    ) -> None:
        model = build("bert")
        layers = model.base_model.encoder.layer
        unseen = "bert.encoder.layer.1.intermediate.dense"
        torch.nn.init.zeros_(layers[1].output.dense.weight)
        config = mpop.CompressionConfig(embeddings=False, num_cores=2)
        mpop.compress(model, config)
        mpop.freeze_central(model)
        data = batches()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        rows = [{name: value[0] for name, value in data[0].items()}]

        def collate(given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            made = {name: torch.stack([row[name] for row in given]) for name in given[0]}
            return {**made, "labels": torch.zeros(len(given), dtype=torch.int64)}

        tuner = Settler(model, rows, collate, optimizer, batch_size=1, max_steps=1)
        before = {name: module.shape for name, module in mpo_modules(model)}
        report = squeeze(
            model,
            evaluate=lambda: 1.0,
            finetune=tuner,
            max_drop=0.0,
            calibration=data,
            max_steps=1,
            step=0.03,
            state=tmp_path / "state.pt",
        )
        kept = {
            name: module.shape.num_parameters / before[name].num_parameters
            for name, module in mpo_modules(model)
        }
        assert min(kept, key=kept.__getitem__) == unseen and kept[unseen] < 0.8
        assert report.rounds[0].estimate < 0.5
        with pytest.raises(ValueError, match="expected calibration batches for every cut"):
            squeeze(
                model, evaluate=lambda: 1.0, finetune=tuner, max_drop=0.0, calibration=iter(data)
            )

    def test_refusals_leave_the_model_as_it_was(self, tmp_path: Path) -> None:
        model, tuner = rows_and_tuner()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        good: dict[str, Any] = {"evaluate": quality(model), "finetune": tuner, "max_drop": 0.1}
        garbage = tmp_path / "garbage.pt"
        garbage.write_bytes(b"garbage")
        for options, message in [
            ({"max_drop": -1}, "expected max_drop >= 0"),
            ({"max_drop": math.nan}, "expected max_drop >= 0"),
            ({"step": 1.5}, "0.002 <= step < 1"),
            ({"step": 0.001}, "0.002 <= step < 1"),
            ({"max_steps": 0}, "max_steps >= 1"),
            ({"evaluate": lambda: math.nan}, "expected a finite metric, got nan"),
            ({"resume": True}, "expected the state's file"),
            ({"resume": True, "state": garbage}, "garbage.pt: not the state of a squeeze"),
            ({"state": garbage}, "garbage.pt holds a squeeze: resume it, or choose another"),
        ]:
            with pytest.raises(ValueError, match=message):
                squeeze(model, **{**good, **options})
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()), message
        with pytest.raises(ValueError, match="expected a compressed model, got a dense Linear"):
            squeeze(nn.Linear(2, 2), **good)
        small = MPOLinear(24, 30, MPOShape((4, 6), (5, 6), 1))
        with pytest.raises(ValueError, match="nothing to squeeze: every bond is 1"):
            squeeze(nn.Sequential(small), **good)
        other, other_tuner = rows_and_tuner()
        state = tmp_path / "s.pt"
        squeeze(other, **{**good, "finetune": other_tuner}, max_steps=1, state=state)
        with pytest.raises(ValueError, match=r"expected a run of max_drop = 0\.2, got"):
            squeeze(other, **{**good, "max_drop": 0.2}, state=state, resume=True)
        with pytest.raises(ValueError, match="expected a run of task = 'b', got one of None"):
            squeeze(other, **good, state=state, resume=True, settings={"task": "b"})
        for damage in ("cut", "progress"):
            damaged = tmp_path / f"{damage}.pt"
            damaged.write_bytes(state.read_bytes()[:5000])
            if damage == "progress":
                held = torch.load(state, weights_only=True)
                del held["progress"]
                torch.save(held, damaged)
            with pytest.raises(ValueError, match=f"{damage}.pt: not the state of .*, or damaged"):
                squeeze(other, **good, state=damaged, resume=True)
        with pytest.raises(ValueError, match="the state of another model"):
            squeeze(
                nn.Sequential(MPOLinear(24, 30, MPOShape((4, 6), (5, 6)))),
                **good,
                state=tmp_path / "s.pt",
                resume=True,
            )
