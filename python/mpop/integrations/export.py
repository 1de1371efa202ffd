"""Exported models: programs that run where neither this package nor transformers is."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedConfig, PreTrainedModel

from mpo_kernels.export import DECOMPOSITIONS
from mpop.data.lengths import longest
from mpop.models.light import modes_kept
from mpop.models.matrices import mpo_matrices

Inputs: TypeAlias = dict[str, Tensor]
Run: TypeAlias = Callable[[Inputs], Tensor]

_ENCODER = ("input_ids", "attention_mask", "token_type_ids")
_DECODER = ("input_ids", "attention_mask", "position_ids")
# What optimum and text-embeddings-inference feed a model of each type; but for positions, which no
# classifier gets.
INPUTS = {
    **dict.fromkeys(("bert", "albert", "electra"), _ENCODER),
    **dict.fromkeys(("distilbert", "roberta", "xlm-roberta", "camembert"), _ENCODER[:2]),
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "qwen3"), _DECODER),
}
# Classes that end so take texts and give logits, or a last hidden state.
CLASSES = (
    *("Model", "ForSequenceClassification", "ForTokenClassification"),
    *("ForMaskedLM", "ForCausalLM"),
)
AXES = {0: "batch_size", 1: "sequence_length"}
TOLERANCE = 1e-4
PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


class Exported(NamedTuple):
    """What was written: its bytes, and how far its outputs are from the model's, relatively."""

    bytes: int
    error: float


def export(model: PreTrainedModel, output: str | os.PathLike[str], format: str) -> Exported:
    """Write a compressed model as a program that needs neither `mpo_kernels` nor `mpop`.

    It takes int64 `[batch, length]` of any sizes up to the model's longest text: `input_ids`,
    `attention_mask` and, as the type of model has it, `token_type_ids` or `position_ids`. It gives
    `last_hidden_state [batch, length, hidden]` or, of a model with a head, `logits`, in fp32.
    Before it takes its place it is run on random batches and compared with the model.

    Args:
        model: an encoder or decoder in fp32, bare or with a head; a decoder's cache is left out.
        output: for `onnx` a folder, which gets `onnx/model.onnx` and `config.json`; else a file
            whose name ends in `.pt2`.
        format: `onnx`; `pt2`, for `torch.export.load`; or `aoti`, compiled for this machine and
            device by AOTInductor, for `torch._inductor.aoti_load_package`.

    Raises:
        ValueError: another format, a dense model, quantised centres or matrices, a type of model
            or a head that cannot be exported, another dtype, or an output that cannot be written.
        OSError: likewise, or `aoti` without a C++ compiler.
        ModuleNotFoundError: `onnx` without its packages.
        FloatingPointError: the program's outputs are not the model's.
    """
    output = Path(output).resolve()
    check_request(output, format)
    _check_model(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        modes_kept(model),
        torch.no_grad(),
        TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary,
    ):
        model.eval()
        new, module = Path(temporary) / output.name, _Named(model)
        error = _compare(_FORMATS[format](module, new), module)
        size = sum(file.stat().st_size for file in (new, *new.rglob("*")) if file.is_file())
        _place(new, output)
    return Exported(size, error)


def check_request(output: Path, format: str) -> None:
    """Check, before a model is loaded, the format, the packages it needs, and the output.

    Raises:
        ValueError, ModuleNotFoundError: see :func:`export`.
    """
    from mpop.checkpoints.opening import check_writable

    if format not in _FORMATS:
        raise ValueError(f"format: expected one of {', '.join(_FORMATS)}, got {format!r}")
    for package in ("onnxscript", "onnxruntime") if format == "onnx" else ():
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f'{package} is not installed: pip install "mpo-kernels[export]"', name=package
            )
    if format != "onnx":
        if output.suffix != ".pt2" or output.is_dir():
            raise ValueError(f"expected a file whose name ends in .pt2, got {output}")
        return check_writable(output.parent)
    if output.suffix == ".onnx":
        raise ValueError(f"expected a folder, which gets onnx/model.onnx, got {output}")
    check_writable(output)
    if any(output.glob("*.safetensors")):
        raise ValueError(f"{output} holds a saved model; choose another output folder")


def _check_model(model: PreTrainedModel) -> None:
    name, kind = type(model).__name__, model.config.model_type
    if not mpo_matrices(model):
        raise ValueError(f"expected a compressed model, got a dense {name}: mpop.compress cuts it")
    if kind not in INPUTS:
        raise ValueError(f"expected a model of type {', '.join(INPUTS)}, got {kind}")
    if not name.endswith(CLASSES):
        raise ValueError(f"expected a class that ends in {', '.join(CLASSES)}, got a {name}")
    dtypes = {tensor.dtype for tensor in model.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(f"expected a model in torch.float32, got {dtypes.pop()}: .float() casts")


class _Named(nn.Module):
    """The model with one tensor, by its name, as output: nothing of transformers is in that."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.output = "last_hidden_state" if model.base_model is model else "logits"
        self.inputs = INPUTS[model.config.model_type]
        self.options: dict[str, Any] = {"return_dict": True}
        if self.inputs == _DECODER:
            self.options["use_cache"] = False
            if type(model).__name__.endswith("Classification"):
                self.inputs = _DECODER[:2]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        more = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **{name: tensor for name, tensor in more.items() if tensor is not None},
            **self.options,
        )
        return {self.output: outputs[self.output]}

    @property
    def longest(self) -> int:
        """Positions of a text."""
        found = longest(self.model)
        assert found is not None  # every type of `INPUTS` counts its positions
        return found

    def sample_sizes(self) -> tuple[int, int]:
        """Rows and length to trace with: where they divide a size, they may be taken for it."""
        sizes = {size for tensor in self.parameters() for size in tensor.shape}
        apart = [p for p in PRIMES if p <= self.longest and all(size % p for size in sizes)]
        length, rows, *_ = dict.fromkeys((*apart, *PRIMES))
        return rows, length

    def batch(self, rows: int, length: int) -> Inputs:
        """Random texts, padded but for one in each batch."""
        config, device = self.model.config, self.model.device

        def random(limit: int) -> Tensor:
            return torch.randint(limit, (rows, length), dtype=torch.int64, device=device)

        lengths = torch.randint(1, length + 1, (rows, 1), dtype=torch.int64, device=device)
        lengths[0] = length
        positions = torch.arange(length, dtype=torch.int64, device=device).expand(rows, length)
        made = {
            "input_ids": random(config.vocab_size),
            "attention_mask": (positions < lengths).long(),
            "token_type_ids": random(getattr(config, "type_vocab_size", 1)),
            "position_ids": random(length),
        }
        return {name: made[name] for name in self.inputs}


def _program(module: _Named) -> ExportedProgram:
    inputs = module.batch(*module.sample_sizes())
    axes = {0: Dim(AXES[0]), 1: Dim(AXES[1], max=module.longest)}
    program = torch.export.export(
        module, (), inputs, dynamic_shapes=dict.fromkeys(inputs, axes)
    ).run_decompositions(DECOMPOSITIONS)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of files that are not where it runs
    return program


def _to_onnx(module: _Named, folder: Path) -> Run:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime import InferenceSession

    config = copy.deepcopy(module.model.config)
    vars(config).pop("quantization_config", None)
    config.architectures = [type(module.model).__name__]
    config.save_pretrained(folder)
    _spell_out(config, folder / "config.json")
    first, *others = module.inputs
    # Left as it is: optimised, the file would hold products of cores beside or instead of cores.
    made = torch.onnx.export(
        _program(module),
        output_names=[module.output],
        dynamic_shapes={first: AXES, **dict.fromkeys(others)},
        optimize=False,
        verbose=False,
    )
    assert made is not None
    ClearMetadataAndDocStringPass()(made.model)
    file = folder / "onnx" / "model.onnx"
    file.parent.mkdir()
    made.save(file, external_data=False)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run([module.output], arrays)[0])

    return run


def _spell_out(config: PreTrainedConfig, file: Path) -> None:
    """Write what transformers leaves to its defaults and other names, and others need to be told.

    text-embeddings-inference looks for a classifier's labels, of which transformers leaves out two
    unnamed ones, and for sizes that DistilBERT has under names of its own (router/src/lib.rs and
    backends/ort/src/lib.rs there).
    """
    written = json.loads(file.read_text(encoding="utf-8"))
    names = ["id2label", "label2id"]
    if config.model_type == "distilbert":
        names += ["hidden_size", "num_hidden_layers"]
    written |= {name: getattr(config, name) for name in names}
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _to_pt2(module: _Named, file: Path) -> Run:
    torch.export.save(_program(module), file)
    program = torch.export.load(file).module()
    return lambda inputs: program(**inputs)[module.output]


def _to_aoti(module: _Named, file: Path) -> Run:
    try:
        get_cpp_compiler()  # refuses here what would be refused after all the work
        program = _program(module)
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    except (InductorError, InvalidCxxCompiler) as error:
        raise OSError(f"AOTInductor cannot compile here: {error}") from error
    compiled = torch._inductor.aoti_load_package(str(file))
    return lambda inputs: compiled(**inputs)[module.output]


_FORMATS = {"onnx": _to_onnx, "pt2": _to_pt2, "aoti": _to_aoti}


def _compare(run: Run, module: _Named) -> float:
    """The largest relative difference on batches of other sizes than the sample's."""
    rows, length = module.sample_sizes()
    worst = 0.0
    for sizes in ((1, length - 2), (rows + 2, min(length + 3, module.longest))):
        inputs = module.batch(*sizes)
        expected, found = module(**inputs)[module.output], run(inputs).to(module.model.device)
        if expected.dim() == 3:  # what stands at padding means nothing
            expected, found = (y[inputs["attention_mask"].bool()] for y in (expected, found))
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise FloatingPointError(
                f"the program's outputs differ from the model's by {error:.1e} of the largest on a "
                f"batch {list(sizes)}, expected at most {TOLERANCE}; nothing was written"
            )
        worst = max(worst, error)
    return worst


def _place(new: Path, output: Path) -> None:
    """Move a file, or the files of a folder into another."""
    if new.is_file():
        new.replace(output)
        return
    output.mkdir(exist_ok=True)
    for part in sorted(new.iterdir()):
        _place(part, output / part.name)
