"""Calibration: second moments of inputs and gradients, what they are of, and what is refused."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from tiny_models import BUILDERS, assert_unchanged, batches, build, inputs, state
from torch import Tensor, nn

import mpop
from mpop.compression import calibration
from mpop.compression.calibration import Calibration, second_moments
from mpop.models.matrices import dense_matrices, is_embedding, module_at, weight_of
from mpop.models.selection import select

CONFIG = mpop.CompressionConfig(compression=0.5, factors="auto", embeddings=False)


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
