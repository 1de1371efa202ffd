"""What is predicted of the timed cases is what the planner says now."""

from __future__ import annotations

from bench.gpu import predicted
from bench.gpu.static import RESULTS


def test_the_committed_predictions_are_the_planners() -> None:
    assert (RESULTS / "predicted.md").read_text(encoding="utf-8") == predicted.table()
