"""The parser of a command, and options that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from mpop.cli.options.values import device, positive_int, task


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def number(
        self,
        flag: str,
        default: float | None,
        help: str,
        kind: Callable[[str], float] = positive_int,
        metavar: str = "N",
    ) -> None:
        """An option with a positive number, whose default is said."""
        shown = "" if default is None else f" ({default:g})".replace("e-0", "e-")
        self.add_argument(flag, type=kind, default=default, metavar=metavar, help=help + shown)

    def add_output(self) -> None:
        """The folder to write."""
        self.add_argument("--output", required=True, metavar="O", help="the folder to write")

    def add_new_output(self, replaced: str = "all files in it, not the folders") -> None:
        """The folder to write, which holds no model unless it may be replaced."""
        self.add_output()
        self.add_argument(
            "--overwrite",
            action="store_true",
            help=f"where --output holds a model, replace {replaced}",
        )

    def add_device(self, what: str = "decompose") -> None:
        """Where the work is done."""
        self.add_argument(
            "--device",
            type=device,
            default="cpu",
            metavar="D",
            help=f"{what} there, e.g. on cuda (cpu)",
        )

    def add_training_set(self) -> None:
        """Which rows are trained on, and the seed."""
        self.add_argument(
            "--eval-split",
            choices=("dev", "train-holdout"),
            default="dev",
            help="train-holdout: evaluate on training rows held out, to choose settings (dev)",
        )
        self.number("--max-train-samples", None, "train on a fixed subset")
        self.add_argument(
            "--seed", type=int, default=0, metavar="N", help="of head, data order, dropout (0)"
        )

    def add_data_dir(self) -> None:
        """Where the data is."""
        self.add_argument(
            "--data-dir",
            metavar="D",
            help="a folder of <TASK>/{train,dev}.tsv in GLUE's own layout; "
            "without it the hub is used",
        )

    def add_data(
        self, precisions: tuple[str, ...] = ("fp32", "bf16", "fp16"), choice: Any = None
    ) -> None:
        """The task, or another of a required `choice`, its data, and how it is batched."""
        (choice or self).add_argument(
            "--task", required=choice is None, type=task, help="a GLUE task, e.g. rte or SST-2"
        )
        self.add_data_dir()
        self.number("--batch-size", 32, "rows per device")
        self.number("--max-length", 128, "tokens a row")
        self.number("--max-eval-samples", None, "evaluate on a fixed subset")
        self.add_argument("--precision", choices=precisions, default="fp32", help="autocast (fp32)")


def command(commands: Any, name: str, summary: str, run: Callable[..., Any]) -> Parser:
    """A command of this name that `run` carries out, with the options that every command has."""
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="M", help="a hub name or a folder")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of stdout, all else to stderr",
    )
    return parser


def flag(name: str) -> str:
    """The option that sets a value of this name."""
    return f"--{name.replace('_', '-')}"


def refuse(given: Collection[str], names: Iterable[str], without: str, got: str = "none") -> None:
    """Refuse options that mean nothing without another.

    Raises:
        ValueError: one of `names` is among those given.
    """
    if wrong := next((name for name in names if name in given), None):
        raise ValueError(f"{flag(wrong)}: expected {without} with it, got {got}")


def metrics_table(result: dict[str, Any]) -> str:
    """The results of a run on a task as lines that a person can read."""
    rows = {
        "task": result["task"],
        **{name: f"{value:.4f}" for name, value in result["metrics"].items()},
        "trained parameters": f"{result['trainable_parameters']:,}",
        "total parameters": f"{result['total_parameters']:,}",
        **({"training time": f"{seconds:.1f} s"} if (seconds := result["train_seconds"]) else {}),
        "peak memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB "
        f"({result['peak_memory_kind']})",
    }
    return "\n".join(f"{name:<22}{value}" for name, value in rows.items())
