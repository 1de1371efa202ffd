"""What the engine promises about speed and memory, checked against the records of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.layer.ways import OTHER_MPO_WAYS
from bench.results import Record


def time_of(record: Record, way: str) -> float | None:
    """Median microseconds of a way, where it was timed."""
    return record["ways"].get(way, {}).get("median_us")


def fastest(record: Record, ways: Iterable[str]) -> tuple[str, float] | None:
    """The fastest of some ways, and its microseconds."""
    timed = {way: us for way in ways if (us := time_of(record, way)) is not None}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def ratio(record: Record, of: str, to: str) -> float | None:
    """Time of one way over that of another, where both were timed."""
    a, b = time_of(record, of), time_of(record, to)
    return None if a is None or b is None else a / b


def over_best_other(record: Record) -> float | None:
    """Our time over that of the best other MPO way."""
    ours, other = time_of(record, "ours"), fastest(record, OTHER_MPO_WAYS)
    return None if ours is None or other is None else ours / other[1]


def over_floor(record: Record) -> float | None:
    """Our time over the roofline's."""
    ours = time_of(record, "ours")
    return None if ours is None else ours / record["floor_us"]


def _at_4096_rows(record: Record) -> float | None:
    return over_floor(record) if record["rows"] == 4096 else None


def _light_step(rows: int) -> Callable[[Record], float | None]:
    place = (f"768x3072/n5-full/{rows}", "light")

    def figure(record: Record) -> float | None:
        here = (record["case"], record["pass"]) == place
        return ratio(record, "ours", "dense") if here else None

    return figure


def _fused_from_1024_rows(record: Record) -> float | None:
    plans = record["plan"].values()
    here = record["rows"] >= 1024 and all(plan["algorithm"] == "fused" for plan in plans)
    return over_floor(record) if here else None


def _small_rows(record: Record) -> float | None:
    shape = record["shape"]
    dense = shape["in_features"] * shape["out_features"]
    here = record["rows"] <= 16 and min(shape["in_features"], shape["out_features"]) >= 4096
    few = 16 * record["parameters"] <= dense
    return ratio(record, "ours", "dense") if here and few else None


def _few_rows_over_floor(record: Record) -> float | None:
    return over_floor(record) if record["rows"] <= 16 and record["pass"] == "forward" else None


def _half_the_work(record: Record) -> float | None:
    shape, plans = record["shape"], record["plan"]
    dense = record["rows"] * shape["in_features"] * shape["out_features"]
    passes = {"forward": 1, "forward+backward": 3}.get(record["pass"])
    if passes is None or 2 * sum(plan["macs"] for plan in plans.values()) > passes * dense:
        return None
    return ratio(record, "ours", "dense")


def _decoding(record: Record) -> float | None:
    chains = {f"4096x4096/n2-d{rank}/1" for rank in (4, 8, 16, 32, 64)}
    here = record["case"] in chains and record["pass"] == "forward"
    return ratio(record, "ours", "dense") if here else None


def _saved(record: Record) -> float | None:
    ours, dense = (record["ways"].get(way, {}) for way in ("ours", "dense"))
    if record["pass"] == "forward" or "saved_bytes" not in ours or "saved_bytes" not in dense:
        return None
    return ours["saved_bytes"] / (dense["saved_activations_bytes"] + record["core_bytes"])


def _planner(record: Record) -> float | None:
    return record.get("planner", {}).get("chosen_over_best")


def _overhead(record: Record) -> float | None:
    ours, dense = time_of(record, "ours"), time_of(record, "dense")
    here = record["size"] in ("64x64", "384x384") and record["rows"] == 1
    if not here or record["pass"] != "forward" or ours is None or dense is None:
        return None
    return ours - dense


@dataclass(frozen=True)
class Goal:
    """A figure of a record, ``None`` where it says nothing, that must not pass a limit."""

    text: str
    limit: float
    figure: Callable[[Record], float | None]


GOALS = (
    Goal("time ÷ best other MPO way, everywhere", 1.10, over_best_other),
    Goal("time ÷ floor, 4096 rows", 1.50, _at_4096_rows),
    Goal("light step ÷ dense step, 768x3072 n5-full, 4096 rows", 1.25, _light_step(4096)),
    Goal("time ÷ dense, 4096x4096, n2 chains, 1 row", 1.00, _decoding),
    Goal("bytes saved for backward ÷ (dense's + cores)", 1.00, _saved),
    Goal("planner: chosen ÷ best of its candidates", 1.10, _planner),
    Goal("µs more than F.linear, 64x64 and 384x384, 1 row", 100.0, _overhead),
)

GPU_GOALS = (
    Goal("time ÷ best other MPO way, everywhere", 1.05, over_best_other),
    Goal("time ÷ floor, the fused chain from 1024 rows", 1 / 0.6, _fused_from_1024_rows),
    Goal("time ÷ dense, 1–16 rows, 4096² and up, 16 × smaller", 1.00, _small_rows),
    Goal("time ÷ floor, forward, 1–16 rows", 1 / 0.7, _few_rows_over_floor),
    Goal("time ÷ dense, where the plan has half of dense's MACs", 1.00, _half_the_work),
    Goal("light step ÷ dense step, 768x3072 n5-full, 4096 rows", 1.25, _light_step(4096)),
    Goal("light step ÷ dense step, 768x3072 n5-full, 16384 rows", 1.10, _light_step(16384)),
    Goal("bytes saved for backward ÷ (dense's + cores)", 1.00, _saved),
    Goal("planner: chosen ÷ best of its candidates", 1.10, _planner),
)


@dataclass(frozen=True)
class Verdict:
    """How a goal stands: every point it speaks of, the worst first."""

    goal: Goal
    points: list[tuple[float, Record]]

    @property
    def offenders(self) -> list[tuple[float, Record]]:
        return [point for point in self.points if point[0] > self.goal.limit]


def evaluate(records: Iterable[Record], device: str) -> list[Verdict]:
    """Every goal of this kind of device against every record."""
    records = list(records)
    verdicts = []
    for goal in GPU_GOALS if device == "cuda" else GOALS:
        points = [(goal.figure(record), record) for record in records]
        known = [(figure, record) for figure, record in points if figure is not None]
        verdicts.append(Verdict(goal, sorted(known, key=lambda point: -point[0])))
    return verdicts
