"""The benchmark's own promises: honest ways, right accounts, a report, a run that resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import facts
from bench.layer import goals, measure, report, run
from bench.layer.cases import FACTORISATIONS, QUICK, ROWS, SHAPES, STANDARD, Case, select
from bench.layer.measure import Roofline, interleave
from bench.layer.problem import TOLERANCE, Problem, Step
from bench.layer.run import Settings, run_point
from bench.layer.ways import OTHER_MPO_WAYS, SERVING, WAYS, Reconstruct, estimate
from bench.results import load
from mpo_kernels import MPOShape

CPU = torch.device("cpu")
ROOFLINE = Roofline(macs_per_second=5e10, bytes_per_second=2e10, gemm_size=2048, copy_bytes=2**28)
ODD_SHAPES = {
    "padded": MPOShape((2, 3, 4), (3, 2, 5), 4, in_features=23, out_features=27),
    "five": MPOShape((2, 1, 3, 2, 2), (1, 2, 2, 3, 2), (2, 3, 5, 2)),
    "two": MPOShape((5, 3), (2, 7), 3),
    "low rank": MPOShape.low_rank(9, 11, 4),
}
EAGER = [name for name in WAYS if name != "compiled"]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on a busy machine wait for each other: these tests time nothing of interest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes) -> Settings:
    base = Settings(CPU, torch.float32, ("ours", "dense", "reconstruct"), 0.001, ROOFLINE, 2**33)
    return replace(base, **changes)


@pytest.mark.parametrize("name", ("forward", "forward+backward", "light"))
@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
@pytest.mark.parametrize("way", EAGER)
def test_every_way_agrees_with_dense(way: str, shape: MPOShape, name: str) -> None:
    problem = Problem(shape, 6, CPU, torch.float64)
    step = Step(WAYS[way], problem, name)
    error, _ = step.checked()
    assert error is None if way == "lowrank" else error <= TOLERANCE[torch.float64]
    frozen = [p for p in step.module.parameters() if not p.requires_grad]
    if name == "light" and WAYS[way].is_mpo:
        central = shape.core_shapes[shape.central]
        assert [p.numel() for p in frozen] == [torch.Size(central).numel()]
    if name == "forward+backward":
        assert not frozen and len(step()) == 1 + len(list(step.module.parameters()))


def test_compiled_way_agrees_with_dense() -> None:
    step = Step(WAYS["compiled"], Problem(ODD_SHAPES["two"], 6, CPU, torch.float32), "forward")
    step()
    assert step.checked()[0] <= TOLERANCE[torch.float32]


def test_registry_makes_every_shape() -> None:
    for size, (ins, outs) in SHAPES.items():
        for factorisation in FACTORISATIONS:
            shape = Case(size, factorisation, 1).shape
            assert (shape.in_features, shape.out_features) == (ins, outs)
    for blocks in (STANDARD, QUICK):
        points = select(blocks=blocks)
        assert len(set(points)) == len(points)
    assert len(select(["768x768"], ["n3-d64"])) == 3 * len(ROWS)
    with pytest.raises(ValueError, match="expected shapes"):
        select(["769x768"])


def test_bytes_of_known_steps() -> None:
    shape, rows = MPOShape((4, 2), (2, 8), 3), 5
    problem = Problem(shape, rows, CPU, torch.float32)
    x, y, weight, bias = (4 * n for n in (rows * 8, rows * 16, 8 * 16, 16))
    forward = Step(WAYS["dense"], problem, "forward").checked()[1]
    assert (forward.peak, forward.saved) == (y, 0)
    dense = Step(WAYS["dense"], problem, "forward+backward").checked()[1]
    assert (dense.saved, dense.saved_activations) == (x + weight, x)
    assert dense.peak == y + x + weight + bias
    ours = Step(WAYS["ours"], problem, "light").checked()[1]
    assert (ours.saved, ours.saved_activations) == (x + 4 * shape.num_parameters, x)


def test_estimates_follow_the_path() -> None:
    shape, rows = MPOShape((3, 5), (7, 2), 4), 6
    (il, ir), (jl, jr), (d,) = shape.in_factors, shape.out_factors, shape.ranks
    chain = rows * d * jl * ir * (il + jr)
    rebuilt = d * il * jl * ir * jr + rows * il * ir * jl * jr
    assert estimate(WAYS["tensordot"], shape, rows, 4, False).macs == chain
    assert estimate(WAYS["reconstruct"], shape, rows, 4, False).macs == rebuilt
    assert estimate(WAYS["dense"], shape, rows, 4, True).macs == 3 * rows * 15 * 14


def test_interleaved_timings_are_all_there() -> None:
    timings = interleave({"a": lambda: None, "b": lambda: sum(range(20000))}, 0.002, CPU)
    assert set(timings) == {"a", "b"}
    for timing in timings.values():
        assert 3 <= timing.repeats <= 30
        assert timing.q1_us <= timing.median_us <= timing.q3_us


@pytest.mark.parametrize("capture", [True, False])
def test_on_a_gpu_replays_are_timed_or_calls_with_all_of_the_hosts_time(
    capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    happens = lambda name: lambda *_, **__: events.append(name)  # noqa: E731
    event = SimpleNamespace(record=happens("clock"), synchronize=int, elapsed_time=lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", happens("wait"))
    monkeypatch.setattr(measure, "captured", lambda _: SimpleNamespace(replay=happens("replay")))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=happens("flush")))
    timed = measure._interleave_cold({"a": happens("call")}, 1e-9, 2, CPU, capture)
    # Were the device still at the flush, the host would start a call while no clock runs.
    sample = ["flush", "clock", "replay"] if capture else ["flush", "wait", "clock", "call"]
    assert events == 2 * [*sample, "clock"]
    assert timed["a"].captured == capture and timed["a"].median_us == 1000


def test_a_wrong_or_greedy_way_is_reported_and_not_timed(monkeypatch) -> None:
    class Wrong(Reconstruct):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setitem(WAYS, "reconstruct", replace(WAYS["reconstruct"], build=Wrong))
    monkeypatch.setitem(WAYS, "tensordot", replace(WAYS["tensordot"], build=lambda *_: 1 / 0))
    case = Case("64x64", "n2-d16", 2)
    problem = Problem(case.shape, case.rows, CPU, torch.float32)
    chosen = settings(ways=("ours", "dense", "reconstruct", "tensordot"))
    ways = run_point(case, "forward", problem, chosen)["ways"]
    assert [way["status"] for way in ways.values()] == ["ok", "ok", "wrong", "failed"]
    assert "ZeroDivisionError" in ways["tensordot"]["reason"]
    assert "median_us" in ways["ours"] and "median_us" not in ways["reconstruct"]
    greedy = run_point(case, "forward", problem, replace(chosen, memory_cap=1))["ways"]
    assert {way["status"] for way in greedy.values()} == {"skipped"}
    assert greedy["ours"]["reason"].startswith("needs ")


def test_goals_find_the_worst_point() -> None:
    def record(rows: int, ours: float, other: float) -> dict:
        ways = {"ours": {"median_us": ours}, "dense": {"median_us": 1.0}}
        ways["tltorch"] = {"median_us": other}
        place = {"case": f"768x3072/n5-full/{rows}", "size": "768x3072", "rows": rows}
        return place | {"pass": "light", "floor_us": 2.0, "core_bytes": 8, "ways": ways}

    records = [record(16, 1.0, 2.0), record(4096, 1.2, 1.0)]
    verdicts = {verdict.goal.text: verdict for verdict in goals.evaluate(records, "cpu")}
    best = next(v for text, v in verdicts.items() if "best other" in text)
    assert [r["rows"] for _, r in best.offenders] == [4096] and len(best.points) == 2
    light = next(v for text, v in verdicts.items() if "light step" in text)
    assert len(light.points) == 1 and not light.offenders
    assert set(OTHER_MPO_WAYS) == set(WAYS) - {"ours", "dense", "lowrank"}


@pytest.mark.parametrize("rows, ours, missed", [(4096, 1.2, 2), (4096, 0.9, 1), (256, 1.2, 1)])
def test_goals_of_a_gpu_speak_of_the_plan(rows: int, ours: float, missed: int) -> None:
    shape = {"in_features": 4096, "out_features": 4096}
    ways = {"ours": {"median_us": ours}, "dense": {"median_us": 1.0}}
    plan = {"forward": {"algorithm": "fused", "macs": rows * 2**22}}
    record = {"case": "", "size": "4096x4096", "rows": rows, "pass": "forward", "ways": ways}
    record |= {"shape": shape, "plan": plan, "floor_us": 0.5, "parameters": 2**20}
    verdicts = goals.evaluate([record], "cuda")
    assert sum(bool(verdict.offenders) for verdict in verdicts) == missed


@pytest.fixture
def quick_run(monkeypatch, tmp_path: Path):
    """Run the command on one small case; returns its exit status and the file."""
    monkeypatch.setattr(command, "measure_roofline", lambda *_: ROOFLINE)
    monkeypatch.setattr(facts, "commit", lambda: {"commit": "abc", "dirty": False})
    monkeypatch.setattr(command, "THREADS", 1)
    path = tmp_path / "cpu.json"
    base = ["--output", str(path), "--quick", "--shapes", "64x64", "--factorisations", "n2-d16"]
    base += ["--rows", "1", "3", "--ways", "ours", "dense", "opt_einsum"]
    return (lambda *more: command.main([*base, *more])), path


def test_run_resumes_and_report_renders(quick_run, monkeypatch, capsys) -> None:
    start, path = quick_run
    assert start("--passes", "forward") == 0
    assert "| goal | at most |" in capsys.readouterr().out
    first = load(path)["records"]

    measured = []

    def counted(case, name, *rest):
        measured.append((case.rows, name))
        return run.run_point(case, name, *rest)

    monkeypatch.setattr(command, "run_point", counted)
    assert start("--passes", "forward", "light", "--resume") == 0
    assert measured == [(1, "light"), (3, "light")]
    results = load(path)
    assert results["records"][:2] == first and len(results["records"]) == 4
    assert results["conditions"]["git"] == {"commit": "abc", "dirty": False}

    capsys.readouterr()
    assert report.main([str(path), "--every-way"]) == 0
    text = capsys.readouterr().out
    for heading in ("# Benchmark", "## Goals", "## 64x64, light", "## Every way"):
        assert heading in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 20 and not any("None" in line for line in tables)


def test_decoding_is_timed_in_a_stack_by_every_back_end(quick_run, monkeypatch) -> None:
    start, path = quick_run
    monkeypatch.setattr(command, "LAYERS", 3)
    layers = []

    def matrix(step: Step) -> int:
        held = step.module.state_dict().values()
        return next(tensor.data_ptr() for tensor in held if tensor.dim() > 1)

    monkeypatch.setattr(run, "_in_turn", lambda steps: layers.append(set(map(matrix, steps))))
    ways = ("--ways", *command.SERVED_BESIDE, *SERVING)
    assert start("--passes", "forward", "--decoding", *ways) == 0
    assert layers and {len(each) for each in layers} == {3}
    record = load(path)["records"][0]
    status = {name: way["status"] for name, way in record["ways"].items()}
    assert status == {name: "ok" for name in status} | {"triton": "failed", "cuda": "failed"}
    assert record["layers"] == 3 and record["ways"]["torch"]["error"] < 1e-6
    assert 1e-4 < record["ways"]["int8"]["error"] < record["ways"]["float8_e4m3fn"]["error"] < 0.1


def test_resuming_other_conditions_is_refused(quick_run, monkeypatch, capsys) -> None:
    start, path = quick_run
    assert start("--passes", "forward") == 0
    before = path.read_text()
    monkeypatch.setattr(facts, "commit", lambda: {"commit": "def", "dirty": False})
    assert start("--resume") == 2
    assert "cannot resume" in capsys.readouterr().err
    assert path.read_text() == before


def test_bad_arguments_end_with_two(tmp_path: Path, capsys) -> None:
    path = tmp_path / "no.json"
    path.write_text(json.dumps({"records": []}))
    for call in (
        lambda: command.main(["--output", str(path), "--shapes", "1x1"]),
        lambda: command.main(["--output", str(path), "--rows", "0"]),
        lambda: report.main([str(path)]),
    ):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err
