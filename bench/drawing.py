"""How figures look: colours that the colour-blind tell apart, names at marks, any background."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# 4.3 : 1 against white and against the dark pages of code hosts.
TEXT = "#7a7a7a"
# Of Okabe and Ito, best contrast with both first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE = {
    **dict.fromkeys(_COLOURED, TEXT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 11,
    "grid.color": TEXT,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "savefig.transparent": True,
    # Text stays text, and what is drawn again is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",
}


class Mark(NamedTuple):
    """A place in data coordinates, its name, and on which side of it the name stands."""

    x: float
    y: float
    name: str
    side: str = "right"


@contextmanager
def style() -> Iterator[None]:
    """In which what matplotlib draws looks like the other figures."""
    from matplotlib import cycler, rc_context

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        yield


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches, which is written to an SVG file at the end."""
    from matplotlib.figure import Figure

    with style():
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        drawn.savefig(path, metadata={"Date": None, "Creator": None})


def name(axes: Any, marks: Iterable[Mark]) -> None:
    """Write names beside marks, higher where one would cover a line or a name; limits are final."""
    axes.figure.draw_without_rendering()
    taken: list[Any] = []
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    for mark in sorted(marks, key=lambda each: each.y):
        is_right = mark.side == "right"
        note = axes.annotate(
            mark.name,
            (mark.x, mark.y),
            (8 if is_right else -8, 0),
            textcoords="offset points",
            ha="left" if is_right else "right",
            va="center_baseline",
        )
        box, lift = note.get_window_extent(), 0
        while any(map(box.overlaps, taken)) or any(
            line.intersects_bbox(box, filled=False) for line in lines
        ):
            box, lift = box.translated(0, 1), lift + 1
        note.xyann = (note.xyann[0], 72 / axes.figure.dpi * lift)
        taken.append(box)
