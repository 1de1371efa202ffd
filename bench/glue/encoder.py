"""What tables of one encoder share: their options, and files that name their conditions."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.results import text_of
from mpop.demo import default_model

Found = dict[str, Any]


def table(
    name: str,
    description: str | None,
    argv: Sequence[str],
    settings: dict[str, tuple[Any, str]],
    measure: Callable[[argparse.Namespace], Found],
    markdown: Callable[[Found, dict[str, Any]], list[str]],
) -> None:
    """Measure, write `name.json` and `name.md` into the folder asked for, print the latter.

    Args:
        name: of the files; the module is `bench.glue.{name}`.
        settings: the default and the help of each option of its own.
        measure: of the options; what is found, for JSON.
        markdown: of what was found and its conditions; lines, to which versions and the command
            are added.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.glue.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help=f"folder of {name}.json and {name}.md")
    parser.add_argument("--data-dir", help="a folder in GLUE's own layout; without it the hub")
    parser.add_argument("--model", help="a hub name or a folder (all-MiniLM-L6-v2, from pip)")
    for option, (default, meaning) in settings.items():
        flag = f"--{option.replace('_', '-')}"
        parser.add_argument(
            flag, type=type(default), default=default, help=f"{meaning} ({default})"
        )
    options = parser.parse_args(argv)
    named = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    options.model = options.model or str(default_model())
    found = measure(options)
    settled = {option: getattr(options, option) for option in settings}
    conditions = facts.conditions(
        *(f"bench.glue.{name}", argv, torch.device("cpu"), "transformers"), model=named, **settled
    )
    versions, git = conditions["versions"], conditions["git"]
    lines = [
        *markdown(found, conditions),
        f"torch {versions['torch']}, transformers {versions['transformers']}; commit "
        f"{(git['commit'] or 'none')[:12]}{' with changes' * git['dirty']}.",
        "",
        f"`{conditions['command']}`",
    ]
    output, text = Path(options.output), "\n".join(lines) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    content = text_of({"conditions": conditions, **found})
    (output / f"{name}.json").write_text(content, encoding="utf-8")
    (output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def say(text: str) -> None:
    """A line of progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
