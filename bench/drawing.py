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
_SIDES: dict[str, dict[str, Any]] = {
    "right": {"xytext": (8, 0), "ha": "left"},
    "left": {"xytext": (-8, 0), "ha": "right"},
}


class Mark(NamedTuple):
    """A place in data coordinates, its name, and on which side of it that stands if it can."""

    x: float
    y: float
    name: str
    side: str = "right"


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches, which is written to an SVG file at the end."""
    from matplotlib import cycler, rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        drawn.savefig(path, metadata={"Date": None, "Creator": None})


def name(axes: Any, marks: Iterable[Mark]) -> None:
    """Write names beside marks; limits are final.

    Where one would cover a line or a name it stands on the other side, or as much higher as it has
    to, whichever is nearer.
    """
    axes.figure.draw_without_rendering()
    taken: list[Any] = []
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines]

    def lifted(note: Any) -> tuple[int, Any]:
        box, lift = note.get_window_extent(), 0
        while any(map(box.overlaps, taken)) or any(
            line.intersects_bbox(box, filled=False) for line in lines
        ):
            box, lift = box.translated(0, 1), lift + 1
        return lift, box

    for mark in sorted(marks, key=lambda each: each.y):
        found = []
        for side in sorted(_SIDES, key=lambda side, mark=mark: side != mark.side):
            note = axes.annotate(
                mark.name,
                (mark.x, mark.y),
                textcoords="offset points",
                va="center_baseline",
                **_SIDES[side],
            )
            found.append((note, *lifted(note)))
        note, lift, box = min(found, key=lambda each: each[1])
        for other, *_ in found:
            if other is not note:
                other.remove()
        note.xyann = (note.xyann[0], 72 / axes.figure.dpi * lift)
        taken.append(box)
