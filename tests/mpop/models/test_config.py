"""Configurations that contradict themselves."""

from __future__ import annotations

import math

import pytest

import mpo_kernels
import mpop


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_cores": 1}, ValueError, "num_cores.*at least 2, got 1"),
        ({"num_cores": 2.0}, TypeError, "num_cores.*integer"),
        ({"num_cores": True}, TypeError, "num_cores.*integer"),
        ({"ranks": 0}, ValueError, "ranks.*at least 1"),
        ({"ranks": (4, -1)}, ValueError, "ranks.*at least 1"),
        ({"ranks": "8"}, TypeError, "ranks"),
        ({"ranks": 2.5}, TypeError, "ranks"),
        ({"rel_error": 1.0}, ValueError, "0 <= rel_error < 1"),
        ({"rel_error": math.nan}, ValueError, "0 <= rel_error < 1"),
        ({"rel_error": "0.1"}, TypeError, "rel_error.*number"),
        ({"compression": 0}, ValueError, "0 < compression <= 1, got 0"),
        ({"compression": 50}, ValueError, "0 < compression <= 1, got 50"),
        ({"compression": True}, TypeError, "compression.*number"),
        ({"share": 0}, ValueError, "0 < share < 1, got 0"),
        ({"share": 1.0}, ValueError, "0 < share < 1, got 1.0"),
        ({"share": "0.1"}, TypeError, "share.*number"),
        ({"ranks": 4, "compression": 0.5}, ValueError, "at most one"),
        ({"share": 0.1, "compression": 0.5}, ValueError, "at most one"),
        (
            {"overrides": {"*": {"share": 0.1, "in_factors": (2, 2), "out_factors": (2, 2)}}},
            ValueError,
            "chooses factors",
        ),
        ({"tensor_parallel": 0}, ValueError, "tensor_parallel.*at least 1"),
        ({"tensor_parallel": 2.0}, ValueError, "tensor_parallel.*integers"),
        ({"include": "*.query"}, TypeError, "include.*sequence of patterns"),
        ({"exclude": [3]}, TypeError, "exclude.*strings"),
        ({"embeddings": 1}, TypeError, "embeddings"),
        ({"overrides": ["*"]}, TypeError, "overrides"),
        ({"overrides": {"*": 4}}, TypeError, "overrides"),
        ({"overrides": {"*": {"rank": 4}}}, ValueError, r"overrides\['\*'\].*got \['rank'\]"),
        ({"overrides": {"*": {"ranks": 0}}}, ValueError, r"overrides\['\*'\].*at least 1"),
        ({"overrides": {"*": {"in_factors": (2, 2)}}}, ValueError, "both in_factors and"),
    ],
)
def test_bad_configurations(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        mpop.CompressionConfig(**options)


def test_explicit_factors_go_before_a_share() -> None:
    override = {"*.key": {"in_factors": (2, 3), "out_factors": (3, 2)}, "*.value": {"ranks": 2}}
    config = mpop.CompressionConfig(share=0.1, overrides=override)
    assert config.for_matrix(["a.query"]).share == 0.1
    assert config.for_matrix(["a.key"]).shape(6, 6).in_factors == (2, 3)
    assert config.for_matrix(["a.value"]).shape(32, 32) == mpo_kernels.MPOShape.balanced(
        *(32, 32), ranks=2
    )
