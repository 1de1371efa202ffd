"""Which matrices can be held as cores: what a model does with them decides, not its name."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_models import batches, build, inputs, logits
from torch import Tensor, nn

import mpop
from mpo_kernels import MPOEmbedding, MPOLinear
from mpop.models.left import left_dense
from mpop.models.matrices import dense_matrices, mpo_modules, sorted_matrices
from mpop.models.reads import weights_read

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
BART = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 20,
    "scale_embedding": True,
}


def scatter(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.t()


class Block(nn.Module):
    """Layers that are called, asked, and read in every way that a model's code takes."""

    def __init__(self, splits: int = 1) -> None:
        super().__init__()
        self.splits = splits
        names = ("called", "asked", "straight", "passed", "looked_up")
        names += ("returned_", "aliased", "when_split", "branch")
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.listed = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.called_list = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.inner = Inner()
        self.given = nn.Linear(4, 4)

    def returned(self) -> nn.Module:
        return self.returned_

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.asked.weight, Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.device)
        x = self.called(self.asked(x)) + self.asked.weight.shape[0] + self.asked.weight.size(1)
        assert self.asked.weight is not None
        x = self.straight.weight @ x
        x = product(x, self.passed)
        x = F.linear(x, getattr(self, "looked_up").weight)  # noqa: B009
        x = F.linear(x, self.returned().weight)
        layer = self.aliased
        weight = layer.weight
        x = F.linear(x, weight)
        if self.splits > 1:
            x = F.linear(x, self.when_split.weight)
        if x.is_cuda and self.training:
            x = F.linear(x, self.branch.weight)
        for number, layer in enumerate(self.listed[:2]):
            x = x + number * torch.matmul(x, layer.weight)
        for layer in self.called_list:
            x = layer(x)
        return self.inner(x, table=self.given)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_another_name = nn.Linear(4, 4)

    def forward(me, x: Tensor, table: nn.Module) -> Tensor:
        return x @ table.weight + me.by_another_name.weight


READ = {
    "inner.by_another_name",
    "straight",
    "passed",
    "looked_up",
    "returned_",
    "aliased",
    "branch",
    "given",
}
LISTED = {f"listed.{k}" for k in range(3)}


@pytest.mark.parametrize("splits", [1, 2])
def test_every_way_to_read_a_weight_is_found(splits: int) -> None:
    block = Block(splits)
    names = {module: name for name, module in block.named_modules()}
    found = {names[module]: reader for module, reader in weights_read(block).items()}
    assert found.keys() == READ | LISTED | ({"when_split"} if splits > 1 else set())
    assert found["straight"] == "Block.forward" and found["given"] == "Inner.forward"
    assert found["passed"] == "product"


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (
            lambda: hf.MambaForCausalLM(
                hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
            ),
            {"x_proj", "dt_proj", "out_proj"},
        ),
        (lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SIZES)), set()),
        (
            lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SIZES, legacy=False)),
            {"word_embeddings"},
        ),
        (
            lambda: hf.PerceiverForMaskedLM(
                hf.PerceiverConfig(
                    **{"vocab_size": 50, "d_model": 32, "num_latents": 8, "d_latents": 32},
                    **{"num_self_attends_per_block": 1, "num_self_attention_heads": 4},
                    **{"num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32},
                    max_position_embeddings=20,
                )
            ),
            set(),  # not the word embeddings, by its own account
        ),
        (
            lambda: hf.BloomForCausalLM(
                hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
            ),
            set(),
        ),
    ],
    ids=["mamba", "deberta", "deberta-new", "perceiver", "bloom"],
)
def test_a_model_that_reads_a_weight_keeps_it_dense(make, reads: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter(make())
    key = "inputs" if isinstance(model, hf.PerceiverForMaskedLM) else "input_ids"
    batch = {key: torch.randint(3, 50, (2, 8))}
    with torch.no_grad():
        right = model(**batch).logits
        report = mpop.compress(model)
        torch.testing.assert_close(model(**batch).logits, right, atol=1e-4, rtol=1e-4)
        stayed = {
            n[0].split(".")[-1]
            for n, why in sorted_matrices(model).items()
            if "read" in (why or "")
        }
        assert stayed == reads
        assert any("read by" in part.reason for part in report.left) == bool(reads)
        mpop.save(model, tmp_path / "m")
        again = mpop.load(tmp_path / "m").eval()
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
        torch.testing.assert_close(mpop.merge(again)(**batch).logits, right, atol=1e-4, rtol=1e-4)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, training=self.training))


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-5, 5)


class OfSequences(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if x.dim() < 3 else 2)


class Large(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if self.weight.shape[0] > 3 else x)


class Written(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Named(nn.Linear):
    """Nothing but another name."""


def test_a_linear_of_its_own_class_is_taken_where_it_computes_the_same() -> None:
    model = build("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.query.__class__, attention.key.__class__ = Named, Scaled
    other = model.bert.encoder.layer[1].attention.self
    other.query.__class__, other.key.__class__, other.value.__class__ = Written, Noisy, Written
    other.value.gain = 2.0  # which it might use another time
    for layer, cls in zip(model.bert.encoder.layer, (Clamped, OfSequences), strict=True):
        layer.output.dense.__class__ = cls
    model.bert.encoder.layer[0].intermediate.dense.__class__ = Large
    right, state = logits(model), torch.random.get_rng_state()
    report = mpop.compress(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(attention.query, MPOLinear) and isinstance(attention.key, Scaled)
    assert isinstance(other.query, MPOLinear)
    assert type(other.key) is Noisy and type(other.value) is Written
    torch.testing.assert_close(logits(model), right, atol=1e-4, rtol=1e-4)
    stayed = {part.reason for part in report.left}
    names = ("Scaled", "Noisy", "Written", "Clamped", "OfSequences", "Large")
    assert {f"of a class of its own, {name}" for name in names} <= stayed


EMBEDDINGS = {
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "mbart": lambda: hf.MBartForCausalLM(hf.MBartConfig(**BART)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
class TestAnEmbeddingOfItsOwnClass:
    def made(self, name: str) -> tuple[hf.PreTrainedModel, dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model = scatter(EMBEDDINGS[name]())
        ids = torch.randint(3, 50, (2, 8))
        batch = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids[:, :5]
        with torch.no_grad():
            return model, batch, model(**batch).logits

    def test_is_compressed_with_its_head(self, name: str, tmp_path: Path) -> None:
        model, batch, _ = self.made(name)
        owner = type(model.get_input_embeddings())
        mpop.compress(model, mpop.CompressionConfig(include=["lm_head"], compression=0.9))
        assert isinstance(model.lm_head, MPOLinear)
        table = model.get_input_embeddings()
        assert isinstance(table, MPOEmbedding) and isinstance(table, owner)
        model.tie_weights()
        with torch.no_grad():
            cut = model(**batch).logits
        assert model.lm_head.cores[0] is table.cores[0]
        mpop.save(model, tmp_path / "m")
        with torch.no_grad():
            for again in (
                mpop.load(tmp_path / "m").eval(),
                copy.deepcopy(model),
                torch.load(self.pickled(model), weights_only=False),
            ):
                torch.testing.assert_close(again(**batch).logits, cut)
            merged = mpop.merge(model)
            torch.testing.assert_close(merged(**batch).logits, cut, atol=1e-4, rtol=1e-4)
        assert type(merged.get_input_embeddings()) is owner
        assert merged.lm_head.weight is merged.get_input_embeddings().weight

    @staticmethod
    def pickled(model: nn.Module) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return file

    def test_changes_nothing_at_full_rank_nor_as_codes(self, name: str) -> None:
        model, batch, right = self.made(name)
        mpop.compress(model)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, right, atol=1e-4, rtol=1e-4)
        model.lm_head = nn.Linear(32, 50)  # an embedding that a head shares stays as it is
        with torch.no_grad():
            right = model(**batch).logits
            mpop.quantize_centres(model, 8)
            got = model(**batch).logits
            assert (got - right).norm() < 0.05 * right.norm()
            mpop.dequantize_centres(model)
            torch.testing.assert_close(model(**batch).logits, got, atol=1e-4, rtol=1e-4)


def test_embeddings_over_one_table_scale_it_each_in_its_way() -> None:
    torch.manual_seed(0)
    model = scatter(EMBEDDINGS["bart"]())
    model.model.decoder.embed_tokens.embed_scale = 3.0
    batch = {"input_ids": torch.randint(3, 50, (2, 8)), "decoder_input_ids": torch.ones(2, 3).int()}
    right = model(**batch).logits
    mpop.compress(model)
    torch.testing.assert_close(model(**batch).logits, right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mpop.merge(model)(**batch).logits, right, atol=1e-4, rtol=1e-4)


class TestWhatIsLeftDense:
    def test_every_parameter_is_counted_once(self) -> None:
        model = build("albert-mlm")
        before = sum(part.parameters for part in left_dense(model))
        assert before == mpop.count_parameters(model).total
        report = mpop.compress(model, mpop.CompressionConfig(exclude=["*.ffn"]))
        cores = {id(core): core.numel() for _, m in mpo_modules(model) for core in m.cores}
        left = sum(part.parameters for part in report.left)
        assert left == report.parameters_after - sum(cores.values())
        assert report.to_dict()["left_dense"] == [part._asdict() for part in report.left]
        assert str(report).count("left dense: ") == 1 and "not selected" in str(report)
        assert f"left dense: {left:,} parameters" in mpop.model_card(model)


def test_matrices_that_share_one_core_are_not_balanced() -> None:
    model = build("bert")
    mpop.compress(model)
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    centre = first.query.central
    second.query.cores[centre] = first.query.cores[centre]
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def squeeze(model: hf.PreTrainedModel) -> None:
        mpop.squeeze(model, evaluate=lambda: 0.0, finetune=lambda: None, max_drop=0.1)

    for change in (mpop.balance, squeeze):
        with pytest.raises(ValueError, match=r"0\.attention.*query and .*1\.attention.* share"):
            change(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # A head shares all of them: it is the same matrix.
    tied = build("bert-mlm")
    mpop.compress(tied)
    right = logits(tied)
    mpop.balance(tied)
    torch.testing.assert_close(logits(tied), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_reaches_nothing(dtype: torch.dtype) -> None:
    def results(model: hf.PreTrainedModel) -> list[Tensor]:
        config = mpop.CompressionConfig(compression=0.5, factors="auto", embeddings=False)
        mpop.compress(model, config, calibration=calibration)
        found = [model(**batch).logits]
        mpop.quantize_centres(model, 4)
        found.append(model(**batch).logits)
        mpop.dequantize_centres(model)
        mpop.balance(model)
        return [*found, model(**batch).logits]

    model, calibration = build("bert"), batches(8)
    batch, twin = inputs(model), copy.deepcopy(model)
    right = results(model)
    torch.set_default_dtype(dtype)
    try:
        got = results(twin)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_only_word_embeddings_are_candidates() -> None:
    names = {names[0] for names in dense_matrices(build("bert"))}
    assert "bert.embeddings.word_embeddings" in names
    assert "bert.embeddings.position_embeddings" not in names
