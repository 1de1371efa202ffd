"""Figures and tiles measured on a device: kept, read back, and preferred to what is assumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from mpo_kernels import MPOLinear, MPOShape, calibration
from mpo_kernels import __main__ as command
from mpo_kernels.backends.triton import tuning
from mpo_kernels.backends.triton.tiles import FEW_ROWS, LIMITS, Chain, TwoParts, matrix_tiles
from mpo_kernels.planning import figures, measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPO_KERNELS_CACHE", str(tmp_path / "cache"))
    figures.forget()
    yield tmp_path / "cache"
    figures.forget()


def test_what_is_put_is_got_and_the_rest_stays() -> None:
    assert measured.get("a device", "tiles", "k") is None
    measured.put("a device", "tiles", "k", {"seconds": 1.0})
    measured.put("a device", "tiles", "l", {"seconds": 2.0})
    measured.put("a device", "figures", "k", 3)
    assert measured.get("a device", "tiles", "k") == {"seconds": 1.0}
    assert measured.get("a device", "figures", "k") == 3
    assert measured.get("another", "tiles", "k") is None
    assert [p.name for p in measured.path_of("a device").parent.iterdir()] == ["a-device.json"]


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"tiles": 3}'])
def test_a_broken_file_counts_as_empty_and_says_so(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = measured.path_of("a device")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert measured.get("a device", "tiles", "k") is None
    assert str(path) in caplog.text
    measured.put("a device", "tiles", "k", 1)
    assert json.loads(path.read_text()) == {"tiles": {"k": 1}}


def test_calibrated_figures_replace_the_defaults() -> None:
    default = figures.device_figures(CPU, torch.float32)
    value = {
        "macs_per_second": 1.0,
        "bytes_per_second": 2.0,
        "launch_seconds": 3.0,
        "host_seconds": 0.0,
    }
    measured.put(measured.device_name(CPU), "figures", "torch.float32", value)
    figures.forget()
    found = figures.device_figures(CPU, torch.float32)
    assert (found.macs_per_second, found.bytes_per_second, found.launch_seconds) == (1, 2, 3)
    assert found.panel_bytes == default.panel_bytes


def test_calibrate_measures_and_stores(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["calibrate", "--device", "cpu", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert Path(said["file"]).exists()
    found = figures.device_figures(CPU, torch.float32)
    assert said["figures"]["float32"]["macs_per_second"] == found.macs_per_second
    assert 1e8 < found.macs_per_second < 1e13 and 1e-8 < found.launch_seconds < 1e-3


@pytest.mark.parametrize(("graphs", "host"), [((), 2e-6), (("--graphs",), 0.0)])
def test_graphs_are_calibrated_without_the_host(
    graphs: tuple[str, ...], host: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_launch_seconds", lambda device: (1e-6, 2e-6))
    command.main(["calibrate", "--device", "cpu", *graphs])
    found = figures.device_figures(CPU, torch.float32)
    assert (found.launch_seconds, found.host_seconds) == (1e-6, host)


def test_calibrate_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["calibrate", "--device", "nonsense"])
    assert "cannot use device" in capsys.readouterr().err


def test_a_measured_tile_comes_before_the_model() -> None:
    problem, limits = Chain(16, 8, 8, 16, 4, 128, 128, True), LIMITS["sm_90"]
    assumed = tuning.best("chain", problem, 64, torch.bfloat16, limits)
    slower = tuning.TILES["chain"](problem, 64, 2, limits)[5][1]
    assert assumed is not None and not assumed.measured and assumed.tile != slower
    key = f"chain {tuple(problem)} 64 bfloat16"
    measured.put("sm_90", tuning.section(), key, {"seconds": 1e-6, "tile": slower._asdict()})
    assert tuning.best("chain", problem, 64, torch.bfloat16, limits) == (1e-6, slower, True)


@pytest.mark.parametrize("stored", [3, {}, {"seconds": 1.0, "tile": {"block_b": 16}}])
def test_a_tile_that_does_not_fit_the_kernels_is_not_used(
    stored: object, caplog: pytest.LogCaptureFixture
) -> None:
    problem, limits = Chain(16, 8, 8, 16, 4, 128, 128, True), LIMITS["sm_90"]
    key = f"chain {tuple(problem)} 64 bfloat16"
    measured.put("sm_90", tuning.section(), key, stored)
    with caplog.at_level(logging.WARNING):
        best = tuning.best("chain", problem, 64, torch.bfloat16, limits)
    assert best is not None and not best.measured
    assert "is not used" in caplog.text or not stored


@pytest.mark.parametrize(
    "stored", [{"bogus": 1}, {"macs_per_second": 0}, 3, dict.fromkeys(figures._MEASURED, "x")]
)
def test_broken_figures_are_not_used(stored: object, caplog: pytest.LogCaptureFixture) -> None:
    measured.put(measured.device_name(CPU), "figures", "torch.float32", stored)
    figures.forget()
    with caplog.at_level(logging.WARNING):
        found = figures.device_figures(CPU, torch.float32)
    assert found.macs_per_second > 1e9 and "not used" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPO_KERNELS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        measured.put("a device", "tiles", "k", 1)
    assert "not kept" in caplog.text


@pytest.mark.parametrize("rows, error", [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_a_number_of_rows_is_asked_for(rows: object, error: type[Exception]) -> None:
    layer = MPOLinear(6, 8, MPOShape((2, 3), (4, 2), 2))
    for method in (layer.plan, layer.merged):
        with pytest.raises(error, match="row"):
            method(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_every_problem_has_a_tile_that_fits(limits: object, dtype: torch.dtype, rows: int) -> None:
    sizes = [
        (1, 1, 1, 1, 1),
        (4096, 1, 1, 4096, 64),
        (1, 4096, 4096, 1, 64),
        (3, 5, 7, 11, 2),
        (48, 20, 6, 96, 5),
        (12, 16, 64, 192, 96),
        (172, 16, 16, 172, 100),
        (64, 64, 64, 172, 512),
    ]
    for a_in, a_out, b_in, b_out, rank in sizes:
        features = (a_in * b_in, a_out * b_out)
        parts = TwoParts(a_in, a_out, b_in, b_out, rank, *features)
        chain = Chain(a_in, a_out, b_in, b_out, rank, *features, first_minor=True)
        for kernel in tuning.TILES:
            if kernel.startswith("matrix") or (kernel == "chain" and rows > FEW_ROWS):
                continue  # offered where they are fast
            if kernel == "chain" and features == (1, 1):
                continue  # whose parts are no less than half of W
            problem = chain if kernel == "chain" else parts
            best = tuning.best(kernel, problem, rows, dtype, limits)  # type: ignore[arg-type]
            assert best is not None and best.seconds > 0, (kernel, problem)


@pytest.mark.parametrize("gradient", [False, True])
def test_rows_as_matrices_where_they_fit(gradient: bool) -> None:
    balanced = Chain(64, 64, 64, 64, 16, 4096, 4096, first_minor=False)

    def tiles(problem: Chain, rows: int, itemsize: int, name: str) -> tuple[object, ...]:
        return matrix_tiles(problem, rows, itemsize, LIMITS[name], gradient)

    assert tiles(balanced, 64, 2, "sm_90") and tiles(balanced, 4096, 2, "sm_80")
    assert not tiles(balanced, 4096, 4, "sm_90")  # fp32
    assert not tiles(balanced, 4096, 2, "gfx942")  # the state would pass through memory
    wide = balanced._replace(first_in=512)
    assert not tiles(wide, 4096, 2, "sm_90")  # k, of which all is one block
    assert tiles(balanced, 1, 2, "sm_90")
