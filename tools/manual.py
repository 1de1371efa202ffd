"""What mkdocs adds to the pages of `docs/`: formulas, measured tables, the help of each command."""

from __future__ import annotations

import html
import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from mpop.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add `bench/results` as pages and pictures, and the reference of the command line."""
    for path in sorted((ROOT / "bench/results").rglob("*")):
        if path.suffix in (".md", ".svg"):
            address = path.relative_to(ROOT / "bench").as_posix()
            files.append(File.generated(config, address, abs_src_path=str(path)))
    page = "\n".join(["# The command line", *map(_help, ["", *map(_name, COMMANDS)])])
    files.append(File.generated(config, "reference/command-line.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead what a page says of `bench/results`, which lies beside `docs`, to the pages of it."""
    return markdown.replace("../bench/results/", "results/")


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML, which needs no script to be read, of what arithmatex has found."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: convert(
            html.unescape(found[2]), display="block" if found[1] == "div" else "inline"
        ),
        content,
        flags=re.DOTALL,
    )


def _name(command: Any) -> str:
    return command.__name__.rpartition(".")[2]


def _help(command: str) -> str:
    os.environ.update(COLUMNS="95", NO_COLOR="1")
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        main([*command.split(), "--help"])
    return f"\n## mpop {command}\n\n```text\n{text.getvalue()}```\n"
