"""The eager shortcut: a call that nothing observes need not pass torch's dispatcher.

It spares a third: at one row the host takes 22 µs for a layer of two thin products instead of 33
dispatched, beside nn.Linear's 9 (medians of `pytest tests/csrc --benchmark-only`, the driver left
out; an Intel Xeon, torch 2.13.0). For that it reads private names of torch: where a
release lacks one, every call is dispatched, which is as right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter

logger = logging.getLogger(__name__)

# What this torch lacks, or None.
MISSING: str | None = None
try:
    from torch._C import (
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import peek_interpreter_stack
    from torch.autograd import _profiler_enabled, forward_ad

    _ = forward_ad._current_level, Tensor._is_zerotensor
except (ImportError, AttributeError) as error:
    MISSING = str(error)
    logger.info("small eager calls take longer: %s", MISSING)


def unobserved(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> bool:
    """Whether nothing would see the operator: no gradient, autocast, tracer, mode or subclass.

    Nor anything that the dispatcher resolves (a view negated on reading, zeros without memory) or
    the operator refuses (another dtype or device).
    """
    if (
        MISSING is not None
        or is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _profiler_enabled()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    trains, dtype, device = is_grad_enabled(), x.dtype, x.device
    for t in (x, *cores) if bias is None else (x, *cores, bias):
        if (
            (type(t) is not Tensor and type(t) is not Parameter)
            or (trains and t.requires_grad)
            or t.is_neg()
            or t._is_zerotensor()
            or t.dtype != dtype
            or t.device != device
        ):
            return False
    return True
