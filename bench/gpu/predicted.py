"""What the planner expects of the cases that the gate times: `python -m bench.gpu.predicted`.

Written before a device has run them, so that the run can refute it. Captured in a graph: the host's
time is left out. Dense is predicted by the same figures.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from bench.gpu.static import RESULTS
from bench.layer.cases import DECODING, GPU, Case, select
from mpo_kernels.backends.cuda import thin
from mpo_kernels.backends.triton.planning import plan_fused
from mpo_kernels.backends.triton.tiles import LIMITS
from mpo_kernels.planning.figures import default_figures
from mpo_kernels.planning.plan import Call, Gradients
from mpo_kernels.planning.work import Work, exposed, time_of

FIGURES = replace(default_figures("cuda", torch.bfloat16, 1), host_seconds=0.0)


def predicted(case: Case, name: str) -> tuple[str, float, float]:
    """What is chosen for a pass of a case, and microseconds of it and of dense's."""
    shape, rows = case.shape, case.rows
    ins, outs = shape.in_features, shape.out_features
    call = Call(shape.core_shapes, (ins, outs), rows, torch.bfloat16)
    trained = tuple(k != shape.central or name != "light" for k in range(shape.num_cores))
    calls = [call]
    dense = dense_us(rows, outs, ins)
    if name != "forward":
        calls.append(call._replace(gradients=Gradients(True, trained)))
        dense += dense_us(rows, ins, outs) + dense_us(ins, outs, rows)
    plans = [plan_fused(c, FIGURES, LIMITS["sm_90"]) for c in calls]
    chosen = ", ".join(f"{plan.algorithm} ({plan.order})" for plan in plans)
    return chosen, sum(plan.predicted_us for plan in plans), dense


def dense_us(m: int, n: int, k: int) -> float:
    """Microseconds of a library product ``[m, k] × [k, n]`` in 16 bits."""
    product = [Work(m, n, k)]
    return 1e6 * time_of(product, FIGURES, exposed(2 * (m * n + m * k + n * k), product, FIGURES))


def decoding(case: Case) -> list[float | None]:
    """Microseconds of thin products, with cores in 16 and in 8 bits, and of the other ways."""
    shape = case.shape
    features = (shape.in_features, shape.out_features)

    def thinly(itemsize: int) -> float | None:
        sizes = case.rows, features, itemsize, LIMITS["sm_90"].multiprocessors
        chain = thin.laid_out_chain(shape.core_shapes, *sizes, FIGURES)
        return chain and 1e6 * chain.seconds

    call = Call(shape.core_shapes, features, case.rows, torch.bfloat16)
    others = plan_fused(call, FIGURES, LIMITS["sm_90"]).candidates
    best = {
        fused: min((p.predicted_us for p in others if bool(p.launches) == fused), default=None)
        for fused in (True, False)
    }
    dense = dense_us(case.rows, features[1], features[0])
    return [thinly(2), thinly(1), best[True], best[False], dense]


def table() -> str:
    """Of every timed case, as Markdown."""
    lines = [
        "# Predicted, not measured",
        "",
        "`python -m bench.gpu.predicted`: an H200, bf16, microseconds captured in a graph.",
        "",
        "| case | pass | chosen | ours | dense | ÷ |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for case, name in select(blocks=GPU):
        chosen, ours, dense = predicted(case, name)
        ratio = ours / dense
        lines.append(
            f"| {case.name} | {name} | {chosen} | {ours:.0f} | {dense:.0f} | {ratio:.2f} |"
        )
    lines += [
        "",
        "Few rows of a served layer (the gate's decode grid): thin products with cores in 16 and 8",
        "bits, the fused kernels, the library's calls, dense.",
        "",
        "| case | thin | thin, int8 | fused | library | dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(case for case, _ in select(blocks=DECODING)):
        times = ("–" if us is None else f"{us:.1f}" for us in decoding(case))
        lines.append(f"| {case.name} | {' | '.join(times)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Write the table; returns the exit code."""
    path = RESULTS / "predicted.md"
    path.write_text(table(), encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
