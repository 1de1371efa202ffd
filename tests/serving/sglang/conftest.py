"""SGLang's groups of this one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from without_kernels import start, stop


@pytest.fixture(scope="session", autouse=True)
def one_process() -> Iterator[None]:
    start()
    yield
    stop()
