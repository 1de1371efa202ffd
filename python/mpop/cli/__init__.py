"""The `mpop` command: the whole method from the shell, a module a command."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from mpop.cli import (
    bench,
    compress,
    evaluate,
    export,
    finetune,
    heal,
    inspect,
    merge,
    perplexity,
    squeeze,
)
from mpop.cli.options.parser import Parser, flag

COMMANDS = (
    *(compress, finetune, evaluate, heal, perplexity),
    *(squeeze, inspect, merge, bench, export),
)

EPILOG = """examples:
  mpop finetune --model bert-base-uncased --task rte --method light --output rte-light
  mpop evaluate --model rte-light --task rte
  mpop compress --model rte-dense --compression 0.5 --factors auto --calibrate rte --output half
  mpop compress --model LLAMA --compression 0.8 --factors interpolative --no-embeddings \\
    --calibrate text.jsonl --output small
  mpop heal --model small --teacher LLAMA --text text.jsonl --output healed
  mpop perplexity --model small --against LLAMA --text test.txt
  mpop squeeze --model rte-light --task rte --max-drop 0.01 --output rte-small
  mpop inspect --model half --plot spectra.png
  mpop merge --model rte-light --output rte-dense
  mpop bench --model half --plot bench.png
  mpop export --model half --format onnx --output half-onnx

`mpop COMMAND --help` lists a command's options. Bad arguments and files end with exit code 2.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's); returns the exit code."""
    options = vars(_parser().parse_args(argv))
    command, run, as_json = (options.pop(name) for name in ("command", "run", "json"))
    # A variable of the shell that is not set; as a path it would be the folder at hand.
    if empty := next((name for name, value in options.items() if value == ""), None):
        return _fail(command, f"{flag(empty)}: expected a value, got an empty one")
    try:
        # Whatever libraries print, stdout's last line is the result.
        quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with quiet, warnings.catch_warnings():
            warnings.showwarning = partial(_warn, command)
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


def _warn(command: str, message: Warning | str, category: type[Warning], *_: Any) -> None:
    line = str(message).strip().partition("\n")[0]
    print(f"mpop {command}: warning: {line}", file=sys.stderr)


def _fail(command: str, error: object, code: int = 2) -> int:
    line = str(error).strip().partition("\n")[0]
    print(f"mpop {command}: error: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mpop",
        description="Compress transformers with matrix product operators (MPO) and fine-tune them "
        "lightly:\nthe central tensors, which hold most parameters, stay frozen.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.add(commands)
    return parser
