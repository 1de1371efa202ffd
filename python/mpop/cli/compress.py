"""`mpop compress`: decompose a model's matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpop.cli.options.parser import command, refuse
from mpop.cli.options.values import positive_float, positive_int, share

FACTORS = ("balanced", "auto", "interpolative")
OBJECTIVES = ("parameters", "memory", "latency")
STORES = ("int8", "float8_e4m3fn")


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "compress", "Decompose a model's matrices into MPOs.", run)
    parser.add_new_output()
    parser.number("--num-cores", 5, "tensors a matrix, where factors are balanced")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--ranks",
        type=positive_int,
        nargs="+",
        metavar="D",
        help="one cap for every bond, or one rank for each; without a budget the rank is full",
    )
    budget.add_argument(
        "--rel-error",
        type=positive_float,
        metavar="E",
        help="truncate each matrix to this relative Frobenius error",
    )
    budget.add_argument(
        "--compression",
        type=positive_float,
        metavar="R",
        help="keep this fraction of each matrix's parameters",
    )
    budget.add_argument(
        "--share",
        type=share,
        metavar="S",
        help="for light fine-tuning: two tensors a matrix at full rank, of which the trained one "
        "holds about this fraction of its parameters",
    )
    parser.add_argument(
        "--include", nargs="+", metavar="PATTERN", help="compress only modules of these names"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="leave these modules dense"
    )
    parser.add_argument(
        "--no-embeddings",
        dest="embeddings",
        action="store_false",
        help="leave the word embeddings dense",
    )
    parser.add_argument(
        "--factors",
        choices=FACTORS,
        default="balanced",
        help="within --compression over all matrices, auto: for each the member of the family that "
        "loses least, interpolative: rows of it and what makes the others of them, for language "
        "models (balanced: --num-cores even factors)",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="parameters",
        help="what --compression counts with --factors auto (parameters)",
    )
    parser.number("--rows", 1, "rows of x that memory and latency are meant for")
    parser.number(
        "--tensor-parallel", 1, "choose factors that can be dealt to so many devices when serving"
    )
    parser.add_argument(
        "--shared-core",
        action="store_true",
        help="let the experts of a layer have one of their two cores in common (with --factors "
        "auto or interpolative)",
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        help="hold the linears' tensors in one byte a number, for serving: they do not train "
        "any more; word embeddings stay as they are",
    )
    parser.add_argument(
        "--calibrate",
        metavar="SOURCE",
        help="fit what the layers' outputs lose on this text: a .txt or .jsonl file (text, or "
        "messages through the chat template), a folder of them, a GLUE task's training rows, or a "
        "data set of the hub, owner/name or owner/name:configuration",
    )
    parser.number("--samples", None, "windows of text to calibrate with (256), or rows (1500)")
    parser.number("--seqlen", None, "tokens of a window (2048), at most what the model takes")
    parser.add_argument("--seed", type=int, metavar="N", help="of which windows are taken (0)")
    parser.add_data_dir()
    parser.add_device()


def run(
    model: str, output: str, overwrite: bool, device: str, **options: Any
) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import torch

    import mpop
    from mpop.checkpoints.folder import replaced, write
    from mpop.checkpoints.opening import check_output, copy_companions, load_as_saved
    from mpop.models.light import count_bytes

    check_output(output, model, *filter(None, [options["calibrate"]]), overwrite=overwrite)
    ranks = options["ranks"]
    if ranks and len(ranks) == 1:
        options["ranks"] = ranks[0]
    asked = {name: options.pop(name) for name in ("samples", "seqlen", "seed", "data_dir")}
    given = {name: value for name, value in asked.items() if value is not None}
    calibrate, store = options.pop("calibrate"), options.pop("store")
    if calibrate is None:
        refuse(given, given, "--calibrate")
    config = mpop.CompressionConfig(**options)
    loaded = load_as_saved(model).to(device)  # type: ignore[arg-type]
    batches = None if calibrate is None else _batches(loaded, model, calibrate, given)
    report = mpop.compress(loaded, config, batches)
    if store is not None:
        mpop.quantize(loaded, getattr(torch, store))
    stored = count_bytes(loaded)
    report = replace(report, bytes_after=stored.total)
    with replaced(output, wholly=overwrite) as folder:
        write(loaded, folder, None if overwrite else Path(output))
        copy_companions(model, folder)
    result = {"model": model, "output": output, **report.to_dict(), "store": store}
    result["matrix_bytes"] = stored.matrices
    return result, str(report)


def _batches(model: Any, name: str, source: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What to calibrate with: a path goes before a GLUE task, and that before the hub."""
    import mpop
    from mpop.checkpoints.opening import load_tokenizer
    from mpop.data.glue import find_task
    from mpop.data.lengths import longest

    if task := None if Path(source).exists() else find_task(source):
        from mpop.finetuning.rows import calibration_batches

        refuse(given, ("seqlen", "seed"), "--calibrate TEXT", "a task")
        rows = given.get("samples", 1500)
        return calibration_batches(model, name, task.name, given.get("data_dir"), rows)
    refuse(given, ("data_dir",), "--calibrate TASK", "a text")
    seqlen = given.pop("seqlen", 2048)
    return mpop.text_batches(
        load_tokenizer(name), source, seqlen=min(seqlen, longest(model) or seqlen), **given
    )
