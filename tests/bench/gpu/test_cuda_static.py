"""What is read of a kernel's instructions, and what of it is a fault."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gpu.cuda_static import faults, order

LOAD, INPUT, STORE = (
    "LDG.E.128.CONSTANT R4, [R2]",
    "LDG.E.128.STRONG.GPU R8, [R6]",
    "STG.E [R2], R4",
)
RIGHT = [LOAD, LOAD, "PREEXIT", "ACQBULK", INPUT, "HMMA.16816.F32", STORE]


def test_order_of_loads_release_wait_and_inputs() -> None:
    assert order("\n".join(RIGHT)) == {"early": 2, "ordered": True}
    assert order("\n".join([LOAD, INPUT, STORE])) == {}
    for k, other in ((1, 2), (2, 3), (3, 4), (3, 6)):
        wrong = list(RIGHT)
        wrong[k], wrong[other] = wrong[other], wrong[k]
        assert order("\n".join(wrong)) != order("\n".join(RIGHT)), wrong


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"stack": 8}, "spills 8 bytes"),
        ({"mma": 0}, "no matrix instruction"),
        ({"registers": 129}, "129 registers"),
        ({"ordered": False}, "not in order"),
        ({"early": 3}, "3 loads before the wait of 4"),
    ],
)
def test_faults(changes: dict[str, Any], says: str | None) -> None:
    row = {"registers": 100, "stack": 0, "mma": 6, "spills": 0, "early": 4, "ordered": True}
    found = faults({"architectures": {"sm_90": {"float16/same/2x1": row | changes}}})
    assert found == [] if says is None else len(found) == 1 and says in found[0]
