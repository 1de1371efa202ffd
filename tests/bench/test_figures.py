"""Committed figures show what lies beside them, and names in a figure can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import drawing, figures
from bench.language import table

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("figures")
    figures.draw(output)
    return output


def shown(path: Path) -> tuple[list[str], list[float]]:
    """The texts of an SVG, and where its marks and the ends of its lines are, in points."""
    texts, places = [], []
    for element in ElementTree.parse(path).getroot().iter():
        if element.tag == f"{_SVG}text":
            texts.append("".join(element.itertext()))
        elif element.tag == f"{_SVG}use":
            places += [float(element.attrib[axis]) for axis in "xy"]
        elif element.tag == f"{_SVG}path" and "clip-path" in element.attrib:
            places += map(float, re.findall(r"-?\d+\.?\d*", element.attrib["d"]))
    return texts, places


def test_what_is_committed_is_what_is_drawn(again: Path) -> None:
    """By texts and places: other versions of matplotlib write other bytes."""

    def names(folder: Path) -> list[Path]:
        kinds = (".svg", ".png")
        return sorted(f.relative_to(folder) for f in folder.rglob("*") if f.suffix in kinds)

    assert names(figures.RESULTS) == names(again)
    for name in names(again):
        assert "dc:date" not in (figures.RESULTS / name).read_text()
        texts, places = shown(again / name)
        assert len(texts) > 5 and len(places) > 20, name
        committed, committed_places = shown(figures.RESULTS / name)
        remedy = f"{name}: python -m bench.figures"
        assert committed == texts, remedy
        assert committed_places == pytest.approx(places, abs=1.0), remedy


def test_the_same_figure_is_the_same_file(again: Path, tmp_path: Path) -> None:
    rows = json.loads((figures.RESULTS / "language" / "table.json").read_text())["rows"]
    table.figure(rows, tmp_path / "table.svg")
    assert (tmp_path / "table.svg").read_bytes() == (again / "language/table.svg").read_bytes()


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
def test_text_and_marks_stand_out(background: str) -> None:
    def luminance(colour: str) -> float:
        """Of WCAG 2, which asks for 3 of a mark and of large text."""
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(f * p for f, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(colour: str) -> float:
        low, high = sorted(map(luminance, (colour, background)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(drawing.TEXT) > 4.2
    assert min(map(contrast, drawing.COLOURS[:4])) > 2.9


def test_names_cover_neither_each_other_nor_a_line(tmp_path: Path) -> None:
    with drawing.figure(tmp_path / "a.svg", 6, 4) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1, 2], [0, 1, 0])
        axes.set(xlim=(-1, 3), ylim=(0, 4))
        marks = [drawing.Mark(1.2, 1 + 0.01 * k, f"name {k}", "left") for k in range(5)]
        drawing.name(axes, marks)
        boxes = [text.get_window_extent() for text in axes.texts]
        (line,) = axes.lines
        path = line.get_path().transformed(line.get_transform())
        assert [text.get_text() for text in axes.texts] == [mark.name for mark in marks]
        for k, box in enumerate(boxes):
            assert not any(map(box.overlaps, boxes[k + 1 :]))
            assert not path.intersects_bbox(box, filled=False)
            assert box.y0 < axes.bbox.y1


def test_what_is_beyond_the_axis_is_said(tmp_path: Path) -> None:
    def row(way: str, ratio: float, perplexity: float | None) -> dict[str, Any]:
        found = None if perplexity is None else (perplexity, 0.1)
        return {"way": way, "bytes": 1e8 * ratio, "perplexity": {"test 512": found}}

    rows = [row("ours", 1.8, 30), row("ours", 1.4, 50), row("svd", 1.8, 9e7), row("svd", 1.4, None)]
    table.figure(rows, tmp_path / "a.svg")
    texts, _ = shown(tmp_path / "a.svg")
    assert "ours" in texts and "svd" not in texts
    whole = " ".join(texts)
    assert "svd at 180 MB, 90,000,000" in whole and "svd at 140 MB, not finite" in whole
