"""What is shown of work that takes minutes."""

from __future__ import annotations

import io
import itertools
import sys
import time

import pytest

from mpop.compression.work import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve seconds between two looks."""
    monkeypatch.setattr(time, "monotonic", itertools.count(100.0, 12.0).__next__)


@pytest.mark.usefixtures("clock")
def test_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abcdefg", "letter")) == list("abcdefg")
    assert capsys.readouterr().err.splitlines() == ["letter 3 of 7, 36 s", "letter 6 of 7, 72 s"]
    assert list(progress(iter("abc"), "letter")) == list("abc")
    assert list(progress(iter("abc"), "letter", 9)) == list("abc")
    said = ["letter 3, 36 s", "letter 3 of 9, 36 s"]
    assert capsys.readouterr().err.splitlines() == said


def test_nothing_of_what_is_done_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress("abc", "letter")) == list("abc")
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress("abc", "letter")) == list("abc")
    assert terminal.getvalue() == ""
