"""The model card of a compressed model: how it is loaded, what it came from, what was cut."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from mpop.models.left import describe_left, left_dense
from mpop.models.light import count_bytes, count_parameters
from mpop.models.matrices import (
    compressed_matrices,
    matrices_in,
    module_at,
    parameters_of,
    sizes,
    spec_of,
)

# From the sentence that says what the matrices are to the one that says what their errors are.
_WRITTEN = re.compile(
    r"^[^\n]* whose matrices are matrix product operators: .* before any training after it\.$",
    re.DOTALL | re.MULTILINE,
)


def model_card(
    model: PreTrainedModel, *, base_model: str | None = None, license: str | None = None
) -> str:
    """The text of a `README.md` for the hub, with its metadata.

    Args:
        base_model: the name on the hub of what was compressed; by default what the model was
            loaded from, unless that is a folder.
        license: of the model, an identifier of the hub's, such as `"apache-2.0"`.

    Raises:
        ValueError: a model without MPO modules.
    """
    modules = [(names[0], module_at(model, names[0])) for names in compressed_matrices(model)]
    if not modules:
        raise ValueError(f"expected a compressed model, got a dense {type(model).__name__}")
    source = base_model or _source(model)
    data = ModelCardData(
        base_model=source, license=license, library_name="transformers", tags=["mpo", "mpop"]
    )
    total = count_parameters(model).total
    counts = [parameters_of(module) for _, module in modules]
    held, of_dense = (sum(each) for each in zip(*counts, strict=True))
    dense = total + of_dense - held
    rows = [
        f"| `{name}` | {sizes(module.shape, matrices_in(module))} "
        f"| {'·'.join(map(str, module.shape.in_factors))} "
        f"| {'·'.join(map(str, module.shape.out_factors))} "
        f"| {' '.join(map(str, module.shape.ranks))} | {own / whole:.3f} "
        f"| {_error(getattr(module, 'rel_error', None))} |"
        for (name, module), (own, whole) in zip(modules, counts, strict=True)
    ]
    cls = type(model).__name__
    left = describe_left(left_dense(model), dense)
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(source).name if source else cls}, compressed",
        f"{f'`{source}`' if source else f'A {cls}'} whose "
        "matrices are matrix product operators: chains of small cores, contracted without ever "
        f"forming the weight. {total:,} parameters, {total / dense:.3f} of the {dense:,} of the "
        f"dense model; the {sum(matrices_in(module) for _, module in modules)} matrices have "
        f"{held / of_dense:.3f} of theirs. {_sizes(model)}",
        "```\n" + "\n".join(left) + "\n```",
        "```python\n"
        "import mpop  # teaches from_pretrained to read it; without it the weights are random\n\n"
        'model = mpop.load("this repository")\n'
        "```\n\n"
        '`pip install "mpo-kernels[mpop]"`; `mpop.load` fails rather than start from weights that '
        "are not there, and `mpop merge` gives a plain checkpoint back.",
        "| matrix | in × out | in factors | out factors | ranks | parameters / dense "
        "| error when cut |\n|---|---|---|---|---|---:|---:|\n" + "\n".join(rows),
        "The error is ‖W − MPO‖ / ‖W‖ when the matrix was decomposed, before any training after "
        "it.",
    ]
    return "\n\n".join(lines) + "\n"


def _sizes(model: PreTrainedModel) -> str:
    """The bytes of the tensors, and which of them are quantised."""
    size = count_bytes(model)
    text = f"The matrices take {size.matrices:,} bytes, the model {size.total:,}."
    specs = [spec_of(module_at(model, names[0])) for names in compressed_matrices(model)]
    stores = Counter(spec.store for spec in specs if spec.store is not None)
    for store, count in stores.items():
        text += f" {count} of the matrices have cores in {store}, which are served and not trained."
    if count := sum(spec.form is not None for spec in specs):
        text += f" {count} are held as rows of theirs and what makes the other rows of these."
    return text


def renewed_card(
    old: str, model: PreTrainedModel, *, base_model: str | None = None, license: str | None = None
) -> str:
    """A card whose part that `model_card` writes is brought up to date; one without it is kept.

    What somebody has written beside it stays, unless the card is that of another base model.
    """
    written = _WRITTEN.search(old)
    if written is None:
        return old
    data = ModelCard(old, ignore_metadata_errors=True).data
    known = data.get("base_model")
    base_model = base_model or _source(model) or known
    new = model_card(model, base_model=base_model, license=license or data.get("license"))
    if known != base_model:
        return new
    part = _WRITTEN.search(new)
    assert part is not None
    return old[: written.start()] + part[0] + old[written.end() :]


def _source(model: PreTrainedModel) -> str | None:
    """The name on the hub of what the model was loaded from; a folder's tells nobody anything."""
    source = model.config._name_or_path
    return None if not source or Path(source).exists() or Path(source).is_absolute() else source


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
