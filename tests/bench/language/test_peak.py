"""Memory of a cut, small, and in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench.language import peak


def test_two_cuts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        peak.main(command[3:])
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(peak.subprocess, "run", run)
    peak.main(["--layers", "3", "--width", "32", "--inner", "64"])
    said = capsys.readouterr().out
    assert "3 blocks, weights 0.1 MB" in said
    rows = [line for line in said.splitlines() if line.startswith(("| one", "| all"))]
    assert [float(row.split("|")[2]) for row in rows] == [0.1, 0.4]
    assert peak.moments_of_a_block(32, 64) == 4 * (2 * (6 * 32**2 + 64**2) + 5 * 32**2 + 2 * 64**2)
