"""Every figure in `results/` drawn again from what lies beside it: `python -m bench.figures`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import drawing, facts
from bench.glue import report
from bench.language import table
from mpop.benchmark import draw_benchmark

RESULTS = facts.ROOT / "bench" / "results"


def draw(output: Path = RESULTS) -> None:
    """Draw them into the same folders of `output`."""
    for folder in ("glue", "glue/share", "language", "model"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("glue", "glue/share"):
        trace = RESULTS / folder / "trace.jsonl"
        lines = trace.read_text(encoding="utf-8").splitlines() if trace.exists() else []
        rows = _json(f"{folder}/table.json")["rows"]
        report.figures(rows, list(map(json.loads, lines)), output / folder)
    table.figure(_json("language/table.json")["rows"], output / "language" / "table.svg")
    with drawing.figure(output / "model" / "half.svg", 6, 4) as drawn:
        draw_benchmark(_json("model/half.json"), drawn.subplots())


def _json(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
