"""The `mpop` command: the whole method from the shell."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

OBJECTIVES = ("parameters", "memory", "latency")
EXPORTS = ("onnx", "pt2", "aoti")

EPILOG = """examples:
  mpop finetune --model bert-base-uncased --task rte --method light --output rte-light
  mpop evaluate --model rte-light --task rte
  mpop compress --model bert-base-uncased --compression 0.5 --output bert-half
  mpop compress --model rte-dense --compression 0.5 --factors auto --calibrate rte --output half
  mpop squeeze --model rte-light --task rte --max-drop 0.01 --output rte-small
  mpop inspect --model bert-half --plot spectra.png
  mpop merge --model rte-light --output rte-dense
  mpop bench --model bert-half --plot bench.png
  mpop export --model bert-half --format onnx --output bert-onnx

`mpop COMMAND --help` lists a command's options. Bad arguments and files end with exit code 2.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's); returns the exit code."""
    options = vars(_parser().parse_args(argv))
    command, run, as_json = (options.pop(name) for name in ("command", "run", "json"))
    try:
        # Whatever libraries print, stdout's last line is the result.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result, text = run(**options)
    except ModuleNotFoundError as error:
        extra = "export" if command == "export" else "mpop"
        remedy = f'pip install "mpo-kernels[{extra}]"'
        return _fail(command, f"{error.name} is not installed; install it with: {remedy}")
    except (ValueError, OSError) as error:
        return _fail(command, error)
    except FloatingPointError as error:
        return _fail(command, error, code=1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", code=130)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result) if as_json else text)
    return 0


def _fail(command: str, error: object, code: int = 2) -> int:
    line = str(error).strip().partition("\n")[0]
    print(f"mpop {command}: error: {line}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpop",
        description="Compress transformers with matrix product operators (MPO) and fine-tune them "
        "lightly: the central tensors, which hold most parameters, stay frozen.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_compress(commands)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_squeeze(commands)
    _add_inspect(commands)
    _add_merge(commands)
    _add_bench(commands)
    _add_export(commands)
    return parser


def _command(commands: Any, name: str, summary: str, run: Callable[..., Any]) -> _Parser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="M", help="a hub name or a folder")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of stdout, all else to stderr",
    )
    return parser


def _add_output(parser: _Parser) -> None:
    parser.add_argument("--output", required=True, metavar="O", help="the folder to write")


def _add_compress(commands: Any) -> None:
    parser = _command(commands, "compress", "Decompose a model's matrices into MPOs.", _compress)
    _add_output(parser)
    parser.add_argument(
        "--num-cores", type=_positive_int, default=5, metavar="N", help="tensors a matrix (5)"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--ranks",
        type=_positive_int,
        nargs="+",
        metavar="D",
        help="one cap for every bond, or one rank for each; without a budget the rank is full",
    )
    budget.add_argument(
        "--rel-error",
        type=_positive_float,
        metavar="E",
        help="truncate each matrix to this relative Frobenius error",
    )
    budget.add_argument(
        "--compression",
        type=_positive_float,
        metavar="R",
        help="keep this fraction of each matrix's parameters",
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
        choices=("balanced", "auto"),
        default="balanced",
        help="auto: for each matrix the member of the family that loses least, within "
        "--compression over all of them (balanced: --num-cores even factors)",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="parameters",
        help="what --compression counts with --factors auto (parameters)",
    )
    parser.add_argument(
        "--rows",
        type=_positive_int,
        default=1,
        metavar="N",
        help="rows of x that memory and latency are meant for (1)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=_positive_int,
        default=1,
        metavar="N",
        help="choose factors that can be dealt to so many devices when serving (1)",
    )
    parser.add_argument(
        "--calibrate",
        type=_task,
        metavar="TASK",
        help="fit what the layers' outputs lose on this GLUE task's training rows",
    )
    parser.add_argument(
        "--calibration-samples",
        type=_positive_int,
        default=1500,
        metavar="N",
        help="rows to calibrate with (1500)",
    )
    _add_data_dir(parser)


def _add_finetune(commands: Any) -> None:
    parser = _command(commands, "finetune", "Fine-tune on a GLUE task and evaluate.", _finetune)
    _add_output(parser)
    _add_data(parser)
    parser.add_argument(
        "--method",
        choices=("dense", "full", "light"),
        default="dense",
        help="dense: ordinary fine-tuning; full: compress at full rank, train every tensor; "
        "light: the same with the central tensors frozen (dense)",
    )
    parser.add_argument(
        "--centre-bits",
        type=int,
        choices=(4, 8),
        help="hold the frozen centres of a light run in so many bits while it trains",
    )
    _add_training_set(parser)
    parser.add_argument(
        "--epochs", type=_positive_float, default=3.0, metavar="N", help="passes over the data (3)"
    )
    parser.add_argument(
        "--learning-rate",
        type=_positive_float,
        metavar="LR",
        help="peak rate of all but MPO tensors (5e-5; light 1e-4)",
    )
    parser.add_argument(
        "--mpo-learning-rate",
        type=_positive_float,
        metavar="LR",
        help="peak rate of the trained MPO tensors (--learning-rate)",
    )
    parser.add_argument(
        "--gradient-accumulation-steps",
        type=_positive_int,
        default=1,
        metavar="N",
        help="batches per optimizer step (1)",
    )
    parser.add_argument(
        "--save-steps", type=_positive_int, metavar="N", help="write a checkpoint every N steps"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output"
    )
    parser.add_argument(
        "--report-to", default="none", metavar="NAME", help="a tracker, e.g. tensorboard (none)"
    )


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "Evaluate a fine-tuned model on a task.", _evaluate)
    _add_data(parser)
    parser.add_argument(
        "--predictions", metavar="FILE", help="write the model's outputs as a .npz archive"
    )


def _add_squeeze(commands: Any) -> None:
    parser = _command(
        commands,
        "squeeze",
        "Cut the bonds that carry least while a task's metric holds, with light fine-tuning.",
        _squeeze,
    )
    _add_output(parser)
    _add_data(parser, ("fp32", "bf16"))
    parser.add_argument(
        "--max-drop",
        type=_fall,
        required=True,
        metavar="D",
        help="how far the metric may fall, as a fraction of 1: 0.01 is a point",
    )
    parser.add_argument(
        "--max-rounds", type=_positive_int, default=50, metavar="N", help="cuts at most (50)"
    )
    parser.add_argument(
        "--step",
        type=_positive_float,
        default=0.05,
        metavar="F",
        help="fraction of the cores' parameters that the first round cuts (0.05)",
    )
    parser.add_argument(
        "--settle-steps",
        type=_positive_int,
        default=200,
        metavar="N",
        help="optimizer steps between two cuts at most (200)",
    )
    parser.add_argument(
        "--window",
        type=_positive_int,
        default=20,
        metavar="N",
        help="steps whose mean loss tells whether it has settled (20)",
    )
    parser.add_argument(
        "--learning-rate",
        type=_positive_float,
        default=2e-5,
        metavar="LR",
        help="constant rate (2e-5)",
    )
    _add_training_set(parser)
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=1500,
        metavar="N",
        help="training rows that show what a cut costs; 0: matrices' own errors do (1500)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the squeeze in --output")


def _add_training_set(parser: _Parser) -> None:
    parser.add_argument(
        "--eval-split",
        choices=("dev", "train-holdout"),
        default="dev",
        help="train-holdout: evaluate on training rows held out, to choose settings (dev)",
    )
    parser.add_argument(
        "--max-train-samples", type=_positive_int, metavar="N", help="train on a fixed subset"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of head, data order, dropout (0)"
    )


def _add_data_dir(parser: _Parser) -> None:
    parser.add_argument(
        "--data-dir",
        metavar="D",
        help="a folder of <TASK>/{train,dev}.tsv in GLUE's own layout; without it the hub is used",
    )


def _add_data(parser: _Parser, precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")) -> None:
    parser.add_argument("--task", required=True, type=_task, help="a GLUE task, e.g. rte or SST-2")
    _add_data_dir(parser)
    parser.add_argument(
        "--batch-size", type=_positive_int, default=32, metavar="N", help="rows per device (32)"
    )
    parser.add_argument(
        "--max-length", type=_positive_int, default=128, metavar="N", help="tokens a row (128)"
    )
    parser.add_argument(
        "--max-eval-samples", type=_positive_int, metavar="N", help="evaluate on a fixed subset"
    )
    parser.add_argument("--precision", choices=precisions, default="fp32", help="autocast (fp32)")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", "List a model's matrices: shapes, ranks, entropies.", _inspect
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the singular values of each bond")


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands, "merge", "Turn an MPO model back into a plain transformers checkpoint.", _merge
    )
    _add_output(parser)


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "Time a compressed model beside its dense self on this machine.",
        _bench,
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_positive_int,
        default=[1, 8, 32],
        metavar="N",
        help="texts at a time (1 8 32)",
    )
    parser.add_argument(
        "--length", type=_positive_int, default=128, metavar="N", help="tokens a text (128)"
    )
    parser.add_argument(
        "--new-tokens",
        type=_positive_int,
        default=32,
        metavar="N",
        help="tokens to generate, where the model does (32)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (fp32)"
    )
    parser.add_argument(
        "--repeats", type=_positive_int, default=10, metavar="N", help="calls timed (10)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw tokens per second")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", "Write a model as a program that runs without this package.", _export
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="O",
        help="onnx: the folder to write onnx/model.onnx, config and tokenizer in; "
        "else the .pt2 file to write",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=EXPORTS,
        help="onnx; pt2: for torch.export.load; aoti: compiled for this machine by AOTInductor",
    )


def _compress(model: str, output: str, **options: Any) -> tuple[dict[str, Any], str]:
    import mpop
    from mpop.pretrained import check_output, copy_companions, load_as_saved

    check_output(output, model)
    ranks = options["ranks"]
    if ranks and len(ranks) == 1:
        options["ranks"] = ranks[0]
    task, samples, data_dir = (
        options.pop(name) for name in ("calibrate", "calibration_samples", "data_dir")
    )
    config = mpop.CompressionConfig(**options)
    batches = None
    if task is not None:
        from mpop.finetune import calibration_batches

        batches = calibration_batches(model, task, data_dir, samples)
    loaded = load_as_saved(model)
    report = mpop.compress(loaded, config, batches)
    mpop.save(loaded, output)
    copy_companions(model, output)
    return {"model": model, "output": output, **report.to_dict()}, str(report)


def _inspect(model: str, plot: str | None) -> tuple[dict[str, Any], str]:
    import mpop
    from mpop.pretrained import load_as_saved

    loaded = load_as_saved(model)
    rows = mpop.inspect_model(loaded)
    if plot:
        mpop.plot_spectra(loaded, plot)
    result = {"model": model, "rows": [row.to_dict() for row in rows]}
    return result, mpop.format_rows(rows)


def _merge(model: str, output: str) -> tuple[dict[str, Any], str]:
    import mpop
    from mpop.pretrained import check_output, copy_companions, load_as_saved

    check_output(output, model)
    merged = mpop.merge(load_as_saved(model))
    merged.save_pretrained(output)
    copy_companions(model, output)
    total = mpop.count_parameters(merged).total
    result = {"model": model, "output": output, "total_parameters": total}
    return result, f"{output}: a dense {type(merged).__name__} with {total:,} parameters"


def _export(model: str, output: str, format: str) -> tuple[dict[str, Any], str]:
    import mpop
    from mpop.export import check_request
    from mpop.pretrained import copy_companions, load_as_saved

    check_request(Path(output), format)
    made = mpop.export(load_as_saved(model).float(), output, format)
    if format == "onnx":
        copy_companions(model, output)
    result = {"model": model, "output": output, "format": format, **made._asdict()}
    text = f"{output}: {made.bytes / 1e6:.1f} MB, outputs within {made.error:.1e} of the model's"
    return result, text


def _finetune(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    from mpop.finetune import finetune

    result = finetune(model, **options)
    return result, _table(result)


def _evaluate(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    from mpop.finetune import evaluate

    result = evaluate(model, **options)
    return result, _table(result)


def _squeeze(model: str, **options: Any) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from mpop.squeeze_task import squeeze_on_task

    def show(made: Any) -> None:
        tqdm.write(
            f"round {made.step}: {made.cuts} bonds cut, {made.parameters:,} parameters, "
            f"metric {math.nan if made.metric is None else made.metric:.4f}, "
            f"{'kept' if made.kept else 'undone'}",
            file=sys.stderr,
        )

    result = squeeze_on_task(model, on_round=show, **options)
    text = (
        f"{result['output']}: {result['parameters']:,} of {result['parameters_before']:,} "
        f"parameters, {result['metric_name']} {result['metric']:.4f} "
        f"(before: {result['metric_before']:.4f})"
    )
    if result["parameters"] == result["parameters_before"]:
        text += f"; no cut was within --max-drop {result['max_drop']}"
    return result, text


def _bench(model: str, plot: str | None, **options: Any) -> tuple[dict[str, Any], str]:
    from mpop.benchmark import benchmark, format_benchmark, plot_benchmark

    result = benchmark(model, **options)
    if plot:
        plot_benchmark(result, plot)
    return result, format_benchmark(result)


def _table(result: dict[str, Any]) -> str:
    rows = {
        "task": result["task"],
        **{name: f"{value:.4f}" for name, value in result["metrics"].items()},
        "trained parameters": f"{result['trainable_parameters']:,}",
        "total parameters": f"{result['total_parameters']:,}",
        "training time": f"{result['train_seconds']:.1f} s",
        "peak memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB "
        f"({result['peak_memory_kind']})",
    }
    return "\n".join(f"{name:<22}{value}" for name, value in rows.items())


def _task(text: str) -> str:
    from mpop.glue import get_task

    try:
        return get_task(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")


def _positive_float(text: str) -> float:
    if (value := _finite(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def _fall(text: str) -> float:
    if (value := _finite(text)) >= 0:
        return value
    raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")


def _finite(text: str) -> float:
    """The number, NaN where it is none."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    return math.nan
