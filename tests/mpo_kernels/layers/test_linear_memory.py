"""What MPOLinear makes on its way, and what it keeps for backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_kernels import MPOLinear, MPOShape
from mpo_kernels.backends.torch.backend import TorchBackend
from mpo_kernels.planning.plan import Gradients
from mpo_kernels.testing import dense_linear, random_cores, relative_error, tolerance


class Allocations(TorchDispatchMode):
    """The storages that operations make, by size in elements."""

    def __init__(self):
        super().__init__()
        self.largest, self.of = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                size = t.untyped_storage().nbytes() // t.element_size()
                if size > self.largest:
                    self.largest, self.of = size, func
        return result


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize(
    "shape",
    [
        MPOShape.balanced(192, 256, 5),
        MPOShape.balanced(192, 256, 5, 24),
        MPOShape.balanced(192, 256, 3),
        MPOShape.balanced(192, 256, 2, 16),
        MPOShape.balanced(192, 256, 2),
        MPOShape.skewed(192, 256, 8, 32, 16),
        MPOShape.low_rank(192, 256, 20),
    ],
    ids=["n5", "n5-24", "n3", "n2-16", "n2", "skewed", "low-rank"],
)
def test_neither_w_nor_dw_is_ever_whole(shape, rows, frozen):
    layer = MPOLinear(192, 256, shape)
    if frozen:
        layer.freeze_central()
    x = torch.randn(rows, 192)
    device = torch.device("cpu")
    wanted = Gradients(True, tuple(core.requires_grad for core in layer.cores))
    dy, cores = torch.randn(rows, 256), list(layer.cores)
    half = 192 * 256 // 2
    # Activations have their size, and the gradient of a core has the core's.
    activations = rows * max(192, 256)
    trained = max(core.numel() for core in cores if core.requires_grad)
    with torch.no_grad():
        for plan in TorchBackend().plan_for(rows, x.dtype, device, cores).candidates[:6]:
            with Allocations() as seen:
                TorchBackend().linear(x, cores, None, 256, plan)
            assert seen.largest <= max(half, activations), (plan, seen.of)
        for plan in TorchBackend().plan_for(rows, x.dtype, device, cores, wanted).candidates[:6]:
            with Allocations() as seen:
                TorchBackend().linear_backward(dy, x, cores, wanted, plan)
            assert seen.largest <= max(half, activations, trained), (plan, seen.of)


class Operations(TorchDispatchMode):
    """The names of what computes or copies, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name != "new_empty":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_is_the_products_of_two_linears(rows, transposed, dtype):
    """Neither x nor y is copied, and no pass adds the bias; backward forms one state again."""
    shape = MPOShape.low_rank(192, 256, 20)
    cores, wanted = random_cores(shape, dtype), Gradients(True, (True, True))
    x, dy = (torch.randn(features, rows).to(dtype).t() for features in (192, 256))
    if not transposed:
        x, dy = x.contiguous(), dy.contiguous()
    bias = torch.randn(256).to(dtype)
    for added, products in ((bias, ["mm", "addmm"]), (None, ["mm", "mm"])):
        with Operations() as seen:
            y = TorchBackend().linear(x, cores, added, 256)
        assert seen.names == products
        exact = dense_linear(x.double(), [c.double() for c in cores], None, shape)
        exact = exact if added is None else exact + added.double()
        assert relative_error(y, exact) <= tolerance(0.0, dtype, 2)
    with Operations() as seen:
        TorchBackend().linear_backward(dy, x, cores, wanted)
    assert seen.names == ["mm"] * 5


def saved_bytes(function):
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (
            seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t
        ),
        lambda t: t,
    ):
        function()
    return sum(seen.values())


def test_only_x_and_the_cores_are_saved():
    layer = MPOLinear(192, 256, MPOShape.balanced(192, 256, 5))
    linear, x = layer.to_linear(), torch.randn(64, 192, requires_grad=True)
    cores = sum(core.numel() * 4 for core in layer.cores)
    assert saved_bytes(lambda: layer(x)) == x.numel() * 4 + cores
    assert saved_bytes(lambda: layer(x)) <= saved_bytes(lambda: linear(x)) + cores
