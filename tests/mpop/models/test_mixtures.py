"""Mixtures of experts: held as cores in the place of their parameters, from compressing to merging.

The oracle is the dense model, whose experts transformers computes one by one ("eager").
"""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from saved import edit_config
from tiny_models import MIXTURES, batches, build, inputs, logits
from torch import Tensor, nn

import mpop
from mpo_kernels import MPOExperts
from mpo_kernels.ops import grouped
from mpop.checkpoints.opening import load_as_saved
from mpop.compression import calibration
from mpop.compression.calibration import second_moments
from mpop.models.left import left_dense
from mpop.models.matrices import module_at, mpo_modules, sorted_matrices, weight_of
from mpop.models.subclasses import RoutedExperts
from mpop_serving.configuration import specs_of

UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
LOW_RANK = mpop.CompressionConfig(num_cores=2, compression=0.6, include=("*.experts.*",))


def _dense(name: str) -> hf.PreTrainedModel:
    model = build(name)
    model.set_experts_implementation("eager")
    return model


def _compressed(name: str, **options: Any) -> hf.PreTrainedModel:
    model = build(name)
    mpop.compress(model, mpop.CompressionConfig(**options))
    return model


@pytest.mark.parametrize("cores", [2, 5])
@pytest.mark.parametrize("name", MIXTURES)
def test_full_rank_gives_what_dense_gave_and_its_gradients(name: str, cores: int) -> None:
    dense, model = _dense(name).double(), build(name).double()
    mpop.compress(model, mpop.CompressionConfig(num_cores=cores, include=("*.experts.*",)))
    flow = torch.randn(2, 7, 50, dtype=torch.float64)
    for each in (dense, model):
        found = logits(each)
        torch.testing.assert_close(found, logits(dense))
        found.backward(flow)
    expected, found = dict(dense.named_parameters()), dict(model.named_parameters())
    for key in expected.keys() & found.keys():
        torch.testing.assert_close(found[key].grad, expected[key].grad)
    for key in (UP, DOWN):
        # A step along the gradient of one core changes the loss as that of W does.
        module, core = module_at(model, key), module_at(model, key).cores[0]
        step = torch.randn_like(core)
        change = -module.to_weight()
        with torch.no_grad():
            core.add_(step)
        change += module.to_weight()
        of_weight = expected[key].grad.mT if name == "gpt-oss" else expected[key].grad
        torch.testing.assert_close((core.grad * step).sum(), (of_weight * change).sum())


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_in_fp32_expert_by_expert_and_grouped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, model = logits(_dense(name)), _compressed(name)
    close = 1e-5 * float(right.abs().max())
    for is_grouped in (False, torch.__version__ >= "2.11"):
        if is_grouped:  # by torch's kernel where its sizes allow
            monkeypatch.setattr(grouped, "_has_kernel", lambda x, ns: all(n % 4 == 0 for n in ns))
            monkeypatch.setattr(grouped, "is_compiling", lambda: True)
        torch.testing.assert_close(logits(model), right, rtol=0, atol=close)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_one_projection_may_stay_dense(part: str) -> None:
    model, right = build("gpt-oss"), logits(_dense("gpt-oss")).detach()
    report = mpop.compress(model, mpop.CompressionConfig(include=(f"*.{part}",)))
    assert [row.name for row in report.rows] == [
        f"model.layers.{k}.mlp.experts.{part}" for k in (0, 1)
    ]
    close = 1e-5 * float(right.abs().max())
    torch.testing.assert_close(logits(model).detach(), right, rtol=0, atol=close)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.layers[0].mlp.experts.parameters())


@pytest.mark.parametrize("name", MIXTURES)
def test_saved_and_loaded_and_merged(name: str, tmp_path: Path) -> None:
    model = _compressed(name, num_cores=2, compression=0.6)
    mpop.freeze_central(model)
    right = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), right)
    mpop.save(model, tmp_path / "m")
    loaded = mpop.load(tmp_path / "m").eval()
    assert torch.equal(logits(loaded), right)
    assert isinstance(loaded.model.layers[0].mlp.experts, RoutedExperts)
    assert mpop.count_parameters(loaded) == mpop.count_parameters(model)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(again), right)
    assert f"| `{UP}` | " in (tmp_path / "m" / "README.md").read_text()
    assert left_dense(loaded) == left_dense(model)

    held = module_at(loaded, UP).to_weight()
    merged, original = mpop.merge(loaded), build(name)
    assert torch.equal(weight_of(module_at(merged, UP)), held)
    torch.testing.assert_close(logits(merged), right, rtol=0, atol=1e-6)
    for module, same in zip(merged.modules(), original.modules(), strict=True):
        assert type(module) is type(same)
    merged.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load_as_saved(tmp_path / "dense").eval()), logits(merged))


@pytest.mark.parametrize("factors", ["auto", "interpolative"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_share_a_core(name: str, factors: str, tmp_path: Path) -> None:
    model, dense = build(name), mpop.count_parameters(build(name)).total
    options = {"compression": 0.5, "factors": factors, "embeddings": False}
    config = mpop.CompressionConfig(**options, shared_core=True)
    report = mpop.compress(model, config, batches(16))
    rows = [row for row in report.rows if row.experts > 1]
    assert rows and all(row.shared in (0, 1) and row.output_error < 1 for row in rows)
    for row in rows:
        module = module_at(model, row.name)
        sizes = [core.dim() for core in module.cores]
        assert sizes[row.shared] == 4 and sizes[1 - row.shared] == 5
        assert row.parameters_after == sum(core.numel() for core in module.cores)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    removed = sum(row.parameters_before - row.parameters_after for row in report.rows)
    assert dense - removed == report.parameters_after
    right = logits(model)
    mpop.balance(model)
    mpop.freeze_central(model)
    mpop.save(model, tmp_path)
    loaded = mpop.load(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), right, rtol=0, atol=1e-5)
    shown = {row.name: row.parameters for row in mpop.inspect_model(loaded)}
    assert all(shown[row.name] == row.parameters_after for row in rows)
    merged = mpop.merge(loaded)
    torch.testing.assert_close(logits(merged), right, rtol=0, atol=1e-5)


def test_experts_that_are_copies_lose_nothing_by_sharing() -> None:
    errors = []
    for is_shared in (False, True):
        model = build("mixtral")
        with torch.no_grad():
            for key in (UP, DOWN):
                module_at(model, key).weight[:] = module_at(model, key).weight[:1].clone()
        config = mpop.CompressionConfig(
            compression=0.4, factors="auto", include=(UP, DOWN), shared_core=is_shared
        )
        report = mpop.compress(model, config, batches(16))
        errors.append(max(row.output_error for row in report.rows))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", MIXTURES)
def test_compressed_while_they_are_read(name: str, tmp_path: Path) -> None:
    model, config = build(name), mpop.CompressionConfig(num_cores=2, compression=0.6)
    model.save_pretrained(tmp_path)
    mpop.compress(model, config)
    quantization_config = mpop.MPOConfig(compress=config)
    read = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config
    )
    assert torch.equal(logits(read), logits(model))


def test_light_fine_tuning_trains_the_auxiliary_cores() -> None:
    model = _compressed("mixtral", share=0.1)
    right = logits(model)
    mpop.balance(model)
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-4)
    count = mpop.freeze_central(model)
    assert count.trainable < 0.3 * count.total
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = inputs(model)["input_ids"]
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, module in mpo_modules(model):
        for k, core in enumerate(module.cores):
            is_same = torch.equal(core, before[f"{name}.cores.{k}"])
            assert is_same == (k == module.central), name


def test_what_is_shown_counts_every_expert() -> None:
    model = build("mixtral")
    dense = mpop.count_parameters(model).total
    shown = mpop.format_rows(mpop.inspect_model(model))
    assert f"{UP} × 4" in shown
    report = mpop.compress(model, mpop.CompressionConfig(num_cores=2, ranks=3))
    assert re.search(r"gate_up_proj +4 × 24 × 96 +3 +9,216 +1,152 +0.125", str(report))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    saved = sum(row.parameters_before - row.parameters_after for row in report.rows)
    assert report.parameters_before - saved == report.parameters_after and dense - saved > 0
    (row,) = (row for row in mpop.inspect_model(model) if row.name == UP)
    assert (row.experts, row.parameters, row.shape.ranks) == (4, 1152, (3,))
    spectra = torch.linalg.svdvals(module_at(model, UP).to_weight().view(4, 96, 24))
    assert row.spectra[0].norm() == pytest.approx(float(spectra.norm()) / 2, rel=1e-4)
    json.dumps([report.to_dict(), row.to_dict()])


class Unknown(nn.Module):
    """Experts that say nothing of how they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 96, 24))
        self.down_proj = nn.Parameter(torch.randn(4, 24, 48))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x


def test_experts_that_are_not_known_stay_dense_and_are_reported() -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.experts = Unknown()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    assert not any("experts" in name for names in sorted_matrices(model) for name in names)
    with pytest.warns(UserWarning, match="stays dense: matrices in one tensor, .* of Unknown"):
        report = mpop.compress(model)
    reasons = {part.reason: part.parameters for part in report.left}
    for cls in ("Unknown", "MixtralExperts"):
        reason = f"matrices in one tensor, as experts have, of {cls}"
        assert reasons[reason] == 4 * 72 * 48 and reason in str(report)


class TestCalibration:
    """Moments by what is routed to each expert."""

    def test_they_are_those_of_routed_rows_by_the_square_of_the_gate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # So that some experts are few and have rows.
        monkeypatch.setattr(calibration, "_LEAST", 0.5)
        model, data = _dense("gpt-oss"), batches()
        with pytest.warns(UserWarning, match="experts that less than 50%"):
            found = second_moments(model, data, [(UP,), (DOWN,)])
        experts, seen = model.model.layers[0].mlp.experts, []
        experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            for batch in data:
                model(**batch)
        for key, is_up in ((UP, True), (DOWN, False)):
            sums = torch.zeros(2, 4, *(2 * (24 if is_up else 48,)), dtype=torch.float64)
            rows = torch.zeros(2, 4)
            for number, (batch, (x, index, gates)) in enumerate(zip(data, seen, strict=True)):
                for t in batch["attention_mask"].flatten().nonzero().flatten():
                    for e, gate in zip(index[t], gates[t], strict=True):
                        fed = x[t]
                        if not is_up:
                            weight, bias = experts.gate_up_proj[e], experts.gate_up_proj_bias[e]
                            fed = experts._apply_gate(fed @ weight + bias)
                        fed = (gate * fed).double()
                        sums[int(number % 4 == 1), e] += fed[:, None] * fed
                        rows[int(number % 4 == 1), e] += 1
            torch.testing.assert_close(found[(key,)].judge.double(), sums[1], rtol=1e-4, atol=1e-4)
            n = rows[0, :, None, None].double()
            pooled = sums[0].sum(0) / n.sum()
            is_few = n < 0.5 * rows[0].sum() / 2
            assert is_few.any() and not is_few.all()
            own = torch.where(is_few, 0, n / (n + sums.shape[-1]))
            fit = own * sums[0] + (1 - own) * n * pooled
            torch.testing.assert_close(found[(key,)].fit.double(), fit, rtol=1e-4, atol=1e-4)
            assert found[(key,)].rows == rows[0].sum()

    def test_an_expert_that_few_tokens_reach_is_fitted_to_the_pooled_one(self) -> None:
        model = build("gpt-oss")
        with torch.no_grad():
            for layer, expert in ((0, 2), (1, 0), (1, 1)):
                model.model.layers[layer].mlp.router.bias[expert] = -1e4
        line = r"experts that less than 1% of .* fed: \S+0.mlp.experts 2; \S+1.mlp.experts 0, 1$"
        fed: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, _, gates = (part[batch["attention_mask"].flatten().bool()] for part in inputs)
            fed.append((x[:, None] * gates[..., None]).flatten(0, 1))

        hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
        with torch.no_grad():
            for number, batch in enumerate(batches()):
                if number % 4 != 1:
                    model(**batch)
        hook.remove()
        with pytest.warns(UserWarning, match=line) as warned:
            moments = second_moments(model, batches(), [(UP,), (DOWN,), (f"{UP[:13]}1{UP[14:]}",)])
        assert len(warned) == 1
        rows = torch.cat(fed)
        torch.testing.assert_close(moments[(UP,)].fit[2], rows.t() @ rows / len(rows))

    @pytest.mark.parametrize("name", MIXTURES)
    def test_a_calibrated_cut_loses_less_on_rows_held_out(self, name: str) -> None:
        dense, lost, made = build(name), [], batches(20)
        held = made[16:]
        for data in (None, made[:16]):
            model = build(name)
            report = mpop.compress(model, LOW_RANK, data)
            difference = whole = 0.0
            with torch.no_grad():
                for batch in held:
                    mask = batch["attention_mask"].bool()
                    right, found = (each(**batch).logits[mask] for each in (dense, model))
                    difference += float((found - right).square().sum())
                    whole += float(right.square().sum())
            lost.append((difference / whole) ** 0.5)
        assert lost[1] < 0.95 * lost[0]
        assert all(0 < row.output_error < row.rel_error for row in report.rows)

    def test_under_one_budget(self) -> None:
        model, config = build("mixtral"), mpop.CompressionConfig(factors="auto", compression=0.6)
        before = mpop.count_parameters(model).total
        report = mpop.compress(model, config, batches(16))
        cut = {row.name for row in report.rows}
        assert {UP, DOWN} <= cut
        assert all(row.shape.is_low_rank for row in report.rows if row.experts > 1)
        names = [names for names in sorted_matrices(build("mixtral")) if "lm_head" not in names]
        weights = sum(weight_of(module_at(build("mixtral"), n[0])).numel() for n in names)
        kept = weights - (before - report.parameters_after)
        assert 0.55 * weights < kept <= 0.6 * weights


class TestBadInput:
    """One line, and nothing changed."""

    def test_a_budget_or_a_weight(self) -> None:
        model = build("mixtral")
        with pytest.raises(ValueError, match=f"^{UP}: expected a compression of at least"):
            mpop.compress(
                model, mpop.CompressionConfig(num_cores=2, compression=1e-3, include=[UP])
            )
        with torch.no_grad():
            module_at(model, UP).weight[1, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"^{UP}: expected a finite weight"):
            mpop.compress(model)
        assert not list(mpo_modules(model))
        module_at(model, UP).owner.forward = lambda *args: None
        with pytest.raises(ValueError, match=f"^{UP}: expected a plain MixtralExperts, got .* own"):
            mpop.compress(model)

    @pytest.mark.parametrize(
        ("entry", "line"),
        [
            ({"experts": 5}, r"expected \(kind, \[experts,\] out, in\) = \('experts', 4, 96, 24\)"),
            ({"experts": None}, "bad MPO configuration .* experts: expected a number of them"),
            (
                {"experts": 4, "kind": "linear"},
                "experts: expected a number of them, got 4 of linear",
            ),
            ({"experts": 4, "store": "int8"}, "store: expected one of .* got 'int8' of a experts"),
            ({"shared": 2}, "shared: expected one of 2 cores of experts, got 2 of experts"),
            ({"shared": True}, "shared: expected one of 2 cores of experts, got True of experts"),
        ],
    )
    def test_a_checkpoint(self, entry: dict[str, Any], line: str, tmp_path: Path) -> None:
        mpop.save(_compressed("mixtral", num_cores=2, include=(UP,)), tmp_path)

        def edit(config: dict[str, Any]) -> None:
            config["quantization_config"]["modules"][UP] |= entry

        edit_config(tmp_path, edit)
        with pytest.raises(ValueError, match=line):
            mpop.load(tmp_path)

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"shared_core": 1, "factors": "auto"}, "shared_core: expected True or False, got 1"),
            ({"shared_core": True}, "shared_core: expected factors 'auto' or .* got 'balanced'"),
            (
                {"shared_core": True, "factors": "auto", "objective": "latency"},
                "shared_core: .* the objective 'parameters', got 'auto' and 'latency'",
            ),
        ],
    )
    def test_a_core_to_share(self, options: dict[str, Any], line: str) -> None:
        with pytest.raises((TypeError, ValueError), match=line):
            mpop.CompressionConfig(compression=0.5, **options)

    def test_no_experts_to_share_a_core(self) -> None:
        config = mpop.CompressionConfig(compression=0.5, factors="auto", shared_core=True)
        with pytest.raises(ValueError, match=r"shared_core: expected experts, Bert.* has none"):
            mpop.compress(build("bert"), config)

    def test_what_is_not_done_for_experts_says_so(self) -> None:
        model = _compressed("mixtral", num_cores=2)
        for quantize in (mpop.quantize, mpop.quantize_centres):
            part = copy.deepcopy(model)
            with pytest.warns(UserWarning, match=f"only layers .* of 4 stacks .* {UP}, stay"):
                quantize(part)
            assert isinstance(module_at(part, UP), MPOExperts)
        with pytest.raises(ValueError, match=r"include: expected MPO linears, got '\*.experts.\*'"):
            mpop.quantize(model, include=["*.experts.*"])
        with pytest.raises(
            ValueError, match=f"^{UP}: expected cores of layers, got .*: leave them"
        ):
            mpop.squeeze(model, evaluate=lambda: 1.0, finetune=None, max_drop=0.1)
        with pytest.raises(
            ValueError, match=f"^{UP}: expected experts as dense weights.*--exclude"
        ):
            specs_of(model.config.quantization_config.to_dict())
        with pytest.raises(ValueError, match=r"expected a model of type .*, got mixtral"):
            mpop.export(model, "m.pt2", format="pt2")

    def test_adapters(self) -> None:
        peft = pytest.importorskip("peft")
        from mpop.peft import LightConfig

        model = _compressed("mixtral", num_cores=2)
        with pytest.raises(ValueError, match=f"^{UP}: expected cores of layers, .*: name other"):
            peft.get_peft_model(model, LightConfig())
        with pytest.raises(TypeError, match=f"^{UP}: LoRA takes MPO linears, got experts"):
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["gate_up_proj"]))
        right = logits(model)
        adapted = peft.get_peft_model(model, LightConfig(target_modules=["q_proj"]))
        assert torch.equal(logits(adapted), right)
